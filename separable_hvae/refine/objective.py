r"""What refinement minimises: the negative log of the joint density, sample by sample.

    FullObjective      J(z) = −Σ_l log N(z_l; μ_p, σ_p) + Σ_s β_s d(h_s(z), t_s)           the full MAP objective
    SubsetObjective    −Σ_{m ≥ start} log N(z_m; μ_p, σ_p) + β_s d(h_s, t_s)               one subset (eq. 6)

in nats, ``(B,)``. Eq. 7 of the paper prints the first term without its minus; its text, and MAP, need it. The
data term d is one of :mod:`separable_hvae.data_terms.base`.

An objective is a pure function of latents. What else it depends on is its settings, which are the same for every
batch, and its inputs, tensors that stay fixed while the latents move.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae.data_terms.base import Misfit
from separable_hvae.model.hvae import HVAE
from separable_hvae.nn.stochastic_layer import PriorFeatures
from separable_hvae.nn.subset import SubsetCondition, SubsetPass


class ObjectiveValue(NamedTuple):
    """An objective at some latents.

    Attributes:
        nll: ``−Σ log p(z)`` of the latents concerned, in nats: ``(B,)``.
        data: Data term, guidance included, in nats: ``(B,)``.
        bands: The bands, in the signal's units.
        whitened: The latents in units of their priors, ``(B, layers, latent_channels, *grid)`` each.
        contexts: Of one subset, the context that flows into each layer, and the outgoing one.
    """

    nll: Tensor
    data: Tensor
    bands: Sequence[Tensor] = ()
    whitened: Sequence[Tensor] = ()
    contexts: Sequence[Tensor] = ()

    @property
    def objective(self) -> Tensor:
        """``nll + data``: ``(B,)``."""
        return self.nll + self.data


class SubsetInputs(NamedTuple):
    """The fixed tensors of a :class:`SubsetObjective`.

    Attributes:
        context: The context that flows into the first layer that moves.
        targets: What the data term compares the band with, see :class:`BoundTerm`.
        later: Later latents of the subset that stay fixed.
        features: What the first layer makes of its context, where that is known already.
        condition: What the subset sees of a condition.
    """

    context: Tensor
    targets: Sequence[Tensor]
    later: Sequence[Tensor] = ()
    features: PriorFeatures | None = None
    condition: SubsetCondition | None = None


class FullInputs(NamedTuple):
    """The fixed tensors of a :class:`FullObjective`.

    Attributes:
        data: What the data term compares all bands with, see :class:`BoundTerm`.
        later: Later latents that stay fixed.
        conditions: What each subset sees of a condition.
    """

    data: Sequence[Tensor]
    later: Sequence[Tensor] = ()
    conditions: Sequence[SubsetCondition] | None = None


@dataclass(frozen=True, eq=False)
class Objective(ABC):
    """A pure function of latents; :class:`InferenceState` makes one for a batch.

    Attributes:
        model: The model.
        misfit: The data term.
        guidance: β of each scale.
        inputs: Tensors that stay fixed.
    """

    model: HVAE
    misfit: Misfit
    guidance: Mapping[int, float]
    inputs: SubsetInputs | FullInputs

    @property
    @abstractmethod
    def layers(self) -> range:
        """Numbers of the layers whose latents it takes."""

    @abstractmethod
    def __call__(self, latents: Sequence[Tensor]) -> ObjectiveValue:
        """Evaluate it at latents ``(B, latent_channels, *grid)``, one tensor for each of its layers."""

    @abstractmethod
    def data(self, bands: Sequence[Tensor]) -> Tensor:
        """The data term of these bands, guidance included, in nats: ``(B,)``."""


@dataclass(frozen=True, eq=False)
class SubsetObjective(Objective):
    """Latents of one subset against their priors and their band, coarser ones fixed and finer ones ignored (eq. 6).

    Attributes:
        index: Number of the subset.
        start: Its layer whose latents are the first that move.
        own_prior: Leave the priors of fixed later latents out, as the paper does.
    """

    inputs: SubsetInputs
    index: int
    start: int = 0
    own_prior: bool = False

    @property
    @override
    def layers(self) -> range:
        counts = [len(subset.scales) for subset in self.model.decoder.subsets[: self.index + 1]]
        return range(sum(counts[:-1]) + self.start, sum(counts) - len(self.inputs.later))

    @override
    def __call__(self, latents: Sequence[Tensor]) -> ObjectiveValue:
        inputs, subset = self.inputs, self.model.decoder.subsets[self.index]
        options = {"condition": inputs.condition, "start": self.start, "features": inputs.features}
        step: SubsetPass = subset(inputs.context, [*latents, *inputs.later], **options)
        log_prior = step.log_prior()
        nll = -(log_prior[:, : len(latents)] if self.own_prior else log_prior).sum(1)
        return ObjectiveValue(nll, self.data([step.band]), [step.band], step.whitened, [*step.contexts, step.context])

    @override
    def data(self, bands: Sequence[Tensor]) -> Tensor:
        beta = self.guidance[self.model.decoder.subsets[self.index].scale]
        return beta * self.misfit.local(self.index, bands[0], self.inputs.targets)


@dataclass(frozen=True, eq=False)
class FullObjective(Objective):
    """All latents, or all but some later ones, against all priors and all that is known."""

    inputs: FullInputs

    @property
    @override
    def layers(self) -> range:
        return range(self.model.depth - len(self.inputs.later))

    @override
    def __call__(self, latents: Sequence[Tensor]) -> ObjectiveValue:
        every = [*latents, *self.inputs.later]
        return self.of_passes(self.model.decoder(every, len(latents[0]), conditions=self.inputs.conditions))

    def of_passes(self, passes: Sequence[SubsetPass]) -> ObjectiveValue:
        """The objective of a pass through every subset."""
        bands = [step.band for step in passes]
        nll = -torch.cat([step.log_prior() for step in passes], dim=1).sum(1)
        whitened = [w for step in passes for w in step.whitened]
        return ObjectiveValue(nll, self.data(bands), bands, whitened)

    @override
    def data(self, bands: Sequence[Tensor]) -> Tensor:
        parts = self.misfit.total(bands, self.inputs.data)
        return torch.stack([self.guidance[scale] * d for scale, d in parts]).sum(0)


def value_and_gradient(objective: Objective, latents: Sequence[Tensor]) -> tuple[ObjectiveValue, list[Tensor]]:
    """An objective at latents, and the gradient of every sample's, both without a graph."""
    moving = [z.detach().requires_grad_() for z in latents]
    with torch.enable_grad():
        value = objective(moving)
        # Samples do not interact, so the gradient of the sum holds each sample's own.
        gradients = torch.autograd.grad(value.objective.sum(), moving)
    lists = ([t.detach() for t in tensors] for tensors in value[2:])
    return ObjectiveValue(value.nll.detach(), value.data.detach(), *lists), list(gradients)
