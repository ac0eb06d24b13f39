r"""Wavelet bands: the levels of a periodized orthogonal wavelet transform.

One level maps n points to n/2 averages and n/2 details with the orthogonal matrix

    W_n = [ L ]      L[k, (2k + ⌊F/2⌋ - j) mod n] += dec_lo[j]
          [ H ],     H[k, (2k + ⌊F/2⌋ - j) mod n] += dec_hi[j],

which is PyWavelets' ``mode="periodization"``, orthonormal down to n = 2 for any filter length F.
On d axes a level gives 2^d - 1 detail blocks. The details that lead from n/2 to n points belong to
the scale s with s_prev < n ≤ s; the last averages belong to the coarsest scale that they fit.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pywt
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae._float32 import rounds_products
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.decompositions.checks import sides
from separable_hvae.decompositions.tables import Tables
from separable_hvae.functional import pack, unpack

_DENSE = 512  # Points up to which W_n is one matrix.
_BLOCK = 32  # Points of the blocks that it is applied in beyond.
_MAX_DEFECT = 1e-6


def _matrix(wavelet: str, n: int) -> NDArray[np.float64]:
    """The orthogonal matrix W_n."""
    filters = np.array(pywt.Wavelet(wavelet).filter_bank[:2])
    length = filters.shape[1]
    k, j = np.mgrid[: n // 2, :length]
    matrix = np.zeros((2, n // 2, n))
    for rows, values in zip(matrix, filters, strict=True):
        np.add.at(rows, (k, (2 * k + length // 2 - j) % n), np.broadcast_to(values, k.shape))
    return matrix.reshape(n, n)


def orthogonality_defect(wavelet: str) -> float:
    """Largest entry of ``W W^T - I`` for a wavelet's periodized matrix, 0 for exact orthogonal filters."""
    matrix = _matrix(wavelet, 2 * pywt.Wavelet(wavelet).dec_len)
    return float(np.abs(matrix @ matrix.T - np.eye(len(matrix))).max())


def _beside(y: Any) -> Any:
    """Averages and details one after the other, as pairs along the first axis."""
    return rearrange(y, "(two k) ... -> (k two) ...", two=2)


def _apart(y: Tensor) -> Tensor:
    """Invert :func:`_beside`."""
    return rearrange(y, "(k two) ... -> (two k) ...", two=2)


