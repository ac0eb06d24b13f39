"""One batch's inference: where its latents start, what they are compared with, and the model under given contexts."""

import operator
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from separable_hvae.data_terms.base import BoundTerm
from separable_hvae.model.hvae import HVAE
from separable_hvae.nn.decoder import Observation
from separable_hvae.nn.subset import Evidence, SubsetCondition, SubsetPass
from separable_hvae.refine.execution.base import Execution
from separable_hvae.refine.objective import FullInputs, FullObjective, Objective, SubsetInputs, SubsetObjective
from separable_hvae.refine.problem import Problem

Init = Literal["posterior", "prior"]


class InferenceState:
    """What a schedule works with; nothing in it changes while a schedule runs.

    Args:
        model: The model, in evaluation mode.
        seen: The batch as the encoder sees it.
        term: What is known of the batch.
        guidance: β of each scale.
        steps: Steps by scale.
        init: ``"posterior"`` starts from the encoder's posterior, ``"prior"`` from the prior, a list of L
            tensors from these.
        sample: Start from a draw instead of the mean.
        generator: Random numbers of the draw, and of steps that draw.
        execution: How objectives are evaluated.
        conditions: What each subset sees of a condition; ``None`` for a model without.

    Attributes:
        start: A pass through the latents that are started from, one entry for each subset.
        latents: These latents, one tensor for each layer.
        context: The context that flows into the first subset.
    """

    def __init__(
        self,
        model: HVAE,
        seen: Observation,
        term: BoundTerm,
        guidance: Mapping[int, float],
        steps: Mapping[int, int],
        init: Init | Sequence[Tensor],
        sample: bool = False,
        generator: torch.Generator | None = None,
        execution: Execution | None = None,
        conditions: Sequence[SubsetCondition] | None = None,
    ) -> None:
        self.model, self.seen, self.term, self.steps = model, seen, term, steps
        self.guidance, self.generator, self.execution = guidance, generator, execution
        self.conditions = conditions
        self.batch, self.init = len(seen.x), init
        with torch.no_grad():
            self.start: list[SubsetPass] = model.decoder(
                [None] * model.depth if isinstance(init, str) else init,
                self.batch,
                seen if init == "posterior" else None,
                conditions,
                temperature=1.0 if sample else 0.0,
                generator=generator,
            )
        self.latents = [z for step in self.start for z in step.latents]
        self.context = self.start[0].contexts[0]
        # A drawn start is kept as noise, so that it can move along with its distribution.
        self._noise = [_noise(step) if sample else None for step in self.start]
        self._first, self._latest = self.start, list(self.start)

    def part(self, steps: Mapping[int, int], latents: Sequence[Tensor] | None = None) -> "InferenceState":
        """The same inference with other numbers of steps, started from given latents, one for each layer, if any."""
        state = copy(self)
        state.steps = steps
        if latents is not None:
            state.latents = state.init = list(latents)
            state.start = self.passes(latents)
        return state

    @cached_property
    def std(self) -> list[Tensor]:
        """Standard deviation of each layer's posterior as inference began; of its prior where there is none."""
        return [_distribution(step, m)[1] for step in self._first for m in range(len(step.latents))]

    # What is minimised.

    def problem(self, latents: Sequence[Tensor], objectives: Sequence[Objective], steps: int) -> Problem:
        """The problem of minimising a sum of objectives, from these latents on, in so many steps."""
        std = partial(getattr, self, "std")
        return Problem(latents, objectives, steps, execution=self.execution, generator=self.generator, std=std)

    def full_objective(self, later: Sequence[Tensor] = ()) -> FullObjective:
        """The full MAP objective, perhaps with some later latents fixed."""
        return FullObjective(
            self.model, self.term.misfit, self.guidance, FullInputs(self.term.data, later, self.conditions)
        )

    def subset_objective(
        self,
        index: int,
        context: Tensor,
        targets: Sequence[Tensor],
        later: Sequence[Tensor] = (),
        *,
        start: int = 0,
        own_prior: bool = False,
        features: bool = True,
    ) -> SubsetObjective:
        """The objective of one subset (eq. 6), from its layer ``start`` on.

        Args:
            index: Number of the subset.
            context: The context that flows into this layer.
            targets: What its band is compared with, see :meth:`targets`.
            later: Later latents of the subset that stay fixed.
            start: First layer of the subset whose latents move.
            own_prior: Leave the priors of fixed later latents out.
            features: Compute what the layer makes of its context once, and not in each step.
        """
        subset, condition = self.model.decoder.subsets[index], self._condition(index)
        with torch.no_grad():
            known = subset.prior_features(start, context, condition) if features else None
        inputs = SubsetInputs(context, targets, later, known, condition)
        return SubsetObjective(self.model, self.term.misfit, self.guidance, inputs, index, start, own_prior)

    def targets(self, index: int, bands: Sequence[Tensor | None]) -> list[Tensor]:
        """What a subset's band is compared with, given the bands of all subsets, ``None`` where not known yet."""
        with torch.no_grad():
            return self.term.target(index, bands)

    # The model, subset by subset.

    def subset(
        self,
        index: int,
        context: Tensor,
        latents: Sequence[Tensor | None],
        evidence: Evidence | None = None,
        *,
        start: int = 0,
    ) -> SubsetPass:
        """Run the layers of a subset from ``start`` on, without gradients.

        Args:
            index: Number of the subset.
            context: The context that flows into layer ``start``.
            latents: Its latents from there on; ``None`` stands for the mean of the posterior where there is
                evidence, else of the prior.
            evidence: What the posteriors see.
            start: First layer that runs.
        """
        with torch.no_grad():
            step: SubsetPass = self.model.decoder.subsets[index](
                context, latents, evidence, self._condition(index), start=start, temperature=0.0
            )
        if not start:
            self._latest[index] = step
        return step

    def evidence(self, index: int, coarser: Sequence[Tensor | None]) -> Evidence | None:
        """What the posteriors of a subset see, given the coarser bands; ``None`` unless inference began from them."""
        if self.init != "posterior":
            return None
        with torch.no_grad():
            known = [band for band in coarser if band is not None]
            return self.model.decoder.evidence(index, self.seen, known, self._condition(index))

    def _condition(self, index: int) -> SubsetCondition | None:
        return None if self.conditions is None else self.conditions[index]

    def restart(
        self,
        index: int,
        context: Tensor,
        evidence: Evidence | None,
        *,
        start: int = 0,
        drawn: int | None = None,
    ) -> list[Tensor]:
        """Where the latents of a subset start from layer ``start`` on, under the context that flows into it now.

        Given latents start as they are, others from their means under this context. Where inference began from a
        draw, the first ``drawn`` (``None``: all) lie as many standard deviations off as they did then.
        """
        first, noise = self.start[index], self._noise[index]
        if not isinstance(self.init, str) or (noise is None and context is first.contexts[start]):
            return first.latents[start:]
        count, latents = len(first.latents) - start, list[Tensor]()
        for m in range(count if drawn is None else drawn):
            step = self.subset(index, context, [*latents, *[None] * (count - m)], evidence, start=start)
            if noise is None:
                return step.latents
            latents.append(_draw(step, m, noise[start + m]))
        if len(latents) == count:
            return latents
        rest = [None] * (count - len(latents))
        return self.subset(index, context, [*latents, *rest], evidence, start=start).latents

    def passes(self, latents: Sequence[Tensor]) -> list[SubsetPass]:
        """A pass through latents, one tensor for each layer; subsets that last ran with these are not run again."""
        passes, context, first = list[SubsetPass](), self.context, 0
        for index, latest in enumerate(self._latest):
            last = first + len(self.start[index].latents)
            here = latents[first:last]
            same = latest.contexts[0] is context and all(map(operator.is_, latest.latents, here))
            passes.append(latest if same else self.subset(index, context, here))
            context, first = passes[-1].context, last
        return passes


def _distribution(step: SubsetPass, m: int) -> tuple[Tensor, Tensor]:
    gaussian = step.posteriors[m] or step.priors[m]
    return gaussian.mean, gaussian.sigma


def _draw(step: SubsetPass, m: int, noise: Tensor) -> Tensor:
    mean, sigma = _distribution(step, m)
    return mean + sigma * noise


def _noise(step: SubsetPass) -> list[Tensor]:
    parts = [_distribution(step, m) for m in range(len(step.latents))]
    return [(z - mean) / sigma for z, (mean, sigma) in zip(step.latents, parts, strict=True)]
