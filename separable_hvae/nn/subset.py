r"""A subset: the stochastic layers that end in one band, with the head that emits it.

    Z_h = (z_{l+1}, …, z_{l+M}),        h_s = m_s + u_s · head_s(ĥ_{l+M})

A condition adds its activation to the context where a scale begins, and may put another centre in the place of m_s.
The layers of scales that emit no band belong to the subset of the next band. A subset reads nothing
but the context that flows into it (and, for posteriors, its evidence), so a latent's gradient through
its own band costs at most one subset and one head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae.decompositions.base import Decomposition
from separable_hvae.distributions.gaussian import Gaussian, StackedGaussian
from separable_hvae.functional import widen
from separable_hvae.nn.heads import ScaleHead
from separable_hvae.nn.stochastic_layer import PriorFeatures, StochasticLayer

T = TypeVar("T")


class _cached_property(Generic[T]):  # noqa: N801
    """As that of :mod:`functools`, which takes a lock before Python 3.12: ``torch.compile`` cannot trace one."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, owner: Any, _: type) -> T:
        value = self.compute(owner)
        # Traced code computes it each time that it is asked for, and a compiler sees that it is the same.
        if not torch.compiler.is_compiling():
            owner.__dict__[self.compute.__name__] = value
        return value


class Evidence(NamedTuple):
    """What the posteriors of a subset see beside the context.

    Attributes:
        activations: The encoder's, ``(B, width, *grid)`` for each layer.
        target: The target band, standardised, ``(B, *band_shape)``; ``None`` where posteriors do not see it.
    """

    activations: list[Tensor]
    target: Tensor | None


class SubsetCondition(NamedTuple):
    """What a subset sees of a condition.

    Attributes:
        activations: Added to the context at the first layer of each of its scales, ``(B, width, *grid)``.
        centre: What its band is predicted around, ``(B, *band_shape)``; ``None`` for the mean of the training data.
    """

    activations: list[Tensor]
    centre: Tensor | None = None


