"""Decompositions: a signal as a sum of linear pieces, ``x = Σ_s B_s h_s``."""

from separable_hvae.decompositions.base import Decomposition
from separable_hvae.decompositions.fourier import FFT1Complex, FFT1Real, FFT2Complex, FFT2Real, FFT3Complex, FFT3Real
from separable_hvae.decompositions.identity import Identity
from separable_hvae.decompositions.laws import LawReport
from separable_hvae.decompositions.wavelet import Wavelet1, Wavelet2, Wavelet3

_ALL: tuple[type[Decomposition], ...] = (
    FFT1Real,
    FFT2Real,
    FFT3Real,
    FFT1Complex,
    FFT2Complex,
    FFT3Complex,
    Wavelet1,
    Wavelet2,
    Wavelet3,
    Identity,
)
DECOMPOSITIONS: dict[str, type[Decomposition]] = {kind.__name__: kind for kind in _ALL}
"""The library's own decompositions, by the name that a saved configuration calls them."""

__all__ = [
    "DECOMPOSITIONS",
    "Decomposition",
    "FFT1Complex",
    "FFT1Real",
    "FFT2Complex",
    "FFT2Real",
    "FFT3Complex",
    "FFT3Real",
    "Identity",
    "LawReport",
    "Wavelet1",
    "Wavelet2",
    "Wavelet3",
]
