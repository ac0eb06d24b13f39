"""One batch's refinement: where it starts, what it aims at, what it has reached."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from separable_hvae.data_terms.base import BoundTerm
from separable_hvae.model.hvae import HVAE
from separable_hvae.nn.decoder import Observation
from separable_hvae.nn.subset import Evidence, SubsetPass
from separable_hvae.refine.objective import Objective
from separable_hvae.refine.pieces import Whole

Init = Literal["posterior", "prior"]


class InferenceState:
    """State that a schedule works on.

    Args:
        model: The model, in evaluation mode.
        seen: The batch as the encoder sees it.
        term: What is known of the batch.
        guidance: β of each scale, coarse to fine.
        steps: Steps by scale.
        init: ``"posterior"`` starts from the encoder's guess, ``"prior"`` from the prior, a list of L
            tensors from these.
        sample: Start from a draw instead of the mean.
        generator: Random numbers of the draw, and of steps that draw.
    """

    def __init__(
        self,
        model: HVAE,
        seen: Observation,
        term: BoundTerm,
        guidance: tuple[float, ...],
        steps: dict[int, int],
        init: Init | Sequence[Tensor],
        sample: bool,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.seen, self.term, self.steps = model, seen, term, steps
        self.objective = Objective(model, term.misfit, guidance)
        self.batch = len(seen.x)
        self.init, self.generator = init, generator
        self.given = None if isinstance(init, str) else list(init)
        self.context = model.start.detach().expand(self.batch, *model.start.shape[1:])
        with torch.no_grad():
            self.start: list[SubsetPass] = model.decoder(
                self.given or [None] * model.depth,
                self.batch,
                seen if init == "posterior" else None,
                temperature=1.0 if sample else 0.0,
                generator=generator,
            )
        self.origin = self.start
        self.start_latents = [z for step in self.start for z in step.latents]
        self.spread = [_distribution(step, m)[1] for step in self.start for m in range(len(step.latents))]
        # A drawn start is kept as noise, so that it can move along with its distribution.
        self.noise = [_noise(step, sample) for step in self.start]
        self.reach(self.start_latents, self.start)

    def reach(self, latents: Sequence[Tensor], passes: list[SubsetPass] | None = None) -> None:
        """Say what has been reached: one tensor for each layer, and the pass through them where it is known."""
        self._latents, self._passes = list(latents), passes

    def follow(self, run: "InferenceState") -> None:
        """Say that what another run has reached has been reached."""
        self._latents, self._passes = run._latents, run._passes

    @property
    def latents(self) -> list[Tensor]:
        """What has been reached, one tensor for each layer; :meth:`reach` changes it."""
        return self._latents

    @property
    def passes(self) -> list[SubsetPass]:
        """The pass through the latents that have been reached."""
        if self._passes is None:
            with torch.no_grad():
                self._passes = self.model.decoder(self.latents, self.batch)
        return self._passes

    @cached_property
    def start_objective(self) -> Tensor:
        """The full MAP objective at the start, in nats: ``(B,)``."""
        return self.objective.total(self.origin, self.term.data).objective

    @cached_property
    def whole(self) -> Whole:
        """The full MAP objective."""
        return Whole(self.objective)

    def with_steps(self, steps: dict[int, int]) -> "InferenceState":
        """The same run with another number of steps."""
        run = copy(self)
        run.steps = steps
        return run

    def onwards(self, steps: dict[int, int]) -> "InferenceState":
        """A run that goes on from what this one has reached."""
        run = self.with_steps(steps)
        run.given = run.init = run.start_latents = self.latents
        run.start, run.noise = self.passes, [None] * len(self.start)
        return run

    def evidence(self, index: int, coarser: Sequence[Tensor]) -> Evidence | None:
        """What the posteriors of a subset see, given the coarser bands."""
        if self.init != "posterior":
            return None
        return self.model.decoder.evidence(index, self.seen, coarser)

    def enter(self, index: int, context: Tensor, evidence: Evidence | None) -> SubsetPass:
        """Where the latents of a subset start, under the context that flows into it now."""
        subset, noise = self.model.subsets[index], self.noise[index]
        if self.given is not None:
            step: SubsetPass = subset(context, self.start[index].latents)
            return step
        if noise is None:
            whole: SubsetPass = subset(context, [None] * len(subset.scales), evidence, temperature=0.0)
            return whole
        latents: list[Tensor] = []
        for m in range(len(subset.scales)):
            rest = [None] * (len(subset.scales) - m)
            step = subset(context, [*latents, *rest], evidence, temperature=0.0)
            latents.append(_draw(step, m, noise[m]))
        step = subset(context, latents)
        return step

    def recentre(self, index: int, m: int, context: Tensor, entered: SubsetPass, evidence: Evidence | None) -> Tensor:
        """Where one latent of a subset starts, under the context that flows into its layer now."""
        if self.given is not None or m == 0:
            return entered.latents[m]
        subset, noise = self.model.subsets[index], self.noise[index]
        step: SubsetPass = subset(context, [None] * (len(subset.scales) - m), evidence, start=m, temperature=0.0)
        return step.latents[0] if noise is None else _draw(step, 0, noise[m])

    def completion(self, index: int, m: int, z: Tensor, context: Tensor, evidence: Evidence | None) -> list[Tensor]:
        """The later latents of a subset while latent ``m`` moves: means under ``z``, or as they were given."""
        if self.given is not None:
            return self.start[index].latents[m + 1 :]
        subset = self.model.subsets[index]
        step: SubsetPass = subset(
            context, [z, *[None] * (len(subset.scales) - m - 1)], evidence, start=m, temperature=0.0
        )
        return step.latents[1:]


def _distribution(step: SubsetPass, m: int) -> tuple[Tensor, Tensor]:
    gaussian = step.posteriors[m] or step.priors[m]
    return gaussian.mean, gaussian.sigma


def _draw(step: SubsetPass, m: int, noise: Tensor) -> Tensor:
    mean, sigma = _distribution(step, m)
    return mean + sigma * noise


def _noise(step: SubsetPass, sample: bool) -> list[Tensor] | None:
    if not sample:
        return None
    parts = [_distribution(step, m) for m in range(len(step.latents))]
    return [(z - mean) / sigma for z, (mean, sigma) in zip(step.latents, parts, strict=True)]
