"""Small decompositions of every kind, two of them a user's own, and random signals for them."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from separable_hvae import (
    Decomposition,
    FFT1Complex,
    FFT1Real,
    FFT2Complex,
    FFT2Real,
    FFT3Complex,
    FFT3Real,
    Identity,
    Wavelet1,
    Wavelet2,
    Wavelet3,
)
from separable_hvae.functional import resample

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class RingDCT(Decomposition):
    """Orthonormal cosine transform in two dimensions; frequency (u, v) belongs to the first scale above both."""

    orthonormal = True

    def _rings(self) -> list[tuple[Tensor, Tensor]]:
        top = torch.maximum(*torch.meshgrid(*(torch.arange(n) for n in self.size), indexing="ij"))
        edges = zip((0, *self.scales[:-1]), self.scales, strict=True)
        rings = [torch.nonzero((lo <= top) & (top < hi), as_tuple=True) for lo, hi in edges]
        return [(u, v) for u, v in rings]

    def _matrices(self, like: Tensor) -> list[Tensor]:
        return [torch.from_numpy(dct(n)).to(like) for n in self.size]

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        rows, columns = self._matrices(x)
        y = rows @ x @ columns.T
        return [y[:, :, u, v] for u, v in self._rings()]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        like = next(h for h in bands if h is not None)
        y = like.new_zeros(len(like), self.channels, *self.size)
        for (u, v), h in zip(self._rings(), bands, strict=False):
            if h is not None:
                y[:, :, u, v] = h
        rows, columns = self._matrices(like)
        return rows.T @ y @ columns

    @override
    def band_shape(self, scale: int) -> tuple[int, ...] | None:
        u, _ = self._rings()[self.scales.index(scale)]
        return (self.channels, len(u)) if len(u) else None


class Pyramid(Decomposition):
    """Laplacian pyramid: an overlapping frame, every band a whole image of its scale's resolution."""

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        images = [resample(x, self.grid(s)) for s in self.scales[:-1]] + [x]
        finer = [y - resample(c, y.shape[2:]) for c, y in itertools.pairwise(images)]
        return [images[0], *finer]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        like = next(h for h in bands if h is not None)
        y = like.new_zeros(len(like), self.channels, *self.grid(self.scales[0]))
        for s, h in zip(self.scales, [*bands, *[None] * (len(self.scales) - len(bands))], strict=True):
            y = resample(y, self.grid(s))
            y = y if h is None else y + h
        return y

    @override
    def band_shape(self, scale: int) -> tuple[int, ...] | None:
        return (self.channels, *self.grid(scale))