@dataclass(frozen=True)
class SubsetPass:
    """One pass through a subset, or through its layers from some layer on.

    Attributes:
        context: Outgoing context ``(B, width, *grid)``.
        band: The band ``(B, *band_shape)``, in the signal's units.
        latents: Latents of the layers that ran, coarse to fine.
        prior_params: What their prior networks say, see :meth:`Gaussian.from_params`.
        posteriors: Their posteriors, ``None`` where nobody asked: the latents were given or drawn from the prior.
        contexts: The context that flowed into each layer, before its condition was added.
    """

    context: Tensor
    band: Tensor
    latents: list[Tensor]
    prior_params: list[Tensor]
    posteriors: list[Gaussian | None]
    contexts: list[Tensor]

    @_cached_property
    def priors(self) -> list[Gaussian]:
        """The prior of each latent that ran."""
        return [Gaussian.from_params(params) for params in self.prior_params]

    @_cached_property
    def stacked_priors(self) -> list[StackedGaussian]:
        """The same, with one entry for each run of layers with one grid."""
        return [Gaussian.stack([self.prior_params[i] for i in run]) for run in self._runs()]

    @_cached_property
    def whitened(self) -> list[Tensor]:
        """``(z − μ_p) / σ_p``, ``(B, layers, latent_channels, *grid)`` for each run of layers with one grid."""
        stacks = (torch.stack([self.latents[i] for i in run], dim=1) for run in self._runs())
        return [prior.whiten(z) for prior, z in zip(self.stacked_priors, stacks, strict=True)]

    def log_prior(self) -> Tensor:
        """``log p(z)`` of each latent that ran, in nats: ``(B, layers)``."""
        pairs = zip(self.stacked_priors, self.whitened, strict=True)
        return torch.cat([prior.log_prob_of_whitened(whitened) for prior, whitened in pairs], dim=1)

    def _runs(self) -> list[list[int]]:
        grids = groupby(range(len(self.latents)), key=lambda i: tuple(self.latents[i].shape[1:]))
        return [list(run) for _, run in grids]


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
        head: type[ScaleHead],
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
        self._begins = {self.scales.index(s): place for place, s in enumerate(layers)}
        self.band_input = band_input
        channels, *_ = decomp.picture_shape(self.scale)
        stack = [
            StochasticLayer(
                decomp.grid(s),
                width,
                bottleneck,
                latent_channels,
                gain=gain,
                residual_channels=channels if band_input and s == self.scale else 0,
            )
            for s in self.scales
        ]
        self.layers = cast(Sequence[StochasticLayer], nn.ModuleList(stack))
        self.head = head(decomp, self.scale, width=width, bottleneck=bottleneck, blocks=blocks, gain=gain)
        self.register_buffer("centre", widen(torch.zeros(decomp.band_shapes[self.scale])))
        self.register_buffer("unit", widen(torch.ones(())))

    def evidence(
        self, activations: dict[int, Tensor], target: Tensor, condition: SubsetCondition | None = None
    ) -> Evidence:
        """What the posteriors see of the encoder's activations by scale and of the target band."""
        seen = (target - self._centre(condition)) / self.unit if self.band_input else None
        return Evidence([activations[s] for s in self.scales], seen)

    def posterior(
        self, m: int, context: Tensor, evidence: Evidence, condition: SubsetCondition | None = None
    ) -> Gaussian:
        """The posterior of layer ``m`` under the context that flows into it."""
        layer, residual = self.layers[m], None
        context = self._conditioned(m, context, condition)
        if evidence.target is not None and self.scales[m] == self.scale:
            predicted = self._checked(self.head.read(layer.on_grid(context)))
            picture = self.head.decomp.to_grid(self.scale, evidence.target - predicted)
            residual = layer.on_grid(picture.to(context.dtype))
        return layer.infer(context, evidence.activations[m], residual)

    def prior_features(self, m: int, context: Tensor, condition: SubsetCondition | None = None) -> PriorFeatures:
        """What layer ``m`` makes of the context that flows into it, whatever its latents."""
        return self.layers[m].prior_features(self._conditioned(m, context, condition))

    def _conditioned(self, m: int, context: Tensor, condition: SubsetCondition | None) -> Tensor:
        """The context of layer ``m`` with the condition of the scale that begins there."""
        if condition is None or m not in self._begins:
            return context
        return self.layers[m].on_grid(context) + condition.activations[self._begins[m]].to(context.dtype)

    def _centre(self, condition: SubsetCondition | None) -> Tensor:
        return self.centre if condition is None or condition.centre is None else condition.centre

    @override
    def forward(
        self,
        context: Tensor,
        latents: Sequence[Tensor | None],
        evidence: Evidence | None = None,
        condition: SubsetCondition | None = None,
        *,
        start: int = 0,
        features: PriorFeatures | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        posteriors: bool = False,
    ) -> SubsetPass:
        """Run the layers from ``start`` on and the head.

        Args:
            context: The context that flows into layer ``start``.
            latents: One entry for each layer from ``start`` on; ``None`` means drawn from the
                posterior where there is evidence, else from the prior.
            evidence: What the posteriors of the whole subset see.
            condition: What the subset sees of a condition.
            start: First layer that runs.
            features: What :meth:`prior_features` gives of this layer, where that is known already.
            temperature: Factor on the standard deviation of what is drawn; 0 gives means.
            generator: Random numbers for what is drawn.
            posteriors: Whether to ask for the posteriors of given latents too.
        """
        zs, params, found, contexts = [], [], [], []
        for i, z in enumerate(latents, start):
            contexts.append(context)
            wanted = evidence if posteriors or z is None else None
            posterior = None if wanted is None else self.posterior(i, context, wanted, condition)
            features = features or self.prior_features(i, context, condition)
            step = self.layers[i](features, z, posterior, temperature=temperature, generator=generator)
            context, features = step.context, None
            zs.append(step.z)
            params.append(step.prior_params)
            found.append(step.posterior)
        band = self._centre(condition) + self.unit * self._checked(self.head(context))
        return SubsetPass(context, band, zs, params, found, contexts)

    def _checked(self, band: Tensor) -> Tensor:
        """What a head gives, which may be a user's, in float32 at least."""
        if band.shape[1:] != self.centre.shape:
            raise ValueError(
                f"{type(self.head).__name__} must give (B, {', '.join(map(str, self.centre.shape))}) "
                f"at scale {self.scale}, got {tuple(band.shape)}"
            )
        return band if band.dtype == torch.float32 else widen(band)
