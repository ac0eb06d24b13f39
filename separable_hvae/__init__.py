"""Linearly separable hierarchical VAEs: fast iterative amortized inference.

After *Iterative Amortized Hierarchical VAE* (Penninga and van Sloun, 2026, arXiv:2601.15894). The packages follow the
paper: ``decompositions`` (eq. 5), ``distributions``, ``nn`` and ``model`` (eqs. 2 to 4), ``data_terms`` and ``refine``
(eqs. 6 and 7, Algorithm 1), ``training``; each imports only from those before it.
"""

from separable_hvae._version import __version__
from separable_hvae.data_terms import DataTerm, KnownBands, Measurement, Signal, masks_of
from separable_hvae.decompositions import (
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
from separable_hvae.distributions import (
    DiscretizedLikelihood,
    GaussianLikelihood,
    GaussianNoise,
    LaplaceLikelihood,
    LaplaceNoise,
    Likelihood,
    Noise,
    PoissonNoise,
)
from separable_hvae.model import HVAE, Result
from separable_hvae.nn import (
    ClassCondition,
    CoefficientHead,
    Condition,
    GridHead,
    ScaleHead,
    SignalCondition,
    VectorCondition,
)
from separable_hvae.refine import MAPRefiner, Refiner
from separable_hvae.refine.posterior_draws import posterior_draws
from separable_hvae.training import FitReport, evaluate, fit

__all__ = [
    "HVAE",
    "ClassCondition",
    "CoefficientHead",
    "Condition",
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
    "SignalCondition",
    "VectorCondition",
    "Wavelet1",
    "Wavelet2",
    "Wavelet3",
    "__version__",
    "evaluate",
    "fit",
    "masks_of",
    "posterior_draws",
]
