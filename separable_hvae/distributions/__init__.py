"""Every density of the model: latents, signals given their decoding, measurements given a signal."""

from separable_hvae.distributions.gaussian import Gaussian, StackedGaussian
from separable_hvae.distributions.likelihood import (
    LIKELIHOODS,
    DiscretizedLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    Likelihood,
    Prediction,
    likelihood_of,
    warn_of_sigma,
)
from separable_hvae.distributions.noise import GaussianNoise, LaplaceNoise, Noise, PoissonNoise

__all__ = [
    "LIKELIHOODS",
    "DiscretizedLikelihood",
    "Gaussian",
    "GaussianLikelihood",
    "GaussianNoise",
    "LaplaceLikelihood",
    "LaplaceNoise",
    "Likelihood",
    "Noise",
    "PoissonNoise",
    "Prediction",
    "StackedGaussian",
    "likelihood_of",
    "warn_of_sigma",
]
