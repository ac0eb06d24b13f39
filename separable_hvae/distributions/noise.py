r"""Noise of measurements: −log p(y | ŷ) up to constants, in nats.

    Gaussian    ‖y − ŷ‖² / 2v                     v = σ² + w
    Laplace     √2 ‖y − ŷ‖₁ / √v                  of the same variance
    Poisson     Σ (ŷ − y log ŷ) / γ               y = γ · Poisson(ŷ / γ)

w is the variance that the prediction ŷ leaves unexplained: a decoder's own σ², and bands that are not known yet.
Complex numbers count as two real ones, each with variance v.
"""

import math
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae._validation import check_number
from separable_hvae.distributions.gaussian import gaussian_energy, laplace_energy
from separable_hvae.functional import as_plain, check_finite

_FEWEST_COUNTS = 0.1


class Noise(ABC):
    """How measurements scatter around what an operator predicts."""

    @abstractmethod
    def misfit(self, predicted: Tensor, y: Tensor, unexplained: Tensor) -> Tensor:
        """``−log p(y | predicted)`` up to constants, in nats: ``(B,)``.

        Args:
            predicted: What the operator predicts, real ``(B, *y_shape)``.
            y: What was measured, of the same shape.
            unexplained: Variance of what the prediction leaves out, broadcastable to it.
        """

    @abstractmethod
    def variance(self, y: Tensor) -> Tensor:
        """Variance of real measurements ``(B, *y_shape)``, broadcastable to them."""

    def check(self, y: Tensor) -> None:
        """Raise a ``ValueError``, or a ``TypeError`` for their dtype, where measurements are impossible."""
        check_finite("y", y)

    def rows(self, rows: slice | Tensor) -> Self:
        """The noise of some samples, see :meth:`DataTerm.rows`: itself, unless it keeps something of each sample."""
        return self


@dataclass(frozen=True)
class WhiteNoise(Noise):
    """Noise that is independent from entry to entry, of a known standard deviation.

    Args:
        sigma: Standard deviation in the measurements' units, of real and imaginary part alike; 0 for
            measurements without noise. A number for all, or a tensor with as many axes as y, each of y's
            length or 1, where samples or entries differ.

    Raises:
        TypeError: If it is neither a number nor a real floating-point tensor.
        ValueError: If it is negative or not finite.
    """

    sigma: float | Tensor

    def __post_init__(self) -> None:
        sigma = self.sigma
        if isinstance(sigma, Tensor) and sigma.ndim:
            if not sigma.is_floating_point():
                raise TypeError(f"sigma must be a number or a real floating-point tensor, got {sigma.dtype}")
            if not bool(((sigma >= 0) & sigma.isfinite()).all()):
                low, high = map(float, sigma.aminmax())
                raise ValueError(f"sigma must be at least 0 and finite, got values from {low:g} to {high:g}")
            sigma = as_plain(sigma.detach())
        else:
            number = sigma.item() if isinstance(sigma, Tensor) else sigma
            sigma = check_number("sigma", number, "at least 0 and finite")
        object.__setattr__(self, "sigma", sigma)

    @override
    def variance(self, y: Tensor) -> Tensor:
        if not isinstance(self.sigma, Tensor):
            return y.new_full((), self.sigma**2)
        sigma = self.sigma.to(y)
        # Complex measurements have real and imaginary part on a last axis, with one level for both.
        return (sigma if sigma.ndim == y.ndim else sigma[..., None]).square()

    @override
    def check(self, y: Tensor) -> None:
        super().check(y)
        shape = tuple(self.sigma.shape) if isinstance(self.sigma, Tensor) else (1,) * y.ndim
        if len(shape) != y.ndim or any(n not in (1, m) for n, m in zip(shape, y.shape, strict=True)):
            raise ValueError(
                f"sigma must be a number or have as many axes as y, {tuple(y.shape)}, each of y's length or 1, "
                f"got {shape}"
            )

    @override
    def rows(self, rows: slice | Tensor) -> Self:
        if not isinstance(self.sigma, Tensor) or len(self.sigma) == 1:
            return self
        part = copy(self)
        object.__setattr__(part, "sigma", self.sigma[rows])
        return part


class GaussianNoise(WhiteNoise):
    """White Gaussian noise of standard deviation ``sigma``, see :class:`WhiteNoise`."""

    @override
    def misfit(self, predicted: Tensor, y: Tensor, unexplained: Tensor) -> Tensor:
        return gaussian_energy(predicted - y, self.variance(y) + unexplained)


class LaplaceNoise(WhiteNoise):
    """Laplace noise of standard deviation ``sigma``, √2 times its scale; heavier tails forgive outliers."""

    @override
    def misfit(self, predicted: Tensor, y: Tensor, unexplained: Tensor) -> Tensor:
        return laplace_energy(predicted - y, self.variance(y) + unexplained)


@dataclass(frozen=True)
class PoissonNoise(Noise):
    """Counts: ``y = gain · Poisson(ŷ / gain)``, for real operators whose predictions are intensities.

    A prediction r below a tenth of a count stands for ``0.1 exp(10 r − 1)`` counts, which stay positive. The variance
    that a prediction leaves out is not counted.

    Args:
        gain: Measured value of one count.
    """

    gain: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gain", check_number("gain", self.gain, "positive and finite"))

    @override
    def misfit(self, predicted: Tensor, y: Tensor, unexplained: Tensor) -> Tensor:
        rate, counts = predicted / self.gain, y / self.gain
        high, few = rate > _FEWEST_COUNTS, rate.clamp_max(_FEWEST_COUNTS) / _FEWEST_COUNTS - 1
        # The logarithm of what is bent is written down, not taken: the bent rate itself underflows to 0.
        log_rate = torch.where(high, rate.clamp_min(_FEWEST_COUNTS).log(), few + math.log(_FEWEST_COUNTS))
        rate = torch.where(high, rate, _FEWEST_COUNTS * few.exp())
        return (rate - counts * log_rate).flatten(1).sum(1)

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
