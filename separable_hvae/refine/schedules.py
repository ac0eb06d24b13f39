r"""Schedules: which latents move when, and against which objective.

    latent    for each latent: its own prior, the later priors of its subset, its band     Algorithm 1
    scale     all latents of a subset at once: their priors and their band                 eq. 6, by subset
    parallel  every latent at once, each subset against its own priors and band            eq. 6, pipelined
    joint     every latent at once: all priors and all bands                               full MAP
    combined  parallel for four fifths of the steps, then joint

``latent`` and ``scale`` go top-down with everything coarser fixed and everything finer ignored, which
is what separable bands buy; with the one band of ``Identity``, ``latent`` is eq. 4. Later latents of a
subset are completed with posterior means and held fixed while an earlier one moves.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae._validation import check_flag, check_integer, check_number, instance_of
from separable_hvae.nn.subset import SubsetPass
from separable_hvae.refine.pieces import OneSubset, Outcome
from separable_hvae.refine.problem import Problem
from separable_hvae.refine.state import InferenceState


class Schedule(ABC):
    """Turn the refinement of a batch into problems.

    A schedule yields one problem after the other; when it goes on, the problem's ``latents`` are those
    that the update rule reached. At the end it calls ``run.reach`` with one tensor for each layer.
    """

    @abstractmethod
    def problems(self, run: InferenceState) -> Iterator[Problem]:
        """Yield problems, coarse to fine."""

    @final
    def solving(self, run: InferenceState) -> Iterator[Problem]:
        """The problems, for who takes their steps.

        Raises:
            RuntimeError: At the end, if what they have led to was not passed to ``run.reach``.
        """
        before, problem = run.latents, None
        for problem in self.problems(run):
            yield problem
        if problem is not None and run.latents is before:
            raise RuntimeError(
                f"{type(self).__name__}.problems must end with run.reach(latents), one tensor for each layer: "
                "what its steps have led to is lost otherwise"
            )


class Scale(Schedule):
    """All latents of a subset in one step, subset by subset.

    Args:
        sweeps: Times to go through the subsets, the steps being shared. From the second on, a data term
            that mixes bands sees the finer ones of the sweep before.
    """

    def __init__(self, sweeps: int = 1) -> None:
        self.sweeps = check_integer("sweeps", sweeps, 1)

    @override
    def problems(self, run: InferenceState) -> Iterator[Problem]:
        finer: list[Tensor | None] = [None] * len(run.model.subsets)
        for sweep in range(self.sweeps):
            shares = {scale: _share(n, sweep, self.sweeps) for scale, n in run.steps.items()}
            here = run.onwards(shares) if sweep else run
            for problem in self._sweep(here, shares, finer):
                problem.until = (sweep + problem.until) / self.sweeps
                yield problem
            run.follow(here)
            finer = [step.band for step in run.passes]

    def _sweep(self, run: InferenceState, steps: dict[int, int], finer: Sequence[Tensor | None]) -> Iterator[Problem]:
        passes: list[SubsetPass] = []
        bands, context, first = list(finer), run.context, 0
        for i, subset in enumerate(run.model.subsets):
            with torch.no_grad():
                aim = run.term.aim(i, bands)
                start = run.enter(i, context, run.evidence(i, [step.band for step in passes]))
                held = [context, *subset.prior_features(0, context), *aim]
            last = first + len(subset.scales)
            problem = Problem(
                start.latents,
                subset.scales,
                steps[subset.scale],
                [(OneSubset(run.objective, i), last - first, held)],
                until=last / run.model.depth,
                spread=run.spread[first:last],
            )
            yield problem
            with torch.no_grad():
                passes.append(subset(context, problem.latents))
            bands[i], context, first = passes[-1].band, passes[-1].context, last
        run.reach([z for step in passes for z in step.latents], passes)


class Latent(Schedule):
    """One latent after the other, Algorithm 1.

    Args:
        own_prior: Leave the priors of the subset's later latents out of the objective, as the paper does.
    """

    def __init__(self, *, own_prior: bool = False) -> None:
        check_flag("own_prior", own_prior)
        self.own_prior = own_prior

    @override
    def problems(self, run: InferenceState) -> Iterator[Problem]:
        latents: list[Tensor] = []
        bands: list[Tensor | None] = [None] * len(run.model.subsets)
        context = run.context
        for i, subset in enumerate(run.model.subsets):
            with torch.no_grad():
                aim = run.term.aim(i, bands)
                evidence = run.evidence(i, [band for band in bands[:i] if band is not None])
                entered = final = run.enter(i, context, evidence)
            for m, scale in enumerate(subset.scales):
                with torch.no_grad():
                    z = run.recentre(i, m, context, entered, evidence)
                    later = run.completion(i, m, z, context, evidence)
                    held = [context, *subset.prior_features(m, context), *later, *aim]
                piece = OneSubset(run.objective, i, m, len(later), own_prior=self.own_prior)
                spread = run.spread[len(latents) : len(latents) + 1]
                problem = Problem(
                    [z],
                    [scale],
                    run.steps[subset.scale],
                    [(piece, 1, held)],
                    until=(len(latents) + 1) / run.model.depth,
                    spread=spread,
                )
                yield problem
                latents += problem.latents
                with torch.no_grad():
                    final = subset(context, [*problem.latents, *later], start=m)
                context = final.contexts[1] if later else final.context
            bands[i] = final.band
        run.reach(latents)


class Parallel(Schedule):
    """All subsets in one step, each against its own objective, so that none waits for another.

    A subset uses the context that the coarser one produced a step earlier: refreshing it costs nothing. It takes
    one number of steps.

    Args:
        recentre: After every so many steps each latent is recentred on what the encoder would say under the new
            context, ``z ← z + μ_q(new context) − μ_q(old context)``, which costs about half a step; 0 never does.
    """

    def __init__(self, recentre: int = 0) -> None:
        self.recentre = check_integer("recentre", recentre, 0)

    @override
    def problems(self, run: InferenceState) -> Iterator[Problem]:
        steps, subsets = _one_number(run, "parallel"), run.model.subsets
        with torch.no_grad():
            bands = [step.band for step in run.start]
            evidence = [run.evidence(i, bands[:i]) for i in range(len(subsets))] if self.recentre else []
            inflows = [[*step.contexts, step.context] for step in run.start]
        centres = self._centres(run, inflows, evidence) if self.recentre else None

        def pieces(inflows: list[list[Tensor]], bands: list[Tensor]) -> list[tuple[OneSubset, int, list[Tensor]]]:
            entries = [run.context, *(contexts[-1] for contexts in inflows[:-1])]
            with torch.no_grad():
                return [
                    (OneSubset(run.objective, i, entered=False), len(s.scales), [entries[i], *run.term.aim(i, bands)])
                    for i, s in enumerate(subsets)
                ]

        def settle(problem: Problem, latents: list[Tensor], done: int) -> list[Tensor]:
            # Contexts change between steps only: a rule may ask for several gradients of one objective.
            nonlocal centres
            reached: list[Outcome] = problem.outcomes
            inflows = [outcome.contexts for outcome in reached]
            problem.pieces = list(pieces(inflows, [outcome.bands[0] for outcome in reached]))
            if centres is None or done % self.recentre or done == steps:
                return latents
            old, centres = centres, self._centres(run, inflows, evidence)
            assert centres is not None
            return [z + new - before for z, new, before in zip(latents, centres, old, strict=True)]

        problem = Problem(
            run.start_latents,
            run.model.layer_scales,
            steps,
            pieces(inflows, bands),
            spread=run.spread,
            settle=settle,
        )
        yield problem
        run.reach(problem.latents)

    @staticmethod
    def _centres(run: InferenceState, inflows: list[list[Tensor]], evidence: Sequence[Any]) -> list[Tensor] | None:
        """What the encoder says of each latent under the contexts that flow into the layers."""
        if run.init != "posterior":
            return None
        with torch.no_grad():
            return [
                subset.posterior(m, context, seen).mean
                for subset, contexts, seen in zip(run.model.subsets, inflows, evidence, strict=True)
                for m, context in enumerate(contexts[:-1])
            ]


class Joint(Schedule):
    """Every latent at once, one backward pass through the whole decoder.

    It takes one number of steps: a ``ValueError`` says so where they differ by scale.
    """

    @override
    def problems(self, run: InferenceState) -> Iterator[Problem]:
        problem = Problem(
            run.start_latents,
            run.model.layer_scales,
            _one_number(run, "joint"),
            [(run.whole, run.model.depth, run.term.data)],
            joint=True,
            spread=run.spread,
        )
        yield problem
        run.reach(problem.latents)


class Chain(Schedule):
    """One schedule after the other, each going on from where the last one stopped.

    Args:
        parts: Schedules, by name or instance, with their shares of the steps.
    """

    def __init__(self, *parts: tuple[str | Schedule, float]) -> None:
        if not parts or not all(isinstance(part, tuple) and len(part) == 2 for part in parts):
            raise TypeError(f"Chain takes pairs of a schedule and its share of the steps, got {parts!r}")
        for _, share in parts:
            check_number("share of the steps", share, "positive and finite")
        # type-abstract: mypy wants a class that can be built, where only isinstance is asked of it.
        self.schedules = [instance_of("schedule", s, SCHEDULES, Schedule) for s, _ in parts]  # type: ignore[type-abstract]
        total = sum(share for _, share in parts)
        self.ends = [0.0]
        for _, share in parts:
            self.ends.append(self.ends[-1] + share / total)

    @override
    def problems(self, run: InferenceState) -> Iterator[Problem]:
        for schedule, (begin, end) in zip(self.schedules, pairwise(self.ends), strict=True):
            steps = {scale: round(n * end) - round(n * begin) for scale, n in run.steps.items()}
            if any(steps.values()):
                part = run.onwards(steps) if begin else run.with_steps(steps)
                for problem in schedule.solving(part):
                    problem.until = begin + (end - begin) * problem.until
                    yield problem
                run.follow(part)


def _share(steps: int, sweep: int, sweeps: int) -> int:
    """Steps of one sweep, so that all sweeps together have as many as asked for."""
    return steps * (sweep + 1) // sweeps - steps * sweep // sweeps


def _one_number(run: InferenceState, schedule: str) -> int:
    """The number of steps of a schedule that moves every latent in each step."""
    if len(numbers := set(run.steps.values())) > 1:
        raise ValueError(
            f"schedule {schedule!r} moves every latent in each step: steps must be one number, got {run.steps}"
        )
    return numbers.pop()


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "latent": Latent,
    "scale": Scale,
    "parallel": Parallel,
    "joint": Joint,
    "combined": lambda: Chain(("parallel", 0.8), ("joint", 0.2)),
}
