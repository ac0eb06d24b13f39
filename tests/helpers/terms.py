"""Data terms of every kind."""

import torch
from torch import Tensor

from separable_hvae import (
    HVAE,
    FFT2Complex,
    KnownBands,
    LaplaceNoise,
    Measurement,
    PoissonNoise,
    Wavelet2,
)
from separable_hvae.data_terms.base import DataTerm
from separable_hvae.decompositions.base import Decomposition
from tests.helpers.zoo import signal


def small(decomp: Decomposition) -> HVAE:
    torch.manual_seed(0)
    model = HVAE(decomp, layers=1, width=6, bottleneck=4, blocks=0, latent_channels=4, sigma=0.2)
    model.calibrate(signal(decomp, 20, torch.float32, seed=5))
    return model


def fourier(x: Tensor, mask: Tensor) -> Tensor:
    y: Tensor = torch.fft.fft2(x, norm="ortho") * mask
    return y


def terms() -> dict[str, tuple[HVAE, DataTerm]]:
    real, complex_ = small(Wavelet2(4, "haar", 1)), small(FFT2Complex(4))
    x, c = (signal(m.decomp, 3, torch.float32) for m in (real, complex_))
    mask = (torch.rand(3, 1, 1, 4, generator=torch.Generator().manual_seed(0)) < 0.6).float()
    bright = x.square()
    return {
        "known bands": (real, KnownBands.of(x, real.decomp, until=2)),
        "gaussian": (real, Measurement(x[..., :2], lambda x: x[..., :2], 0.1)),
        "laplace": (real, Measurement(x, lambda x: x, LaplaceNoise(0.1))),
        "poisson": (real, Measurement(bright, lambda x: x + 2, PoissonNoise(0.1))),
        "k-space": (complex_, Measurement(fourier(c, mask), fourier, 0.1, given=(mask,))),
        "square": (real, Measurement(bright, torch.square, 0.3, linear=False, start=x)),
    }
