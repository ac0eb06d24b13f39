"""Linearly separable hierarchical VAEs: fast iterative amortized inference."""

from separable_hvae._version import __version__
from separable_hvae.decomposition import Decomposition, Identity
from separable_hvae.evaluation import evaluate
from separable_hvae.fourier import FFT1Complex, FFT1Real, FFT2Complex, FFT2Real, FFT3Complex, FFT3Real
from separable_hvae.heads import CoefficientHead, GridHead, ScaleHead
from separable_hvae.hvae import HVAE, Result
from separable_hvae.refine import MAPRefiner, Refiner
from separable_hvae.training import FitReport, fit
from separable_hvae.wavelet import Wavelet1, Wavelet2, Wavelet3

__all__ = [
    "HVAE",
    "CoefficientHead",
    "Decomposition",
    "FFT1Complex",
    "FFT1Real",
    "FFT2Complex",
    "FFT2Real",
    "FFT3Complex",
    "FFT3Real",
    "FitReport",
    "GridHead",
    "Identity",
    "MAPRefiner",
    "Refiner",
    "Result",
    "ScaleHead",
    "Wavelet1",
    "Wavelet2",
    "Wavelet3",
    "__version__",
    "evaluate",
    "fit",
]
