r"""A subset: the stochastic layers that end in one band, with the head that emits it.

    Z_h = (z_{l+1}, …, z_{l+M}),        h_s = m_s + u_s · head_s(ĥ_{l+M})

The layers of scales that emit no band belong to the subset of the next band. A subset reads nothing
but the context that flows into it (and, for posteriors, its evidence), so a latent's gradient through
its own band costs at most one subset and one head.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae._cached import cached_property
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.distributions.gaussian import Gaussian
from separable_hvae.functional import resample, widen
from separable_hvae.nn.heads import ScaleHead
from separable_hvae.nn.stochastic_layer import Entry, StochasticLayer


class Evidence(NamedTuple):
    """What the posteriors of a subset see beside the context.

    Attributes:
        activations: The encoder's, ``(B, width, *grid)`` for each layer.
        target: The target band in its unit, ``(B, *band_shape)``; ``None`` where posteriors do not see it.
    """

    activations: list[Tensor]
    target: Tensor | None


@dataclass(frozen=True)
class SubsetPass:
    """One pass through a subset, or through its layers from some layer on.

    Attributes:
        context: Outgoing context ``(B, width, *grid)``.
        band: The band ``(B, *band_shape)``, in the signal's units.
        latents: Latents of the layers that ran, coarse to fine.
        raws: What their prior networks say, see :meth:`Gaussian.from_raw`.
        posteriors: Their posteriors, ``None`` where the latents were given or drawn from the prior.
        contexts: The context that flowed into each layer.
    """

    context: Tensor
    band: Tensor
    latents: list[Tensor]
    raws: list[Tensor]
    posteriors: list[Gaussian | None]
    contexts: list[Tensor]

    @cached_property
    def priors(self) -> list[Gaussian]:
        """The prior of each latent that ran."""
        return [Gaussian.from_raw(raw) for raw in self.raws]

    @cached_property
    def surprises(self) -> "list[Surprise]":
        """How far latents lie from their priors: one entry for each run of layers with one grid."""
        grids = groupby(range(len(self.latents)), key=lambda i: tuple(self.latents[i].shape[1:]))
        return [Surprise.of(self.raws, self.latents, list(same)) for _, same in grids]

    def log_prior(self) -> Tensor:
        """``log p(z)`` of each latent that ran, in nats: ``(B, layers)``."""
        return torch.cat([surprise.log_prior() for surprise in self.surprises], dim=1)


class Surprise(NamedTuple):
    """The latents of a few layers with one grid, in units of their priors.

    Layers are put side by side, since a few large operations cost less than many small ones.

    Attributes:
        whitened: ``(z − μ_p) / σ_p``, ``(B, layers, entries)``.
        log_sigma: ``log σ_p``, of the same shape.
    """

    whitened: Tensor
    log_sigma: Tensor

    @classmethod
    def of(cls, raws: Sequence[Tensor], latents: Sequence[Tensor], layers: Sequence[int]) -> "Surprise":
        """Whiten the latents of these layers."""
        prior = Gaussian.from_raw(torch.stack([raws[i] for i in layers], dim=2))
        z = torch.stack([latents[i] for i in layers], dim=2)
        whitened = (z - prior.mean) * torch.exp(-prior.log_sigma)
        return cls(*(t.transpose(1, 2).flatten(2) for t in (whitened, prior.log_sigma)))

    def log_prior(self) -> Tensor:
        """``log p(z)`` of each layer, in nats: ``(B, layers)``."""
        constant = 0.5 * math.log(2 * math.pi) * self.whitened.shape[2]
        return -(0.5 * self.whitened.square() + self.log_sigma).sum(2) - constant


class Subset(nn.Module):
    """The layers of one band's scales, coarse to fine, and the head of the last one.

    Args:
        decomp: The bound decomposition.
        layers: Number of layers of each scale of the subset, ``{scale: layers}``; the last emits.
        head: Builds the head, see :class:`ScaleHead`.
        width: Channels of the context.
        bottleneck: Channels inside blocks.
        latent_channels: Channels of each latent.
        blocks: Residual blocks of the head.
        band_input: Whether the posteriors of the last scale see what is missing of the target band.
        gain: ``1/√L``.
    """

    centre: Tensor
    unit: Tensor
    layers: Sequence[StochasticLayer]

    def __init__(
        self,
        decomp: Decomposition,
        layers: dict[int, int],
        head: Callable[..., ScaleHead],
        *,
        width: int,
        bottleneck: int,
        latent_channels: int,
        blocks: int,
        band_input: bool,
        gain: float,
    ) -> None:
        super().__init__()
        self.scales = tuple(s for s, count in layers.items() for _ in range(count))
        self.scale = max(layers)
        self.band_input = band_input
        channels, *_ = decomp.picture_shape(self.scale)
        stack = [
            StochasticLayer(
                decomp.grid(s),
                width,
                bottleneck,
                latent_channels,
                gain=gain,
                pictures=channels if band_input and s == self.scale else 0,
            )
            for s in self.scales
        ]
        self.layers = cast(Sequence[StochasticLayer], nn.ModuleList(stack))
        self.head = head(decomp, self.scale, width=width, bottleneck=bottleneck, blocks=blocks, gain=gain)
        self.register_buffer("centre", torch.zeros(decomp.band_shapes[self.scale]))
        self.register_buffer("unit", torch.ones(()))

    def evidence(self, activations: dict[int, Tensor], target: Tensor) -> Evidence:
        """What the posteriors see of the encoder's activations by scale and of the target band."""
        seen = (target - self.centre) / self.unit if self.band_input else None
        return Evidence([activations[s] for s in self.scales], seen)

    def posterior(self, m: int, context: Tensor, evidence: Evidence) -> Gaussian:
        """The posterior of layer ``m`` under the context that flows into it."""
        layer, missing = self.layers[m], None
        if evidence.target is not None and self.scales[m] == self.scale:
            said = self._checked(self.head.read(resample(context, layer.grid)))
            picture = self.head.decomp.to_grid(self.scale, evidence.target - said)
            missing = resample(picture.to(context.dtype), layer.grid)
        return layer.guess(context, evidence.activations[m], missing)

    @override
    def forward(
        self,
        context: Tensor,
        latents: Sequence[Tensor | None],
        evidence: Evidence | None = None,
        *,
        start: int = 0,
        entry: Entry | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> SubsetPass:
        """Run the layers from ``start`` on and the head.

        Args:
            context: The context that flows into layer ``start``.
            latents: One entry for each layer from ``start`` on; ``None`` means drawn from the
                posterior where there is evidence, else from the prior.
            evidence: What the posteriors of the whole subset see.
            start: First layer that runs.
            entry: What this layer makes of its context, where that is known already.
            temperature: Factor on the standard deviation of what is drawn; 0 gives means.
            generator: Random numbers for what is drawn.
        """
        zs, raws, posteriors, contexts = [], [], [], []
        for i, z in enumerate(latents, start):
            contexts.append(context)
            posterior = self.posterior(i, context, evidence) if z is None and evidence is not None else None
            step = self.layers[i](context, z, posterior, entry=entry, temperature=temperature, generator=generator)
            context, entry = step.context, None
            zs.append(step.z)
            raws.append(step.raw)
            posteriors.append(step.posterior)
        band = self.centre + self.unit * self._checked(self.head(context))
        return SubsetPass(context, band, zs, raws, posteriors, contexts)

    def _checked(self, band: Tensor) -> Tensor:
        """What a head gives, which may be a user's, in float32 at least."""
        if band.shape[1:] != self.centre.shape:
            raise ValueError(
                f"{type(self.head).__name__} must give (B, {', '.join(map(str, self.centre.shape))}) "
                f"at scale {self.scale}, got {tuple(band.shape)}"
            )
        return widen(band)
