"""Linearly separable hierarchical VAEs: fast iterative amortized inference."""

from separable_hvae._version import __version__
from separable_hvae.data_terms.base import DataTerm
from separable_hvae.data_terms.known_bands import KnownBands, masks_of
from separable_hvae.data_terms.measurement import Measurement
from separable_hvae.data_terms.signal import Signal
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.decompositions.fourier import FFT1Complex, FFT1Real, FFT2Complex, FFT2Real, FFT3Complex, FFT3Real
from separable_hvae.decompositions.identity import Identity
from separable_hvae.decompositions.wavelet import Wavelet1, Wavelet2, Wavelet3
from separable_hvae.distributions.likelihood import (
    DiscretizedLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    Likelihood,
)
from separable_hvae.distributions.noise import GaussianNoise, LaplaceNoise, Noise, PoissonNoise
from separable_hvae.model.hvae import HVAE
from separable_hvae.model.result import Result
from separable_hvae.nn.heads import CoefficientHead, GridHead, ScaleHead
from separable_hvae.refine import MAPRefiner, Refiner
from separable_hvae.refine.posterior_draws import posterior_draws
from separable_hvae.training.evaluation import evaluate
from separable_hvae.training.loop import FitReport, fit

__all__ = [
    "HVAE",
    "CoefficientHead",
    "DataTerm",
    "Decomposition",
    "DiscretizedLikelihood",
    "FFT1Complex",
    "FFT1Real",
    "FFT2Complex",
    "FFT2Real",
    "FFT3Complex",
    "FFT3Real",
    "FitReport",
    "GaussianLikelihood",
    "GaussianNoise",
    "GridHead",
    "Identity",
    "KnownBands",
    "LaplaceLikelihood",
    "LaplaceNoise",
    "Likelihood",
    "MAPRefiner",
    "Measurement",
    "Noise",
    "PoissonNoise",
    "Refiner",
    "Result",
    "ScaleHead",
    "Signal",
    "Wavelet1",
    "Wavelet2",
    "Wavelet3",
    "__version__",
    "evaluate",
    "fit",
    "masks_of",
    "posterior_draws",
]