class _Level(Tables):
    """Multiplies axes of n points by W_n, or by its transpose: in float64, or in float32.

    Long ones are not multiplied by the whole matrix. With each average beside its detail, the rows of a block of
    points follow one another along its diagonal, and are the same for each block and the margins around it.
    """

    def __init__(self, wavelet: str, n: int) -> None:
        self.is_dense = n <= _DENSE
        # How many points before and after a block its rows read.
        self.margin = 2 * (int(pywt.Wavelet(wavelet).dec_len) // 4)
        self.block = max(_BLOCK, self.margin)
        if self.is_dense:
            matrix = _matrix(wavelet, n)
            rows, transposed = matrix, matrix.T
        else:
            matrix = _beside(_matrix(wavelet, self.block + 2 * self.margin))
            rows, transposed = (m[self.margin : self.margin + self.block] for m in (matrix, matrix.T))
        exact = {"rows": np.ascontiguousarray(rows), "transposed": np.ascontiguousarray(transposed)}
        super().__init__({f"{name}{bits}": m.astype(f"float{bits}") for name, m in exact.items() for bits in (32, 64)})

    @override
    def forward(self, x: Tensor, axis: int, *, transposed: bool = False) -> Tensor:
        moved = x.movedim(axis, 0)
        wide = x.dtype == torch.float64 or (torch.compiler.is_compiling() and rounds_products(x.device))
        columns = moved.flatten(1).to(torch.float64 if wide else torch.float32)
        rows = self.get_buffer(f"{'transposed' if transposed else 'rows'}{64 if wide else 32}")
        if self.is_dense:
            product = rows @ columns
        elif transposed:
            product = self._in_blocks(rows, _beside(columns))
        else:
            product = _apart(self._in_blocks(rows, columns))
        return product.to(x.dtype).reshape(moved.shape).movedim(0, axis)

    def _in_blocks(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The same rows for each block of points and the margins around it, which wrap around."""
        n, margin, size = len(columns), self.margin, self.block
        if missing := -n % size:
            around = torch.cat([columns[n - margin :], columns, columns[: missing + margin]])
            starts = (0, margin, 2 * margin)
            before, blocks, after = (around[i : i + n + missing].unflatten(0, (-1, size)) for i in starts)
            before, after = before[:, :margin], after[:, size - margin :]
        else:  # Half the copies.
            blocks = columns.unflatten(0, (-1, size))
            before, after = blocks[:, size - margin :].roll(1, 0), blocks[:, :margin].roll(-1, 0)
        return (rows @ torch.cat([before, blocks, after], dim=1)).flatten(0, 1)[:n]


def _halvings(size: Sequence[int]) -> int:
    """How often every axis can be halved; an axis of one point stays as it is."""
    long = [n for n in size if n > 1]
    return min(((n & -n).bit_length() - 1 for n in long), default=0)


class _Wavelet(Decomposition):
    """Periodized orthogonal wavelet bands in any number of dimensions."""

    orthonormal = True
    mean_in_first_band = True
    axes: ClassVar[int]

    def __init__(
        self,
        size: int | Sequence[int],
        wavelet: str = "haar",
        channels: int = 1,
        scales: Sequence[int] | None = None,
        is_complex: bool = False,
    ) -> None:
        if not isinstance(wavelet, str) or wavelet not in pywt.wavelist(kind="discrete"):
            raise ValueError(f"wavelet must be a name from pywt.wavelist(kind='discrete'), got {wavelet!r}")
        defect = orthogonality_defect(wavelet)
        if defect > _MAX_DEFECT:
            raise ValueError(
                f"wavelet {wavelet!r} is not orthogonal: its filters' defect is {defect:.1g}, allowed is {_MAX_DEFECT}"
            )
        self.wavelet = wavelet
        super().__init__(sides(size, self.axes), channels, scales, is_complex=is_complex)

    @override
    def build(self) -> None:
        if (levels := _halvings(self.size)) == 0:
            raise ValueError(f"size {self.size} cannot be halved: a wavelet needs every axis longer than 1 to be even")
        # Sizes on the way down, fine to coarse; an axis of one point has nothing left to split.
        self._levels = [tuple(max(n >> j, 1) for n in self.size) for j in range(levels + 1)]
        split = {n for points in self._levels[:-1] for n in points if n > 1}
        self.products = nn.ModuleDict({str(n): _Level(self.wavelet, n) for n in sorted(split)})
        # Each band gathers a run of levels: the last averages or the details of one or more levels.
        self._runs: dict[int, list[tuple[int, ...]]] = {s: [] for s in self.scales}
        for points in self._levels:
            self._runs[next(s for s in self.scales if max(points) <= s)].insert(0, points)
        if len(self.scales) > 1 and not any(self._runs[s] for s in self.scales[:-1]):
            warnings.warn(
                f"scales {list(self.scales[:-1])} emit no band, so one holds the whole signal: size {self.size} can be "
                f"halved down to {self._coarsest} alone; choose scales among {list(self.default_scales())}",
                stacklevel=3,
            )

    @override
    def default_scales(self) -> tuple[int, ...]:
        """Every size on the way down, from the last that cannot be halved."""
        return tuple(max(self.size) >> j for j in range(_halvings(self.size), -1, -1))

    @property
    def _coarsest(self) -> tuple[int, ...]:
        return self._levels[-1]

    def _parts(self, scale: int) -> list[tuple[int, ...]]:
        """Shape of each block of a band: last averages, then details, coarse to fine."""
        parts: list[tuple[int, ...]] = []
        for points in self._runs[scale]:
            if points == self._coarsest:
                parts.append((self.real_channels, *points))
            else:
                half, blocks = self._half(points)
                parts.append((self.real_channels * blocks, *half))
        return parts

    def _half(self, points: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The grid of a level's details and their number of blocks."""
        split = [n > 1 for n in points]
        return tuple(n // 2 if s else n for n, s in zip(points, split, strict=True)), 2 ** sum(split) - 1

    @override
    def band_shape(self, scale: int) -> tuple[int, ...] | None:
        """``(C (2^d - 1), *points)`` for one level, ``(C, *points)`` for averages, ``(K,)`` for several."""
        parts = self._parts(scale)
        if len(parts) == 1:
            return parts[0]
        return (sum(map(math.prod, parts)),) if parts else None

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """One level down: averages ``(B, C, *half)`` and details ``(B, C (2^d - 1), *half)``."""
        half = [y]
        for axis, n in enumerate(y.shape[2:], start=2):
            if n > 1:
                half = [block for part in half for block in self.products[str(n)](part, axis).chunk(2, axis)]
        return half[0], torch.cat(half[1:], dim=1)

    def _merge(self, average: Tensor, details: Tensor, points: tuple[int, ...]) -> Tensor:
        """Invert :meth:`_split`."""
        blocks = [average, *details.chunk(self._half(points)[1], dim=1)]
        for axis, n in reversed(list(enumerate(points, start=2))):
            if n > 1:
                pairs = [torch.cat(pair, axis) for pair in zip(blocks[::2], blocks[1::2], strict=True)]
                blocks = [self.products[str(n)](pair, axis, transposed=True) for pair in pairs]
        return blocks[0]

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat([p.flatten(1) for p in parts], dim=1)

    def _cut(self, scale: int, h: Tensor) -> list[Tensor]:
        shapes = self._parts(scale)
        if len(shapes) == 1:
            return [h]
        pieces = torch.split(h, [math.prod(s) for s in shapes], dim=1)
        return [p.reshape(h.shape[0], *s) for p, s in zip(pieces, shapes, strict=True)]

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        average, parts = pack(self.check_signal(x)), {}
        for points in self._levels[:-1]:
            average, parts[points] = self._split(average)
        parts[self._coarsest] = average
        return [self._join([parts[p] for p in self._runs[s]]) for s in self.band_scales]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        full = self.check_bands(bands)
        y: Tensor | None = None
        for scale, h in zip(self.band_scales, full, strict=True):
            y = self._upwards(scale, y, h)
        assert y is not None
        return unpack(y, is_complex=self.is_complex)

    def _upwards(self, scale: int, y: Tensor | None, h: Tensor) -> Tensor:
        for points, part in zip(self._runs[scale], self._cut(scale, h), strict=True):
            if points == self._coarsest:
                y = part
            else:
                if y is None:
                    y = part.new_zeros(part.shape[0], self.real_channels, *self._half(points)[0])
                y = self._merge(y, part, points)
        assert y is not None
        return y

    @override
    def picture_shape(self, scale: int) -> tuple[int, ...]:
        self.band_index(scale)
        return (self.real_channels, *self._runs[scale][-1])

    @override
    def to_grid(self, scale: int, h: Tensor) -> Tensor:
        """Show a band at the resolution that its details lead to: an isometry."""
        return self._upwards(scale, None, self.check_band(scale, h))

    @override
    def from_grid(self, scale: int, y: Tensor) -> Tensor:
        """Return the details of a small signal; the adjoint of ``to_grid``."""
        y = self.check_picture(scale, y)
        parts: list[Tensor] = []
        for points in reversed(self._runs[scale]):
            if points != self._coarsest:
                y, part = self._split(y)
            else:
                part = y
            parts.insert(0, part)
        return self._join(parts)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, wavelet={self.wavelet!r}"

    @override
    def __repr__(self) -> str:
        # The products say nothing that size and wavelet do not.
        return f"{type(self).__name__}({self.extra_repr()})"


class Wavelet1(_Wavelet):
    """Wavelet bands of signals ``(B, C, n)``, see :class:`Wavelet2`."""

    axes = 1


class Wavelet2(_Wavelet):
    """Periodized orthogonal wavelet bands of signals ``(B, C, H, W)``.

    Scales below the last halving emit no band; their latents belong to the next band. Scales that
    skip halvings gather several levels in one flat band.

    >>> decomp = Wavelet2(8, "db2", channels=1)
    >>> decomp.scales, decomp.band_shapes
    ((1, 2, 4, 8), {1: (1, 1, 1), 2: (3, 1, 1), 4: (3, 2, 2), 8: (3, 4, 4)})
    >>> average, *details = decomp.analysis(torch.ones(1, 1, 8, 8))
    >>> round(float(average), 4), max(float(h.abs().max()) for h in details) < 1e-5
    (8.0, True)

    Args:
        size: Points on each axis; an int is a square. Every axis longer than 1 must be even.
        wavelet: Orthogonal wavelet that PyWavelets knows, such as ``"haar"``, ``"db4"``, ``"sym4"``.
        channels: Channels of the signal.
        scales: Resolutions of the hierarchy; ``None`` takes every size that halving reaches.
        is_complex: Whether signals are complex.

    Raises:
        TypeError: If a size or scale is no integer.
        ValueError: If the size cannot be halved, the wavelet is unknown or not orthogonal to 1e-6
            (``dmey`` is not), or the scales do not fit.
    """

    axes = 2

    def __init__(
        self,
        size: int | Sequence[int],
        wavelet: str = "haar",
        channels: int = 3,
        scales: Sequence[int] | None = None,
        is_complex: bool = False,
    ) -> None:
        super().__init__(size, wavelet, channels, scales, is_complex)


class Wavelet3(_Wavelet):
    """Wavelet bands of signals ``(B, C, D, H, W)``, see :class:`Wavelet2`."""

    axes = 3
