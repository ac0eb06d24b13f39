from separable_hvae.decomposition import Decomposition, Identity
from separable_hvae.fourier import FFT1Complex, FFT1Real, FFT2Complex, FFT2Real, FFT3Complex, FFT3Real
from separable_hvae.wavelet import Wavelet1, Wavelet2, Wavelet3
from separable_hvae.heads import CoefficientHead, GridHead, ScaleHead
from separable_hvae.hvae import HVAE, Result
