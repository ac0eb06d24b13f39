r"""Schedules: which latents move when, and against which objective.

    latent    for each latent: its own prior, the later priors of its subset, its band     Algorithm 1
    scale     all latents of a subset at once: their priors and their band                 eq. 6, by subset
    parallel  every latent at once, each subset against its own priors and band            eq. 6, pipelined
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


class Parallel(Schedule):
    """All subsets in one step, each against its own objective, so that none waits for another.

    A subset uses the context that the coarser one produced a step earlier: refreshing it costs nothing.
    Now and then each latent is recentred on what the encoder would say under the new context,
    ``z ← z + μ_q(new context) − μ_q(old context)``. It takes one number of steps.

    Args:
        recentre: Steps between recentrings; 0 never recentres.
    """

    def __init__(self, recentre: int = 5) -> None:
        if recentre < 0:
            raise ValueError(f"recentre must be at least 0, got {recentre}")
        self.recentre = recentre

    @override
    def problems(self, run: Run) -> Iterator[Problem]:
        steps, subsets = _one_number(run, "parallel"), run.model.subsets
        counts = [len(subset.scales) for subset in subsets]
        passes = reached = run.start
        with torch.no_grad():
            bands = [step.band for step in passes]
            aims = [run.target(i, bands[:i]) for i in range(len(subsets))]

        def guesses() -> list[Tensor] | None:
            if run.init != "posterior":
                return None
            means: list[Tensor] = []
            with torch.no_grad():
                for subset, step, (_, evidence) in zip(subsets, passes, aims, strict=True):
                    assert evidence is not None
                    layers = zip(subset.layers, step.contexts, evidence, strict=True)
                    means += [layer.guess(context, e).mean for layer, context, e in layers]
            return means

        def objective(z: list[Tensor]) -> Terms:
            nonlocal reached
            contexts = [run.context, *(step.context.detach() for step in passes[:-1])]
            split = torch.tensor(counts).cumsum(0).tolist()
            parts = [z[end - n : end] for end, n in zip(split, counts, strict=True)]
            reached = [s(context, part) for s, context, part in zip(subsets, contexts, parts, strict=True)]
            terms = [run.objective.subset(i, step, aims[i][0]) for i, step in enumerate(reached)]
            return Terms(torch.stack([t.nll for t in terms]).sum(0), torch.stack([t.data for t in terms]).sum(0))

        centres = guesses()

        def settle(latents: list[Tensor], done: int) -> list[Tensor]:
            nonlocal passes, centres
            # Contexts change between steps only: a rule may ask for several gradients of one objective.
            passes = reached
            if centres is None or not self.recentre or done % self.recentre or done == steps:
                return latents
            old, centres = centres, guesses()
            assert centres is not None
            return [z + new - before for z, new, before in zip(latents, centres, old, strict=True)]

        scales = run.model.scales
        problem = Problem(run.start_latents, run.model.layer_scales, scales, steps, objective, settle=settle)
        yield problem
        run.latents = problem.latents


class Joint(Schedule):
    """Every latent at once, one backward pass through the whole decoder.

    It takes one number of steps: a ``ValueError`` says so where they differ by scale.
    """

    @override
    def problems(self, run: Run) -> Iterator[Problem]:
        def objective(z: list[Tensor]) -> Terms:
            return run.objective.total(run.model.top_down(z, run.batch))

        problem = Problem(
            run.start_latents,
            run.model.layer_scales,
            run.model.scales,
            _one_number(run, "joint"),
            objective,
            joint=True,
        )
        yield problem
        run.latents = problem.latents


def _one_number(run: Run, schedule: str) -> int:
    """The number of steps of a schedule that moves every latent in each step."""
    if len(numbers := set(run.steps.values())) > 1:
        raise ValueError(
            f"schedule {schedule!r} moves every latent in each step: steps must be one number, got {run.steps}"
        )
    return numbers.pop()


SCHEDULES: dict[str, type[Schedule]] = {"latent": Latent, "scale": Scale, "parallel": Parallel, "joint": Joint}
