r"""Noise of measurements: −log p(y | ŷ) up to constants, in nats.

    Gaussian    ‖y − ŷ‖² / 2v                     v = σ² + w
    Laplace     √2 ‖y − ŷ‖₁ / √v                  of the same variance
    Poisson     Σ (ŷ − y log ŷ) / γ               y = γ · Poisson(ŷ / γ)

w is the variance of what the prediction ŷ leaves out: a decoder's own σ, and bands that are not known
yet. Complex numbers count as two real ones, each with variance v.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae.checks import check_number
from separable_hvae.signals import check_finite

_FEWEST_COUNTS = 0.1


class Noise(ABC):
    """How measurements scatter around what an operator predicts; equal settings make equal instances."""

    @abstractmethod
    def misfit(self, predicted: Tensor, y: Tensor, spread: Tensor) -> Tensor:
        """``−log p(y | predicted)`` up to constants, in nats: ``(B,)``.

        Args:
            predicted: What the operator predicts, real ``(B, *y_shape)``.
            y: What was measured, of the same shape.
            spread: Variance of what the prediction leaves out, broadcastable to it.
        """

    @abstractmethod
    def variance(self, y: Tensor) -> Tensor:
        """Variance of real measurements ``(B, *y_shape)``, broadcastable to them."""

    def check(self, y: Tensor) -> None:
        """Raise a ``ValueError``, or a ``TypeError`` for their dtype, where measurements are impossible."""
        check_finite("y", y)


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """White Gaussian noise.

    Args:
        sigma: Standard deviation in the measurements' units, of real and imaginary part alike; 0 for
            measurements without noise.
    """

    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", check_number("sigma", self.sigma, "at least 0 and finite"))

    @override
    def misfit(self, predicted: Tensor, y: Tensor, spread: Tensor) -> Tensor:
        return ((predicted - y).square() / (2 * (self.sigma**2 + spread))).flatten(1).sum(1)

    @override
    def variance(self, y: Tensor) -> Tensor:
        return y.new_tensor(self.sigma**2)


@dataclass(frozen=True)
class LaplaceNoise(Noise):
    """Laplace noise, whose heavier tails forgive outliers.

    Args:
        sigma: Standard deviation (√2 times the scale parameter) in the measurements' units, of real and
            imaginary part alike.
    """

    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", check_number("sigma", self.sigma, "at least 0 and finite"))

    @override
    def misfit(self, predicted: Tensor, y: Tensor, spread: Tensor) -> Tensor:
        return (math.sqrt(2) * (predicted - y).abs() / (self.sigma**2 + spread).sqrt()).flatten(1).sum(1)

    @override
    def variance(self, y: Tensor) -> Tensor:
        return y.new_tensor(self.sigma**2)


@dataclass(frozen=True)
class PoissonNoise(Noise):
    """Counts: ``y = gain · Poisson(ŷ / gain)``, for real operators whose predictions are intensities.

    A prediction below a tenth of a count is bent upwards to stay positive. The variance that a prediction
    leaves out is not counted.

    Args:
        gain: Measured value of one count.
    """

    gain: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gain", check_number("gain", self.gain, "positive and finite"))

    @override
    def misfit(self, predicted: Tensor, y: Tensor, spread: Tensor) -> Tensor:
        rate, counts = predicted / self.gain, y / self.gain
        bent = _FEWEST_COUNTS * torch.exp(rate.clamp_max(_FEWEST_COUNTS) / _FEWEST_COUNTS - 1)
        rate = torch.where(rate > _FEWEST_COUNTS, rate, bent)
        return (rate - counts * rate.log()).flatten(1).sum(1)

    @override
    def variance(self, y: Tensor) -> Tensor:
        return self.gain * y.clamp_min(self.gain)

    @override
    def check(self, y: Tensor) -> None:
        super().check(y)
        if y.is_complex():
            raise TypeError(f"PoissonNoise is for real measurements, got y of {y.dtype}")
        if bool((y < 0).any()):
            raise ValueError(f"y must not be negative under PoissonNoise, got a least value of {float(y.min()):g}")
