r"""Diagonal Gaussians, of one layer's latents and of several layers' side by side, and the energies they share.

Energies, in nats, of the two densities that latents, likelihoods, losses and noise are made of:

    Gaussian    E = Σ e² / 2v               log Z = Σ log σ + n/2 · log 2π
    Laplace     E = √2 Σ |e| / √v           log Z = Σ log σ + n/2 · log 2         of variance v = σ²

−log p(e) = E + log Z for an error e of n numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from separable_hvae.functional import HALF

LOG_SIGMA_BOUND = 6.0


@dataclass(frozen=True)
class Gaussian:
    """Diagonal Gaussian over one layer's latents ``(B, latent_channels, *grid)``.

    >>> standard = Gaussian(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    >>> standard.log_prob(torch.ones(1, 1, 2))
    tensor([-2.8379])
    """

    mean: Tensor
    log_sigma: Tensor

    event_axis: ClassVar[int] = 1
    """First axis that belongs to one density; the axes before it number densities."""

    @classmethod
    def from_params(cls, params: Tensor) -> Self:
        """Read a network's output, means and unbounded log-deviations, in float32 at least.

        Args:
            params: ``(B, 2·latent_channels, *grid)``. The bound is ``log σ = b tanh(log_sigma / b)``.
        """
        mean, log_sigma = (params.float() if params.dtype in HALF else params).chunk(2, dim=cls.event_axis)
        return cls(mean, LOG_SIGMA_BOUND * torch.tanh(log_sigma / LOG_SIGMA_BOUND))

    @staticmethod
    def stack(params: Sequence[Tensor]) -> "StackedGaussian":
        """The Gaussians of a few layers with one grid side by side, given what :meth:`from_params` takes of each."""
        return StackedGaussian.from_params(torch.stack(list(params), dim=1))

    @property
    def sigma(self) -> Tensor:
        """Standard deviation."""
        return self.log_sigma.exp()

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``μ + temperature · σ · ε``; a temperature of 0 gives the mean and draws nothing."""
        if temperature == 0:
            return self.mean
        device = self.mean.device if generator is None else generator.device
        # torch.compile takes no generator, not even None, where the batch is of any size.
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        noise: Tensor = torch.randn(self.mean.shape, device=device, dtype=self.mean.dtype, **source)
        return self.mean + temperature * self.sigma * noise.to(self.mean.device)

    def whiten(self, z: Tensor) -> Tensor:
        """``(z − μ) / σ``, of the shape of the latents."""
        return (z - self.mean) * torch.exp(-self.log_sigma)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log N(z; μ, σ²)`` in nats, summed over everything but the batch: ``(B,)``."""
        return self.log_prob_of_whitened(self.whiten(z))

    def log_prob_of_whitened(self, whitened: Tensor) -> Tensor:
        """The same of latents in units of the Gaussian, see :meth:`whiten`."""
        axis = self.event_axis
        log_sigma = self.log_sigma.flatten(axis)
        log_partition = gaussian_log_partition(log_sigma.sum(axis), log_sigma.shape[axis])
        return -(gaussian_energy(whitened, axis=axis) + log_partition)

    def kl_elements(self, prior: "Gaussian") -> Tensor:
        """``KL(self ‖ prior)`` of each latent, in nats: the shape of the latents."""
        log_ratio = self.log_sigma - prior.log_sigma
        distance = ((self.mean - prior.mean) * torch.exp(-prior.log_sigma)).square()
        return 0.5 * (torch.exp(2 * log_ratio) + distance - 1) - log_ratio

    def kl(self, prior: "Gaussian") -> Tensor:
        """``KL(self ‖ prior)`` in nats, summed over everything but the batch: ``(B,)``."""
        return self.kl_elements(prior).flatten(self.event_axis).sum(self.event_axis)


@dataclass(frozen=True)
class StackedGaussian(Gaussian):
    """The Gaussians of a few layers with one grid: ``(B, layers, latent_channels, *grid)``.

    A few large operations cost less than many small ones. What :class:`Gaussian` sums to ``(B,)`` is summed to
    ``(B, layers)``.
    """

    event_axis: ClassVar[int] = 2


def gaussian_energy(error: Tensor, variance: Tensor | None = None, *, axis: int = 1) -> Tensor:
    """``Σ e² / 2v``, summed over the axes from ``axis`` on: by default ``(B,)``.

    Args:
        error: Real errors ``(B, ...)``.
        variance: Their variance, broadcastable to them; ``None`` for errors in units of their deviation.
        axis: First axis to sum over.
    """
    return _summed(error.square(), variance, axis) / 2


def laplace_energy(error: Tensor, variance: Tensor, *, axis: int = 1) -> Tensor:
    """``√2 Σ |e| / √v``, of the variance ``v``; see :func:`gaussian_energy`."""
    return math.sqrt(2) * _summed(error.abs(), variance.sqrt(), axis)


def gaussian_log_partition(log_sigma: Tensor, count: int) -> Tensor:
    """``Σ log σ + n/2 · log 2π``, given the sum of ``log σ`` over ``count`` numbers."""
    return log_sigma + 0.5 * math.log(2 * math.pi) * count


def laplace_log_partition(log_sigma: Tensor, count: int) -> Tensor:
    """``Σ log σ + n/2 · log 2``, given the sum of ``log σ`` over ``count`` numbers."""
    return log_sigma + 0.5 * math.log(2) * count


def _summed(values: Tensor, unit: Tensor | None, axis: int) -> Tensor:
    """``Σ values / unit``, dividing once where there is one unit for all."""
    if unit is not None and unit.ndim:
        values, unit = values / unit, None
    total = values.flatten(axis).sum(axis)
    return total if unit is None else total / unit
