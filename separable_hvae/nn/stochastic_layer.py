r"""One stochastic layer of the top-down hierarchy.

    p(z_l | z_<l)    = N(μ_p(ĥ_l), σ_p(ĥ_l)²)              prior, eq. 2
    q(z_l | x, z_<l) = N(μ_q(ĥ_l, e, r), σ_q(ĥ_l, e, r)²)  posterior in the same order, eq. 3
    ĥ_{l+1} = r(ĥ_l + f_p(ĥ_l) + W z_l)                    injection and residual block

ĥ is the context, e the encoder's activation at the layer's scale, and r what the head would not yet predict of
the target band. Log-sigmas are bounded, ``log σ = b tanh(a / b)``, so that KL and log-densities stay finite
whatever the networks emit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae.distributions.gaussian import Gaussian
from separable_hvae.functional import resample
from separable_hvae.nn.blocks import Bottleneck, ResidualBlock, conv


@dataclass(frozen=True)
class LayerPass:
    """What one layer did.

    Attributes:
        context: Its outgoing context.
        z: Its latents.
        prior_params: What its prior network says, see :meth:`Gaussian.from_params`.
        posterior: The posterior, where it was asked for.
    """

    context: Tensor
    z: Tensor
    prior_params: Tensor
    posterior: Gaussian | None

    @property
    def prior(self) -> Gaussian:
        """The prior of the latents."""
        return Gaussian.from_params(self.prior_params)


class PriorFeatures(NamedTuple):
    """What a layer makes of its context alone.

    Attributes:
        prior_params: What its prior network says of its latents, ``(B, 2·latent_channels, *grid)``.
        context: The context and the prior's features, ``ĥ + f_p(ĥ)``: ``(B, width, *grid)``.
    """

    prior_params: Tensor
    context: Tensor


class StochasticLayer(nn.Module):
    """Prior, posterior and injection of one layer's latents ``(B, latent_channels, *grid)``.

    Args:
        grid: Points on each axis of the layer's latents.
        width: Channels of the context.
        hidden: Channels of the bottlenecks.
        latent_channels: Channels of the latents.
        gain: Factor on the last convolution of the residual branches, ``1/√L``.
        residual_channels: Channels of the picture of what is missing of a band; 0 where the posterior does not see it.
    """

    def __init__(
        self,
        grid: Sequence[int],
        width: int,
        hidden: int,
        latent_channels: int,
        *,
        gain: float,
        residual_channels: int = 0,
    ) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.latent_channels = latent_channels
        self.prior = Bottleneck(width, hidden, width + 2 * latent_channels, grid, gain=0.0)
        self.posterior = Bottleneck(2 * width, hidden, 2 * latent_channels, grid, gain=gain)
        self.residual_conv = conv(residual_channels, width, grid, gain=gain) if residual_channels else None
        self.inject = conv(latent_channels, width, grid, pointwise=True, gain=gain)
        self.block = ResidualBlock(width, hidden, grid, gain=gain)

    def infer(self, context: Tensor, activation: Tensor, residual: Tensor | None = None) -> Gaussian:
        """The posterior, eq. 3.

        Args:
            context: Context ``(B, width, *any grid)``.
            activation: The encoder's ``(B, width, *grid)``.
            residual: Picture of what is missing of the target band ``(B, residual_channels, *grid)``.
        """
        if self.residual_conv is not None and residual is not None:
            activation = activation + self.residual_conv(residual)
        return Gaussian.from_params(self.posterior(torch.cat([self.on_grid(context), activation], dim=1)))

    def prior_features(self, context: Tensor) -> PriorFeatures:
        """What the layer makes of a context ``(B, width, *any grid)`` alone, whatever its latents."""
        context = self.on_grid(context)
        out = self.prior(context)
        return PriorFeatures(out[:, : 2 * self.latent_channels], context + out[:, 2 * self.latent_channels :])

    def on_grid(self, context: Tensor) -> Tensor:
        """A context or picture ``(B, C, *any grid)`` on the layer's grid."""
        return context if context.shape[2:] == self.grid else resample(context, self.grid)

    @override
    def forward(
        self,
        features: PriorFeatures,
        z: Tensor | None = None,
        posterior: Gaussian | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> LayerPass:
        """Inject latents into what :meth:`prior_features` gives.

        ``z`` given is used as it is; otherwise it is drawn from the posterior where there is one, else from the prior.
        """
        if z is None:
            z = (posterior or Gaussian.from_params(features.prior_params)).sample(temperature, generator)
        outgoing = self.block(features.context + self.inject(z.to(features.context.dtype)))
        return LayerPass(outgoing, z, features.prior_params, posterior)
