r"""What a model knows of each band before any network: its mean and deviation over the training data.

    x ~ N(m, C),        m = Σ_s B_s m_s,        C = Σ_s u_s² B_s B_sᵀ

A Gaussian that is diagonal in the bands. It fills in what was not measured for the encoder's first look.
"""

import torch
from torch import Tensor

from separable_hvae.functional import pack
from separable_hvae.model.hvae import HVAE

_DRAWS = 16


def mean_bands(model: HVAE) -> list[Tensor]:
    """The mean of each band, ``(1, *band_shape)``; zeros before the model is calibrated."""
    return [subset.centre.detach()[None].to(model.real_dtype) for subset in model.subsets]


def variances(model: HVAE) -> Tensor:
    """The variance of each band, ``(bands,)``; one before the model is calibrated."""
    return torch.stack([subset.unit.detach() for subset in model.subsets]).to(model.real_dtype).square()


def covariance(model: HVAE, x: Tensor) -> Tensor:
    """``C x`` for signals ``(B, C, *size)``; for bands that are not orthonormal, as :func:`white`."""
    if not model.decomp.orthonormal:
        return white(model, x)
    bands = model.decomp.analysis(x)
    return model.decomp.synthesis([v * band for v, band in zip(variances(model), bands, strict=True)])


def white(model: HVAE, x: Tensor) -> Tensor:
    """The same with one deviation for every entry, whose square is the mean one: ``tr C / dim x``."""
    if model.decomp.orthonormal:
        sizes = [subset.centre.numel() for subset in model.subsets]
        variance = torch.stack([n * v for n, v in zip(sizes, variances(model), strict=True)]).sum() / sum(sizes)
    else:
        variance = pack(model.decomp.synthesis(draws(model, _DRAWS))).square().mean()
    return x * variance


def draws(model: HVAE, n: int) -> list[Tensor]:
    """The same draws of every band around its mean each time, ``(n, *band_shape)``."""
    generator = torch.Generator().manual_seed(0)
    shapes = [subset.centre.shape for subset in model.subsets]
    noise = [[torch.randn(s, generator=generator, device="cpu", dtype=torch.float64) for s in shapes] for _ in range(n)]
    bands = [torch.stack(band).to(model.device, model.real_dtype) for band in zip(*noise, strict=True)]
    return [v.sqrt() * band for v, band in zip(variances(model), bands, strict=True)]


def standard(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers like a tensor's, of real and imaginary part alike."""
    real = like.real if like.is_complex() else like
    parts = [
        torch.randn(like.shape, generator=generator, device=generator.device, dtype=real.dtype).to(like.device)
        for _ in range(1 + like.is_complex())
    ]
    return torch.complex(*parts) if like.is_complex() else parts[0]
