r"""Schedules: which latents move when, and against which objective.

    latent    for each latent: its own prior, the later priors of its subset, its band     Algorithm 1
    scale     all latents of a subset at once: their priors and their band                 eq. 6, by subset
    joint     every latent at once: all priors and all bands                               full MAP

``latent`` and ``scale`` go top-down with everything coarser fixed and everything finer ignored, which
is what separable bands buy; with the one band of ``Identity``, ``latent`` is eq. 4. Later latents of a
subset are completed with posterior means and held fixed while an earlier one moves.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae.objective import Terms
from separable_hvae.refine.problem import Problem
from separable_hvae.refine.run import Run


class Schedule(ABC):
    """Turn the refinement of a batch into problems.

    A schedule yields one problem after the other; when it goes on, the problem's ``latents`` are those
    that the update rule reached. At the end ``run.latents`` holds one tensor for each layer.
    """

    @abstractmethod
    def problems(self, run: Run) -> Iterator[Problem]:
        """Yield problems, coarse to fine."""


class Scale(Schedule):
    """All latents of a subset in one step, subset by subset."""

    @override
    def problems(self, run: Run) -> Iterator[Problem]:
        latents: list[Tensor] = []
        coarser: list[Tensor] = []
        context = run.context
        for i, subset in enumerate(run.model.subsets):
            with torch.no_grad():
                target, evidence = run.target(i, coarser)
                start = run.enter(i, context, evidence)

            def objective(z: list[Tensor], i: int = i, context: Tensor = context, target: Tensor = target) -> Terms:
                return run.objective.subset(i, run.model.subsets[i](context, z), target)

            problem = Problem(start.latents, subset.scales, run.model.scales, run.steps[subset.scale], objective)
            yield problem
            with torch.no_grad():
                final = subset(context, problem.latents)
            latents += problem.latents
            coarser.append(final.band)
            context = final.context
        run.latents = latents


class Latent(Schedule):
    """One latent after the other, Algorithm 1.

    Args:
        own_prior: Leave the priors of the subset's later latents out of the objective, as the paper does.
    """

    def __init__(self, *, own_prior: bool = False) -> None:
        self.own_prior = own_prior

    @override
    def problems(self, run: Run) -> Iterator[Problem]:
        latents: list[Tensor] = []
        coarser: list[Tensor] = []
        context = run.context
        for i, subset in enumerate(run.model.subsets):
            with torch.no_grad():
                target, evidence = run.target(i, coarser)
                entered = final = run.enter(i, context, evidence)
            for m, scale in enumerate(subset.scales):
                with torch.no_grad():
                    z = run.recentre(i, m, context, entered, evidence)
                    later = run.completion(i, m, z, context, evidence)

                def objective(
                    z: list[Tensor],
                    i: int = i,
                    m: int = m,
                    context: Tensor = context,
                    later: list[Tensor] = later,
                    target: Tensor = target,
                ) -> Terms:
                    step = run.model.subsets[i](context, [*z, *later], start=m)
                    terms = run.objective.subset(i, step, target)
                    return Terms(-step.priors[0].log_prob(z[0]), terms.data) if self.own_prior else terms

                problem = Problem([z], [scale], run.model.scales, run.steps[subset.scale], objective)
                yield problem
                latents += problem.latents
                with torch.no_grad():
                    final = subset(context, [*problem.latents, *later], start=m)
                context = final.contexts[1] if later else final.context
            coarser.append(final.band)
        run.latents = latents


class Joint(Schedule):
    """Every latent at once, one backward pass through the whole decoder.

    It takes one number of steps: a ``ValueError`` says so where they differ by scale.
    """

    @override
    def problems(self, run: Run) -> Iterator[Problem]:
        if len(set(run.steps.values())) > 1:
            raise ValueError(f"schedule 'joint' moves every latent in each step: steps must be one number, got {run.steps}")

        def objective(z: list[Tensor]) -> Terms:
            return run.objective.total(run.model.top_down(z, run.batch))

        problem = Problem(
            run.start_latents, run.model.layer_scales, run.model.scales, max(run.steps.values()), objective, joint=True
        )
        yield problem
        run.latents = problem.latents


SCHEDULES: dict[str, type[Schedule]] = {"latent": Latent, "scale": Scale, "joint": Joint}
