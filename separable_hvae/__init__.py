"""Linearly separable hierarchical VAEs: fast iterative amortized inference."""

from separable_hvae._version import __version__
from separable_hvae.data_terms import DataTerm, Signal
from separable_hvae.decomposition import Decomposition
from separable_hvae.evaluation import evaluate
from separable_hvae.fourier import FFT1Complex, FFT1Real, FFT2Complex, FFT2Real, FFT3Complex, FFT3Real
from separable_hvae.heads import CoefficientHead, GridHead, ScaleHead
from separable_hvae.hvae import HVAE, Result
from separable_hvae.identity import Identity
from separable_hvae.known import KnownBands, masks_of
from separable_hvae.measurement import Measurement
from separable_hvae.noise import GaussianNoise, LaplaceNoise, Noise, PoissonNoise
from separable_hvae.refine import MAPRefiner, Refiner
from separable_hvae.training import FitReport, fit
from separable_hvae.uncertainty import posterior_draws
from separable_hvae.wavelet import Wavelet1, Wavelet2, Wavelet3

__all__ = [
    "HVAE",
    "CoefficientHead",
    "DataTerm",
    "Decomposition",
    "FFT1Complex",
    "FFT1Real",
    "FFT2Complex",
    "FFT2Real",
    "FFT3Complex",
    "FFT3Real",
    "FitReport",
    "GaussianNoise",
    "GridHead",
    "Identity",
    "KnownBands",
    "LaplaceNoise",
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
