"""Diagonal Gaussians."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from separable_hvae.functional import widen

LOG_SIGMA_BOUND = 6.0


@dataclass(frozen=True)
class Gaussian:
    """Diagonal Gaussian over one layer's latents ``(B, latent_channels, *grid)``."""

    mean: Tensor
    log_sigma: Tensor

    @classmethod
    def from_raw(cls, raw: Tensor) -> "Gaussian":
        """Read a network's output ``(B, 2·latent_channels, *grid)``, in float32 at least."""
        mean, log_sigma = widen(raw).chunk(2, dim=1)
        return cls(mean, LOG_SIGMA_BOUND * torch.tanh(log_sigma / LOG_SIGMA_BOUND))

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

    def log_prob(self, z: Tensor) -> Tensor:
        """``log N(z; μ, σ²)`` in nats, summed over everything but the batch: ``(B,)``."""
        whitened = (z - self.mean) * torch.exp(-self.log_sigma)
        return (-0.5 * whitened.square() - self.log_sigma - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def kl_elements(self, prior: "Gaussian") -> Tensor:
        """``KL(self ‖ prior)`` of each latent, in nats: the shape of the latents."""
        log_ratio = self.log_sigma - prior.log_sigma
        distance = ((self.mean - prior.mean) * torch.exp(-prior.log_sigma)).square()
        return 0.5 * (torch.exp(2 * log_ratio) + distance - 1) - log_ratio

    def kl(self, prior: "Gaussian") -> Tensor:
        """``KL(self ‖ prior)`` in nats, summed over everything but the batch: ``(B,)``."""
        return self.kl_elements(prior).flatten(1).sum(1)
