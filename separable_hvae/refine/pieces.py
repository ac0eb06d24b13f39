r"""Pieces of the objective as pure functions of tensors.

    OneSubset    −Σ_{m ≥ start} log p(z_m) + β_s d(h_s, t_s)       one subset, from one of its layers on (eq. 6)
    Whole        −Σ_l log p(z_l) + Σ_s β_s d(h_s, t_s)             the full MAP objective

What moves comes first, what stands still second. A piece knows nothing else of the batch, so that
pieces of different subsets can run at the same time, and one that was compiled or recorded serves
every later batch of the same shape: pieces with equal settings are equal.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae.nn.stochastic_layer import PriorFeatures
from separable_hvae.nn.subset import SubsetPass
from separable_hvae.refine.objective import Objective


class Outcome(NamedTuple):
    """What a piece gives.

    Attributes:
        nll: ``−Σ log p(z)`` of the latents concerned, in nats: ``(B,)``.
        data: Data term, guidance included, in nats: ``(B,)``.
        bands: The bands, in the signal's units.
        whitened: The latents in units of their priors, ``(B, layers, latent_channels, *grid)`` each.
        contexts: Of one subset, the context that flows into each layer, and the outgoing one.
    """

    nll: Tensor
    data: Tensor
    bands: list[Tensor]
    whitened: list[Tensor]
    contexts: list[Tensor]

    @property
    def objective(self) -> Tensor:
        """``nll + data``: ``(B,)``."""
        return self.nll + self.data


class Piece(ABC):
    """A pure function of latents that move and of tensors that stand still."""

    objective: Objective

    @abstractmethod
    def __call__(self, moving: Sequence[Tensor], held: Sequence[Tensor]) -> Outcome:
        """Evaluate."""

    @abstractmethod
    def data(self, bands: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
        """The data term of these bands, guidance included, in nats: ``(B,)``."""


@dataclass(frozen=True)
class OneSubset(Piece):
    """Some latents of one subset, against its own priors and band.

    The tensors that stand still are the context, the two of the first layer's :class:`Entry` where it
    is known, the later latents, and the aim.

    Attributes:
        objective: The objective.
        index: Number of the subset.
        start: Layer of the first latent that moves.
        later: Number of later latents that stand still.
        entered: Whether the entry of the first layer is given.
        own_prior: Leave the priors of later latents out, as the paper does.
    """

    objective: Objective
    index: int
    start: int = 0
    later: int = 0
    entered: bool = True
    own_prior: bool = False

    @override
    def __call__(self, moving: Sequence[Tensor], held: Sequence[Tensor]) -> Outcome:
        context, *rest = held
        entry = None
        if self.entered:
            entry, rest = PriorFeatures(rest[0], rest[1]), rest[2:]
        later, aim = rest[: self.later], rest[self.later :]
        step: SubsetPass = self.objective.model.subsets[self.index](
            context, [*moving, *later], start=self.start, features=entry
        )
        terms = self.objective.subset(self.index, step, aim)
        nll = -step.log_prior()[:, : len(moving)].sum(1) if self.own_prior else terms.nll
        return Outcome(nll, terms.data, [step.band], step.whitened, [*step.contexts, step.context])

    @override
    def data(self, bands: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
        aim = held[1 + 2 * self.entered + self.later :]
        return self.objective.local(self.index, bands[0], aim)


@dataclass(frozen=True)
class Whole(Piece):
    """All latents, against all priors and all that is known.

    The tensors that stand still are the later latents and the data.

    Attributes:
        objective: The objective.
        later: Number of later latents that stand still.
    """

    objective: Objective
    later: int = 0

    @override
    def __call__(self, moving: Sequence[Tensor], held: Sequence[Tensor]) -> Outcome:
        passes = self.objective.model.decoder([*moving, *held[: self.later]], len(moving[0]))
        terms = self.objective.total(passes, held[self.later :])
        whitened = [whitened for step in passes for whitened in step.whitened]
        return Outcome(terms.nll, terms.data, [step.band for step in passes], whitened, [])

    @override
    def data(self, bands: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
        return self.objective.whole(bands, held[self.later :])


class Call(NamedTuple):
    """A piece with its tensors.

    Attributes:
        piece: The piece.
        moving: The latents that move.
        held: What stands still.
    """

    piece: Piece
    moving: list[Tensor]
    held: list[Tensor]

    def gradient(self) -> tuple[list[Tensor], Outcome]:
        """Gradient of every sample's objective with respect to what moves, and the outcome, detached."""
        moving = [z.detach().requires_grad_() for z in self.moving]
        with torch.enable_grad():
            outcome = self.piece(moving, self.held)
            # Samples do not interact, so the gradient of the sum holds each sample's own.
            gradients = torch.autograd.grad(outcome.objective.sum(), moving)
        return list(gradients), detached(outcome)

    def value(self) -> Outcome:
        """The outcome, without gradients."""
        with torch.no_grad():
            return self.piece(self.moving, self.held)


def detached(outcome: Outcome) -> Outcome:
    """The outcome without its graph."""
    lists = ([t.detach() for t in tensors] for tensors in outcome[2:])
    return Outcome(outcome.nll.detach(), outcome.data.detach(), *lists)
