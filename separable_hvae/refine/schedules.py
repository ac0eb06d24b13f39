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
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

from torch import Tensor
from typing_extensions import override

from separable_hvae._validation import check_flag, check_integer, check_number, instance_of
from separable_hvae.refine.objective import Objective, ObjectiveValue
from separable_hvae.refine.problem import Problem
from separable_hvae.refine.state import InferenceState


class Solve(Protocol):
    """Take the steps of a problem."""

    def __call__(
        self,
        problem: Problem,
        *,
        until: float = 1.0,
        after_step: Callable[[list[ObjectiveValue]], Sequence[Objective]] | None = None,
    ) -> list[Tensor]:
        """Return the latents that the update rule ends at.

        Args:
            problem: The problem.
            until: Share of the schedule's time that may have passed when it ends, where there is a budget.
            after_step: Maps the values of the problem's objectives, where the last step took its gradient, to
                the objectives of the next step; ``None`` leaves them as they are.
        """


class Schedule(ABC):
    """Turn the refinement of a batch into problems."""

    @abstractmethod
    def __call__(self, state: InferenceState, solve: Solve) -> list[Tensor]:
        """Refine the latents of a batch.

        Args:
            state: Where inference starts, and the model; gives problems and their objectives.
            solve: Takes the steps of a problem, and returns its latents after them.

        Returns:
            One tensor for each layer, coarse to fine.
        """


class Latent(Schedule):
    """One latent after the other, Algorithm 1.

    Args:
        own_prior: Leave the priors of the subset's later latents out of the objective, as the paper does.
    """

    def __init__(self, *, own_prior: bool = False) -> None:
        check_flag("own_prior", own_prior)
        self.own_prior = own_prior

    @override
    def __call__(self, state: InferenceState, solve: Solve) -> list[Tensor]:
        latents: list[Tensor] = []
        bands: list[Tensor] = []
        context = state.context
        for i, subset in enumerate(state.model.subsets):
            targets = state.targets(i, [*bands, *[None] * (len(state.start) - i)])
            evidence, step = state.evidence(i, bands), state.start[i]
            for m in range(len(subset.scales)):
                z, *later = state.restart(i, context, evidence, start=m, drawn=1)
                objective = state.subset_objective(i, context, targets, later, start=m, own_prior=self.own_prior)
                problem = state.problem([z], [objective], state.steps[subset.scale])
                latents += solve(problem, until=(len(latents) + 1) / state.model.depth)
                step = state.subset(i, context, [latents[-1], *later], start=m)
                context = step.contexts[1] if later else step.context
            bands.append(step.band)
        return latents


class Scale(Schedule):
    """All latents of a subset in one step, subset by subset.

    Args:
        sweeps: Times to go through the subsets, the steps being shared. From the second on, a data term
            that mixes bands sees the finer ones of the sweep before.
    """

    def __init__(self, sweeps: int = 1) -> None:
        self.sweeps = check_integer("sweeps", sweeps, 1)

    @override
    def __call__(self, state: InferenceState, solve: Solve) -> list[Tensor]:
        part, bands, latents = state, list[Tensor | None]([None] * len(state.start)), state.latents
        for sweep in range(self.sweeps):
            if self.sweeps > 1:
                part = state.part(self._share(state, sweep), latents if sweep else None)
                bands = [step.band for step in part.start] if sweep else bands
            latents, context = [], part.context
            for i, subset in enumerate(state.model.subsets):
                start = part.restart(i, context, part.evidence(i, bands[:i]))
                objective = part.subset_objective(i, context, part.targets(i, bands))
                problem = part.problem(start, [objective], part.steps[subset.scale])
                share = (len(latents) + len(start)) / state.model.depth
                found = solve(problem, until=(sweep + share) / self.sweeps)
                step = part.subset(i, context, found)
                latents, bands[i], context = latents + found, step.band, step.context
        return latents

    def _share(self, state: InferenceState, sweep: int) -> dict[int, int]:
        """Steps of one sweep, so that all sweeps together have as many as asked for."""
        return {s: n * (sweep + 1) // self.sweeps - n * sweep // self.sweeps for s, n in state.steps.items()}


class Parallel(Schedule):
    """All subsets in one step, each against its own objective, so that none waits for another.

    A subset uses the context that the coarser one produced a step earlier: refreshing it costs nothing. It takes
    one number of steps.
    """

    @override
    def __call__(self, state: InferenceState, solve: Solve) -> list[Tensor]:
        def objectives(contexts: Sequence[Tensor], bands: Sequence[Tensor]) -> list[Objective]:
            return [
                state.subset_objective(i, context, state.targets(i, bands), features=False)
                for i, context in enumerate(contexts)
            ]

        def refreshed(values: list[ObjectiveValue]) -> list[Objective]:
            # Contexts change between steps only: a rule may ask for several gradients of one objective.
            contexts = [state.context, *(value.contexts[-1] for value in values[:-1])]
            return objectives(contexts, [value.bands[0] for value in values])

        start = objectives([step.contexts[0] for step in state.start], [step.band for step in state.start])
        problem = state.problem(state.latents, start, _one_number(state, "parallel"))
        return solve(problem, after_step=refreshed)


class Joint(Schedule):
    """Every latent at once, one backward pass through the whole decoder.

    It takes one number of steps: a ``ValueError`` says so where they differ by scale.
    """

    @override
    def __call__(self, state: InferenceState, solve: Solve) -> list[Tensor]:
        return solve(state.problem(state.latents, [state.full_objective()], _one_number(state, "joint")))


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
        self.ends = list(accumulate((share / total for _, share in parts), initial=0.0))

    @override
    def __call__(self, state: InferenceState, solve: Solve) -> list[Tensor]:
        latents = state.latents
        for schedule, (begin, end) in zip(self.schedules, pairwise(self.ends), strict=True):
            steps = {scale: round(n * end) - round(n * begin) for scale, n in state.steps.items()}
            if any(steps.values()):
                part = state.part(steps, latents if begin else None)
                found = schedule(part, within(solve, begin, end))
                latents = checked_latents(schedule, found, state.latents)
        return latents


def checked_latents(schedule: Schedule, latents: object, before: Sequence[Tensor]) -> list[Tensor]:
    """The latents that a schedule returned, which may be a user's, once they are known to have the right shapes.

    Raises:
        TypeError: If they are no list.
        ValueError: If their shapes are others.
    """
    if not isinstance(latents, list):
        raise TypeError(f"{type(schedule).__name__} must return a list of latents, got {type(latents).__name__}")
    shapes, wanted = ([tuple(z.shape) for z in zs] for zs in (latents, before))
    if shapes != wanted:
        raise ValueError(f"{type(schedule).__name__} must return latents of shapes {wanted}, got {shapes}")
    return latents


def within(solve: Solve, begin: float, end: float) -> Solve:
    """``solve`` for a part of a schedule, whose time goes from one share of the schedule's to another."""

    def part(problem: Problem, *, until: float = 1.0, **options: Any) -> list[Tensor]:
        return solve(problem, until=begin + (end - begin) * until, **options)

    return part


def _one_number(state: InferenceState, schedule: str) -> int:
    """The number of steps of a schedule that moves every latent in each step."""
    if len(numbers := set(state.steps.values())) > 1:
        raise ValueError(
            f"schedule {schedule!r} moves every latent in each step: steps must be one number, got {state.steps}"
        )
    return numbers.pop()


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "latent": Latent,
    "scale": Scale,
    "parallel": Parallel,
    "joint": Joint,
    "combined": lambda: Chain(("parallel", 0.8), ("joint", 0.2)),
}
