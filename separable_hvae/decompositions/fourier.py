r"""Fourier bands: rings of frequency bins.

With the unitary transform X = F x, bin k belongs to the scale s with

    s_prev / 2 < |k|_∞ ≤ s / 2,

k in absolute bin numbers on every axis. A real signal has X(-k) = X(k)*, so only one bin of each
conjugate pair is kept, as (√2 Re X, √2 Im X), and a self-conjugate bin (every coordinate 0 or the
Nyquist bin) as Re X alone: the entries number the signal's degrees of freedom and the map is
orthonormal. A complex signal keeps (Re X, Im X) of every bin.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae.decompositions.base import Decomposition
from separable_hvae.decompositions.checks import sides
from separable_hvae.decompositions.tables import Tables
from separable_hvae.functional import pack, unpack

Bins = NDArray[np.int64]


class _Packing(Tables):
    """Signals on one grid against the packed real coefficients of some of their bins.

    Args:
        points: Points on each axis of the grid.
        bins: Signed bin numbers ``(N, d)``, one of each conjugate pair for real signals.
        paired: For each bin, whether it stands for a conjugate pair, ``(N,)``.
        is_complex: Whether signals are complex (full spectrum).
    """

    gather: Tensor
    doubled: Tensor
    source: Tensor
    sign: Tensor

    def __init__(
        self, points: Sequence[int], bins: Sequence[Bins], paired: Sequence[NDArray[np.bool_]], is_complex: bool
    ):
        self.points = tuple(points)
        self.axes = tuple(range(-len(self.points), 0))
        self.is_complex = is_complex
        self.spectrum = self.points if is_complex else (*self.points[:-1], self.points[-1] // 2 + 1)
        entries = 2 * math.prod(self.spectrum)
        gather, doubled = [], []
        source, sign = np.zeros(entries, np.int64), np.zeros(entries, np.int8)
        start = 0
        for k, pair in zip(bins, paired, strict=True):
            two = np.ones_like(pair) if is_complex else pair
            place = self._place(k)
            real, imag = 2 * place[two], 2 * place[two] + 1
            slots = np.concatenate([real, imag, 2 * place[~two]])
            source[slots], sign[slots] = start + np.arange(len(slots)), 1
            if not is_complex:
                # The partner of a pair in the planes k_last ∈ {0, n/2} is stored too, conjugated.
                partner = self._place(-k[pair])
                stored = (-k[pair, -1]) % self.points[-1] < self.spectrum[-1]
                here = np.flatnonzero(stored)
                source[2 * partner[here]], sign[2 * partner[here]] = start + here, 1
                source[2 * partner[here] + 1], sign[2 * partner[here] + 1] = start + len(real) + here, -1
            gather.append(slots)
            doubled.append(np.concatenate([pair[two], pair[two], pair[~two]]))
            start += len(slots)
        self.sizes = [len(g) for g in gather]
        super().__init__(
            {"gather": np.concatenate(gather), "doubled": np.concatenate(doubled), "source": source, "sign": sign}
        )

    def _place(self, k: Bins) -> Bins:
        wrapped = [k[:, d] % n for d, n in enumerate(self.points)]
        wrapped[-1] = np.minimum(wrapped[-1], self.spectrum[-1] - 1)
        return np.ravel_multi_index(tuple(wrapped), self.spectrum).astype(np.int64)

    def read(self, x: Tensor) -> Tensor:
        """Pack the bins of signals ``(B, C, *points)`` into ``(B, C, K)``."""
        transformed = torch.fft.fftn if self.is_complex else torch.fft.rfftn
        # The MKL of torch 2.6 takes no expanded tensors.
        spectrum = torch.view_as_real(transformed(x.contiguous(), dim=self.axes, norm="ortho"))
        flat = spectrum.flatten(2).index_select(2, self.gather)
        return torch.where(self.doubled, math.sqrt(2) * flat, flat)

    def write(self, h: Tensor) -> Tensor:
        """Invert :meth:`read`, with every other bin zero."""
        h = torch.where(self.doubled, h / math.sqrt(2), h)
        flat = h.index_select(2, self.source) * self.sign
        spectrum = torch.view_as_complex(flat.reshape(*h.shape[:2], *self.spectrum, 2))
        if self.is_complex:
            x: Tensor = torch.fft.ifftn(spectrum, dim=self.axes, norm="ortho")
        else:
            x = torch.fft.irfftn(spectrum, s=self.points, dim=self.axes, norm="ortho")
        return x


class _Fourier(Decomposition):
    """Rings of frequency bins in any number of dimensions; each band is ``(C, K)``."""

    orthonormal = True
    mean_in_first_band = True
    axes: ClassVar[int]
    full_spectrum: ClassVar[bool]

    def __init__(self, size: int | Sequence[int], channels: int = 1, scales: Sequence[int] | None = None) -> None:
        super().__init__(sides(size, self.axes), channels, scales, is_complex=self.full_spectrum)

    @override
    def build(self) -> None:
        bins, paired = _half_space(self.size) if not self.is_complex else _all_bins(self.size)
        reach = 2 * np.abs(bins).max(axis=1)
        lower = (-1, *self.scales[:-1])
        self._ring = {s: (reach > p) & (reach <= s) for p, s in zip(lower, self.scales, strict=True)}
        rings = {s: (bins[m], paired[m]) for s, m in self._ring.items() if m.any()}
        self._count = {s: 2 * len(k) if self.is_complex else len(k) + int(p.sum()) for s, (k, p) in rings.items()}
        ring_bins, ring_pairs = [k for k, _ in rings.values()], [p for _, p in rings.values()]
        self.full = _Packing(self.size, ring_bins, ring_pairs, self.is_complex)
        self.pictures = nn.ModuleDict(
            {
                str(s): _Packing([min(2 * s, n) for n in self.size], [k], [p], self.is_complex)
                for s, (k, p) in rings.items()
            }
        )

    @override
    def default_scales(self) -> tuple[int, ...]:
        scales = super().default_scales()
        # Of three points no bin lies beyond scale 2.
        return (1, 3) if scales == (1, 2, 3) else scales

    @override
    def band_shape(self, scale: int) -> tuple[int, ...] | None:
        return (self.channels, self._count[scale]) if scale in self._count else None

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return list(torch.split(self.full.read(self.check_signal(x)), self.full.sizes, dim=2))

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        x: Tensor = self.full.write(torch.cat(self.check_bands(bands), dim=2))
        return x

    @override
    def to_grid(self, scale: int, h: Tensor) -> Tensor:
        """Show a ring on ``min(2s, n_d)`` points: an isometry."""
        h = self.check_band(scale, h)
        return pack(self.pictures[str(scale)].write(h))  # type: ignore[operator]

    @override
    def from_grid(self, scale: int, y: Tensor) -> Tensor:
        """Return the ring of a small signal on ``min(2s, n_d)`` points; the adjoint of ``to_grid``."""
        y = self.check_picture(scale, y)
        h: Tensor = self.pictures[str(scale)].read(unpack(y, is_complex=self.is_complex))  # type: ignore[operator]
        return h

    @override
    def __repr__(self) -> str:
        # The packings say nothing that size and scales do not.
        return f"{type(self).__name__}({self.extra_repr()})"


def _all_bins(size: Sequence[int]) -> tuple[Bins, NDArray[np.bool_]]:
    axes = [np.fft.fftfreq(n, 1 / n).round().astype(np.int64) for n in size]
    bins = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(size))
    return bins, np.zeros(len(bins), np.bool_)


def _half_space(size: Sequence[int]) -> tuple[Bins, NDArray[np.bool_]]:
    """One bin of each conjugate pair and every self-conjugate one, all inside the half-spectrum."""
    bins, _ = _all_bins(size)
    here = np.ravel_multi_index(tuple(bins[:, d] % n for d, n in enumerate(size)), tuple(size))
    there = np.ravel_multi_index(tuple(-bins[:, d] % n for d, n in enumerate(size)), tuple(size))
    # In the planes that are their own conjugates both partners are stored: the first one counts.
    last = bins[:, -1] % size[-1]
    inner = (last > 0) & (2 * last < size[-1])
    plane = (last == 0) | (2 * last == size[-1])
    chosen = inner | (plane & (here <= there))
    return bins[chosen], (here != there)[chosen]


class FFT1Real(_Fourier):
    """Hermitian half-spectrum of real signals ``(B, C, n)``, see :class:`FFT2Real`."""

    axes = 1
    full_spectrum = False


class FFT2Real(_Fourier):
    """Hermitian half-spectrum of real signals ``(B, C, H, W)``, cut into rings ``(C, K)``.

    >>> decomp = FFT2Real(8, channels=1)
    >>> decomp.scales, decomp.band_shapes
    ((1, 2, 4, 8), {1: (1, 1), 2: (1, 8), 4: (1, 16), 8: (1, 39)})
    >>> x = torch.randn(2, 1, 8, 8)
    >>> bands = decomp.analysis(x)
    >>> torch.allclose(decomp.synthesis(bands), x, atol=1e-5)
    True

    Args:
        size: Points on each axis; an int is a square.
        channels: Channels of the signal.
        scales: Resolutions of the hierarchy; ``None`` halves the largest size down to 1.

    Raises:
        TypeError: If a size or scale is no integer.
        ValueError: If scales do not increase, do not end in the largest size, or leave the last band
            empty (as ``[1, 2, 4, 8, 9]`` does: no bin lies in ``4 < |k| ≤ 4.5``).
    """

    axes = 2
    full_spectrum = False

    def __init__(self, size: int | Sequence[int], channels: int = 3, scales: Sequence[int] | None = None) -> None:
        super().__init__(size, channels, scales)


class FFT3Real(_Fourier):
    """Hermitian half-spectrum of real signals ``(B, C, D, H, W)``, see :class:`FFT2Real`."""

    axes = 3
    full_spectrum = False


class FFT1Complex(_Fourier):
    """Full spectrum of complex signals ``(B, C, n)``, see :class:`FFT2Complex`."""

    axes = 1
    full_spectrum = True


class FFT2Complex(_Fourier):
    """Full spectrum of complex signals ``(B, C, H, W)``, cut into rings ``(C, 2 × bins)``.

    >>> decomp = FFT2Complex(8)
    >>> [h.dtype for h in decomp.analysis(torch.randn(2, 1, 8, 8, dtype=torch.complex64))][-1]
    torch.float32
    >>> sum(channels * entries for channels, entries in decomp.band_shapes.values()) == decomp.numel == 2 * 8 * 8
    True

    Args and errors are those of :class:`FFT2Real`.
    """

    axes = 2
    full_spectrum = True


class FFT3Complex(_Fourier):
    """Full spectrum of complex signals ``(B, C, D, H, W)``, see :class:`FFT2Complex`."""

    axes = 3
    full_spectrum = True
