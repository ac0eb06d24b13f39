"""Every density of the model: latents, signals given their decoding, measurements given a signal."""

from separable_hvae.distributions.gaussian import Gaussian
from separable_hvae.distributions.noise import GaussianNoise, LaplaceNoise, Noise, PoissonNoise

__all__ = ["Gaussian", "GaussianNoise", "LaplaceNoise", "Noise", "PoissonNoise"]
