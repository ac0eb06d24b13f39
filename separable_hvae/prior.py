r"""What a model knows of each band before any network: its mean and deviation over the training data.

    x ~ N(m, C),        m = Σ_s B_s m_s,        C = Σ_s u_s² B_s B_sᵀ

A Gaussian that is diagonal in the bands. It fills in what was not measured for the encoder's first look.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from separable_hvae.hvae import HVAE
from separable_hvae.signals import full_precision


def mean_bands(model: HVAE) -> list[Tensor]:
    """The mean of each band, ``(1, *band_shape)``; zeros before the model is calibrated."""
    return [subset.centre.detach()[None].to(model.precision) for subset in model.subsets]


def deviations(model: HVAE) -> list[float]:
    """The standard deviation of each band; one before the model is calibrated."""
    return [float(subset.unit) for subset in model.subsets]


def covariance(model: HVAE, x: Tensor) -> Tensor:
    """``C x`` for signals ``(B, C, *size)``; for bands that are not orthonormal, as :func:`white`."""
    if not model.decomp.orthonormal:
        return white(model, x)
    with full_precision(x.device):
        bands = model.decomp.analysis(x)
        return model.decomp.synthesis([unit**2 * band for unit, band in zip(deviations(model), bands, strict=True)])


def white(model: HVAE, x: Tensor) -> Tensor:
    """The same with one deviation for every coefficient, whose square is their mean one."""
    sizes = [subset.centre.numel() for subset in model.subsets]
    energy = sum(n * unit**2 for n, unit in zip(sizes, deviations(model), strict=True))
    return x * (energy / sum(sizes))


def draw(model: HVAE, unknown: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """One draw of every band around its mean, ``(1, *band_shape)``, zero for bands that are not ``unknown``."""
    bands = []
    for i, (subset, unit) in enumerate(zip(model.subsets, deviations(model), strict=True)):
        shape, device = (1, *subset.centre.shape), generator.device
        noise = torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
        bands.append((unit * noise if i in unknown else 0 * noise).to(subset.centre.device, model.precision))
    return bands


def standard(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers like a tensor's, of real and imaginary part alike."""
    real = like.real if like.is_complex() else like
    parts = [
        torch.randn(like.shape, generator=generator, device=generator.device, dtype=real.dtype).to(like.device)
        for _ in range(1 + like.is_complex())
    ]
    return torch.complex(*parts) if like.is_complex() else parts[0]
