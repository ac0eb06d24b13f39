r"""Inverse problems on images: what is measured, and a data term that says so.

    denoise         y = x + n, of a given deviation or of the images' own
    known bands     the bands up to half the size (up to scale 8 of larger images), exact
    blur            circular Gaussian blur
    super-resolve   averages over blocks: of 2×2 pixels, of 4×4 from 32 pixels on
    inpaint         a random half of the pixels
    k-space         Cartesian columns, the central ones and random others, as fastMRI masks them, of one coil
                    or four

Noise is Gaussian, its level known. K-space is for complex images only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from separable_hvae import HVAE, DataTerm, Decomposition, KnownBands, Measurement
from separable_hvae.data_terms.measurement import Fill
from separable_hvae.functional import pack

Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One problem with its measurements.

    Attributes:
        name: What to call it in tables.
        measurement: What was measured, for any method.
        known: Where bands themselves are known, the same as a data term on them.
        guidance: Weight of the data for a refiner; more than 1 where what was measured is exact.
    """

    name: str
    measurement: Measurement
    known: KnownBands | None = None
    guidance: float = 1.0

    def term(self, model: HVAE) -> DataTerm:
        """What a refiner is to use."""
        return self.known if self.known is not None and len(model.subsets) > 1 else self.measurement

    def rows(self, rows: slice) -> "Case":
        """The same of some images."""
        known = None if self.known is None else self.known.rows(rows)
        return replace(self, measurement=self.measurement.rows(rows), known=known)

    def adjoint(self, like: Tensor) -> Tensor:
        """``A* y``, what zero-filling gives where ``A A*`` is a projection."""
        m = self.measurement
        return m.operator.transposed(m.y, like, m.given)


def cases(x: Tensor, decomp: Decomposition, seed: int = 0) -> list[Case]:
    """Every problem that is one for such images, measured on ``x``.

    Args:
        x: Images ``(B, C, H, W)``, with values around one.
        decomp: The bands that "known bands" knows.
        seed: Of noise and masks.

    Raises:
        ValueError: If the decomposition has no coarse bands.
    """
    random = torch.Generator().manual_seed(seed)
    side = x.shape[-1]

    def measured(name: str, sigma: float, operator: Operator, *given: Tensor, seen: Tensor | float = 1.0) -> Case:
        y = operator(x, *given)
        y = y + sigma * seen * torch.randn(y.shape, generator=random, dtype=y.dtype) * math.sqrt(1 + y.is_complex())
        # Wavelet bands mix k-space samples, so their deviations guess the missing ones badly.
        fill: Fill = "mean" if name.startswith("k-space") else "bands"
        return Case(name, Measurement(y, operator, sigma, given=given, fill=fill))

    coarse = [s for s in decomp.band_scales if s <= (side // 2 if side < 32 else 8)]
    if not coarse:
        raise ValueError(f"decomp must have coarse bands that can be known, got {decomp.band_scales} for {side} pixels")
    until = coarse[-1]
    count = decomp.band_index(until) + 1

    def lowpass(x: Tensor) -> Tensor:
        return decomp.synthesis(decomp.analysis(x)[:count])

    found = [
        measured("denoise, σ = 0.3", 0.3, lambda x: x),
        Case(
            f"deblur, bands to {until} known",
            Measurement(lowpass(x), lowpass, 0.0),
            KnownBands.of(x, decomp, until=until),
            guidance=10.0,
        ),
        measured("Gaussian blur", 0.05, gaussian_blur),
    ]
    block = 2 if side < 32 else 4
    found.append(measured(f"{block}×{block} super-resolution", 0.02, lambda x: block_average(x, block)))
    pixels = (torch.rand(len(x), 1, *x.shape[2:], generator=random) < 0.5).to(x.real.dtype)
    found.append(measured("inpaint half the pixels", 0.02, lambda x, mask: x * mask, pixels, seen=pixels))
    if x.is_complex():
        for factor in (4, 8):
            columns = cartesian_mask(len(x), side, factor, random).to(x.real.dtype)
            found.append(measured(f"k-space {factor}×, 1 coil", 0.05, sampled, columns, seen=columns))
        columns = cartesian_mask(len(x), side, 8, random).to(x.real.dtype)
        coils = sensitivities(side).to(x.dtype).expand(len(x), -1, -1, -1)
        found.append(measured("k-space 8×, 4 coils", 0.05, multicoil, columns, coils, seen=columns))
    found.append(measured("denoise, σ = 1 of standardised images", float(pack(x).std()), lambda x: x))
    return found


def gaussian_blur(x: Tensor, sigma: float = 1.0) -> Tensor:
    """Blur by a Gaussian of ``sigma`` pixels, with circular borders."""
    reach = torch.arange(-2, 3, dtype=x.real.dtype, device=x.device)
    kernel = torch.exp(-(reach**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    for axis in (-2, -1):
        x = sum(float(w) * x.roll(int(n), axis) for n, w in zip(reach, kernel, strict=True))  # type: ignore[assignment]
    return x


def block_average(x: Tensor, block: int) -> Tensor:
    """Average over blocks of ``block × block`` pixels."""
    n = x.shape[-1] // block
    return x.unflatten(-2, (n, block)).unflatten(-1, (n, block)).mean((-3, -1))


def to_kspace(x: Tensor) -> Tensor:
    """Orthonormal Fourier transform with frequency zero in the centre."""
    return torch.fft.fftshift(torch.fft.fft2(x, norm="ortho"), dim=(-2, -1))


def sampled(x: Tensor, mask: Tensor) -> Tensor:
    """The columns of k-space that a mask ``(B, 1, 1, W)`` keeps."""
    return to_kspace(x) * mask


def multicoil(x: Tensor, mask: Tensor, coils: Tensor) -> Tensor:
    """The same for each of several coils, whose sensitivities are ``(B, coils, H, W)``."""
    return to_kspace(x * coils) * mask


def cartesian_mask(n: int, width: int, factor: int, random: torch.Generator) -> Tensor:
    """FastMRI's masks ``(n, 1, 1, width)``: the central 0.32/factor of all columns, and random ones to 1/factor."""
    centre = max(1, round(width * 0.32 / factor))
    first = (width - centre + 1) // 2
    score = torch.rand(n, width, generator=random)
    score[:, first : first + centre] = 2.0
    kept = score.argsort(1, descending=True)[:, : round(width / factor)]
    return torch.zeros(n, width).scatter_(1, kept, 1.0)[:, None, None]


def sensitivities(side: int, coils: int = 4) -> Tensor:
    """Smooth complex sensitivities ``(1, coils, side, side)``, whose squares add up to one in every pixel."""
    axis = torch.linspace(-1, 1, side)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    angles = [2 * math.pi * k / coils for k in range(coils)]
    parts = []
    for a in angles:
        distance = (u - math.cos(a)) ** 2 + (v - math.sin(a)) ** 2
        parts.append(torch.polar(torch.exp(-distance / 2), u * math.sin(a) - v * math.cos(a)))
    maps = torch.stack(parts)[None]
    return maps / maps.abs().square().sum(1, keepdim=True).sqrt()