def dct(n: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II matrix."""
    u, i = np.mgrid[:n, :n]
    scale: NDArray[np.float64] = np.sqrt(np.where(u == 0, 1, 2) / n)
    waves: NDArray[np.float64] = np.cos(math.pi * u * (2 * i + 1) / (2 * n))
    return np.multiply(scale, waves)


Make = Callable[[], Decomposition]
FINE = [1, 5, 10, 20, 40, 80, 160, 320]

FOURIER: dict[str, Make] = {
    "fft1-real": lambda: FFT1Real(16),
    "fft1-odd": lambda: FFT1Real(9, channels=2),
    "fft1-one-point": lambda: FFT1Real(1),
    "fft1-three-points": lambda: FFT1Real(3),
    "fft1-complex": lambda: FFT1Complex(10),
    "fft2-real": lambda: FFT2Real(8),
    "fft2-28": lambda: FFT2Real(28, channels=1),
    "fft2-rectangle": lambda: FFT2Real((45, 64), channels=1),
    "fft2-flat": lambda: FFT2Real((6, 1)),
    "fft2-few-scales": lambda: FFT2Real((5, 8), channels=2, scales=[1, 4, 8]),
    "fft2-coarsest-3": lambda: FFT2Real(8, channels=1, scales=[3, 8]),
    "fft2-no-band-at-3": lambda: FFT2Real(8, channels=1, scales=[1, 2, 3, 8]),
    "fft2-320": lambda: FFT2Real(320, channels=1, scales=FINE),
    "fft2-complex": lambda: FFT2Complex(8),
    "fft2-complex-rectangle": lambda: FFT2Complex((5, 6), channels=2),
    "fft3-real": lambda: FFT3Real((4, 6, 5)),
    "fft3-complex": lambda: FFT3Complex(4, channels=2),
}
WAVELETS: dict[str, Make] = {
    "db4-1": lambda: Wavelet1(16, "db4", channels=2),
    "db4-two-points": lambda: Wavelet1(2, "db4"),
    "sym4-complex": lambda: Wavelet1(24, "sym4", is_complex=True),
    "db2-sparse": lambda: Wavelet1(1024, "db2"),
    "haar-2": lambda: Wavelet2(8),
    "db2-rectangle": lambda: Wavelet2((8, 12), "db2", channels=2),
    "coif1-28": lambda: Wavelet2(28, "coif1", channels=1, scales=[1, 2, 7, 14, 28]),
    "haar-skips": lambda: Wavelet2(16, scales=[1, 16], channels=1),
    "db2-skips": lambda: Wavelet2(16, "db2", scales=[3, 5, 16], channels=1),
    "haar-one-band": lambda: Wavelet2(8, scales=[8], channels=1),
    "haar-flat": lambda: Wavelet2((8, 1)),
    "haar-320": lambda: Wavelet2(320, channels=1, scales=FINE),
    "db2-complex": lambda: Wavelet2(8, "db2", channels=2, is_complex=True),
    "db2-3": lambda: Wavelet3((4, 8, 4), "db2"),
    "haar-3-complex": lambda: Wavelet3(4, is_complex=True),
}
IDENTITIES: dict[str, Make] = {
    "identity-1": lambda: Identity((7,), channels=2),
    "identity-2": lambda: Identity(8),
    "identity-3-complex": lambda: Identity((3, 4, 5), channels=1, is_complex=True),
}
OWN: dict[str, Make] = {
    "own-dct": lambda: RingDCT((8, 6), 2, [1, 2, 4, 8]),
    "own-pyramid": lambda: Pyramid((8, 8), 2, [1, 2, 4, 8]),
}
ZOO = FOURIER | WAVELETS | IDENTITIES | OWN
# One of each kind and number of dimensions, small enough for networks.
SMALL = {
    name: ZOO[name]
    for name in (
        "fft1-real",
        "fft2-few-scales",
        "fft2-no-band-at-3",
        "fft2-complex",
        "fft3-real",
        "db4-1",
        "db2-rectangle",
        "haar-skips",
        "haar-3-complex",
        "identity-1",
        "identity-3-complex",
        "own-dct",
        "own-pyramid",
    )
}


def signal(
    decomp: Decomposition, batch: int = 2, dtype: torch.dtype = torch.float64, *, seed: int = 0, device: str = "cpu"
) -> Tensor:
    """Random signals of a real ``dtype``, complex where the decomposition is."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(2, batch, decomp.channels, *decomp.size, generator=generator, dtype=torch.float64)
    parts = parts.to(device, dtype)
    return torch.complex(parts[0], parts[1]) if decomp.is_complex else parts[0]


def random_bands(decomp: Decomposition, batch: int = 2, *, seed: int = 1) -> list[Tensor]:
    """Random bands in float64, coarse to fine."""
    generator = torch.Generator().manual_seed(seed)
    shapes = decomp.band_shapes.values()
    return [torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def error(a: Tensor, b: Tensor) -> float:
    """Relative error of ``a`` against ``b`` over all entries."""
    assert a.shape == b.shape
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-300))


def inner(a: Tensor, b: Tensor) -> float:
    """Real inner product over all entries."""
    return float((a * b.conj()).real.sum() if a.is_complex() else (a * b).sum())


ORTHONORMAL: dict[str, Make] = {
    "fft": lambda: FFT1Real(6),
    "fft-no-band-at-3": lambda: FFT2Real(4, channels=1, scales=[1, 2, 3, 4]),
    "db2-complex": lambda: Wavelet1(4, "db2", is_complex=True),
    "identity": lambda: Identity((4,), channels=2),
}


def rings(size: Sequence[int], scales: Sequence[int]) -> dict[int, NDArray[np.bool_]]:
    """The bins with ``s_prev/2 < |k|_∞ ≤ s/2`` of each scale that has any; DC lies in the first."""
    axes = np.meshgrid(*(np.fft.fftfreq(n) * n for n in size), indexing="ij")
    top = np.abs(axes).max(axis=0)
    edges = zip((-1, *scales[:-1]), scales, strict=True)
    masks = {s: (top > lo / 2 + 1e-9) & (top <= s / 2 + 1e-9) for lo, s in edges}
    return {s: m for s, m in masks.items() if m.any()}
