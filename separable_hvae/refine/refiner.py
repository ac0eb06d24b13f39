r"""Refiners: from an amortized guess to a better posterior.

A refiner is one small step; the loop around it is the same for all:

    start ← encoder's guess (or the prior)
    for each problem of the schedule, for each of its steps:  z ← step(z)
    return the decoded latents of each sample whose objective is not worse than its start's, else the start
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae.hvae import HVAE, Result
from separable_hvae.objective import ByScale, Loss, Objective, absolute_error, by_scale
from separable_hvae.refine.problem import Problem
from separable_hvae.refine.rules import RULES, Rule
from separable_hvae.refine.run import Init, Run
from separable_hvae.refine.schedules import SCHEDULES, Latent, Schedule
from separable_hvae.subset import SubsetPass

T = TypeVar("T")
_SLACK = 1e-5


@dataclass(frozen=True)
class Iterate:
    """What a callback sees at each step, before the latents move.

    Attributes:
        problem: Number of the problem, counted from 0 in the order of the schedule.
        step: Number of the step within it.
        scales: The scale of each latent that moves.
        latents: These latents.
        nll: ``−log p(z)`` of the latents in the problem's objective, in nats: ``(B,)``.
        data: Its data term, guidance included, in nats: ``(B,)``.
        seconds: Time since the refiner was called.
    """

    problem: int
    step: int
    scales: list[int]
    latents: list[Tensor]
    nll: Tensor
    data: Tensor
    seconds: float

    @property
    def objective(self) -> Tensor:
        """``nll + data``: ``(B,)``."""
        return self.nll + self.data


@dataclass
class History:
    """What happened step by step; each list has one entry for each step of each problem.

    Attributes:
        problem: Number of the problem.
        scale: The finest scale that moved.
        objective: Batch mean of the problem's objective before the step, in nats.
        data: Batch mean of its data term.
        nll: Batch mean of its ``−log p(z)``.
        seconds: Time since the refiner was called.
    """

    problem: list[int] = field(default_factory=list)
    scale: list[int] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    data: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Refiner(ABC):
    """Improve latents by decoder gradients; a subclass gives the step.

    Args:
        steps: Steps N, one number or by scale; 0 everywhere is amortized inference.
        guidance: Weight β of the data term, one number or by scale.
        loss: ``"l2"`` (the model's likelihood), ``"l1"`` (Laplace of the same variance), or a callable
            ``(h_hat, h) -> (B,)`` in nats.
        schedule: ``"latent"``, ``"scale"``, ``"parallel"``, ``"joint"``, or a :class:`Schedule`.
        init: ``"posterior"`` starts from the encoder's guess, ``"prior"`` from the prior (fully
            iterative), a list of L tensors from these.
        sample: Start from a draw instead of the mean.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is negative or not finite, or a name is unknown.
    """

    def __init__(
        self,
        steps: int | Mapping[int, int] | Sequence[int] = 25,
        *,
        guidance: ByScale = 1.0,
        loss: Loss = "l2",
        schedule: str | Schedule = "scale",
        init: Init | Sequence[Tensor] = "posterior",
        sample: bool = False,
    ) -> None:
        if isinstance(loss, str) and loss not in ("l1", "l2"):
            raise ValueError(f"loss must be 'l1', 'l2' or a callable, got {loss!r}")
        if not isinstance(loss, str) and not callable(loss):
            raise TypeError(f"loss must be 'l1', 'l2' or a callable, got {loss!r}")
        if isinstance(init, str) and init not in ("posterior", "prior"):
            raise ValueError(f"init must be 'posterior', 'prior' or a list of latents, got {init!r}")
        if not isinstance(init, Sequence):
            raise TypeError(f"init must be 'posterior', 'prior' or a list of latents, got {type(init).__name__}")
        check_by_scale("steps", steps)
        check_by_scale("guidance", guidance)
        self.steps, self.guidance, self.loss, self.init, self.sample = steps, guidance, loss, init, sample
        self.schedule = _named("schedule", schedule, SCHEDULES, Schedule)  # type: ignore[type-abstract]

    @abstractmethod
    def step(self, problem: Problem, latents: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        """Move the latents of a problem once.

        Args:
            problem: Gives ``gradient(latents)``, ``scales`` and whether it is ``joint``.
            latents: Where the latents are; not to be changed in place.
            state: What the previous step returned; ``None`` on the first of a problem.

        Returns:
            The new latents and the state of the next step.
        """

    @final
    def __call__(
        self,
        model: HVAE,
        x: Tensor,
        generator: torch.Generator | None = None,
        callback: Callable[[Iterate], None] | None = None,
    ) -> Result:
        """Refine the latents of signals.

        Works in any mode and under ``no_grad`` or ``inference_mode``, and leaves the model, the
        signals, gradients and modes as they were.

        Args:
            model: The model.
            x: Signals ``(B, C, *size)``.
            generator: Random numbers of a drawn start.
            callback: Sees every iterate.

        Returns:
            The decoded latents with ``history`` and ``refused``, all detached.

        Raises:
            TypeError: If the model is no HVAE, or ``x`` does not fit it.
            ValueError: If ``x`` does not fit the model, or a setting by scale does not fit its scales.
        """
        if not isinstance(model, HVAE):
            raise TypeError(f"model must be an HVAE, got {type(model).__name__}")
        begin = time.perf_counter()
        steps = {s: int(n) for s, n in by_scale("steps", self.steps, model.scales).items()}
        by_scale("guidance", self.guidance, model.scales)
        with _evaluation(model):
            model.decomp.check_signal(x)
            with torch.no_grad():
                seen = model.observe(x.clone() if x.is_inference() else x.detach())
            objective = Objective(model, seen, self.loss, self.guidance)
            init = self.init if isinstance(self.init, str) else _given(model, self.init, len(x))
            run = Run(model, seen, objective, steps, init, self.sample, generator)
            history = History()
            if any(steps.values()):
                for number, problem in enumerate(self.schedule.problems(run)):
                    state: Any = None
                    for n in range(problem.steps):
                        latents, state = self.step(problem, problem.latents, state)
                        iterate = _iterate(number, n, problem, time.perf_counter() - begin)
                        _record(history, iterate)
                        if callback is not None:
                            callback(iterate)
                        problem.latents = problem.settle(latents, n + 1)
            with torch.no_grad():
                passes, refused = _no_worse(run)
                result = model.result(passes, x.dtype, seen.x)
        return replace(result, history=history, refused=refused)


class MAPRefiner(Refiner):
    """Maximum a posteriori inference by gradient steps on each latent (Algorithm 1, eqs. 6 and 7).

    Args:
        steps: Steps N, one number or by scale; 0 everywhere is amortized inference.
        step_size: Step size λ, one number or by scale; ``None`` takes the rule's own.
        guidance: Weight β of the data term, one number or by scale.
        loss: ``"l2"``, ``"l1"`` or a callable, see :class:`Refiner`.
        schedule: ``"latent"``, ``"scale"``, ``"parallel"``, ``"joint"``, or a :class:`Schedule`.
        rule: ``"adam"``, ``"gd"``, or a :class:`Rule`.
        init: ``"posterior"``, ``"prior"`` or a list of latents, see :class:`Refiner`.
        sample: Start from a draw instead of the mean.
    """

    def __init__(
        self,
        steps: int | Mapping[int, int] | Sequence[int] = 25,
        step_size: ByScale | None = None,
        guidance: ByScale = 1.0,
        loss: Loss = "l2",
        schedule: str | Schedule = "scale",
        rule: str | Rule = "adam",
        init: Init | Sequence[Tensor] = "posterior",
        sample: bool = False,
    ) -> None:
        super().__init__(steps, guidance=guidance, loss=loss, schedule=schedule, init=init, sample=sample)
        if step_size is not None:
            check_by_scale("step_size", step_size)
        self.step_size = step_size
        self.rule = _named("rule", rule, RULES, Rule)  # type: ignore[type-abstract]

    @classmethod
    def paper(cls, steps: int = 25) -> "MAPRefiner":
        """The paper's literal setting.

        Algorithm 1 with each latent's own prior, L1 on orthonormal bands in the data's units, gradient
        descent with λ = 0.001, β = 1, started from a posterior sample.
        """
        return cls(steps, 1e-3, 1.0, absolute_error, Latent(own_prior=True), "gd", "posterior", sample=True)

    @override
    def step(self, problem: Problem, latents: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        return self.rule.step(problem, latents, self._sizes(problem), state)

    def _sizes(self, problem: Problem) -> list[float]:
        if self.step_size is None:
            size = self.rule.default_joint_step if problem.joint else self.rule.default_step
            return [size] * len(problem.scales)
        sizes = by_scale("step_size", self.step_size, problem.all_scales)
        return [sizes[s] for s in problem.scales]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients, whatever the caller's modes; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _given(model: HVAE, latents: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Check the latents to start from and copy them, so that ones from inference mode can move too."""
    given = [z.clone() for z in model.require_latents(latents, batch)]
    if not all(bool(torch.isfinite(z).all()) for z in given):
        raise ValueError("init must be finite, got NaN or infinity")
    return given


def _no_worse(run: Run) -> tuple[list[SubsetPass], Tensor]:
    """Decode the latents that a run reached, and the start of each sample that got worse."""
    before = run.objective.total(run.start).objective
    if run.latents is run.start_latents:
        return run.start, torch.zeros_like(before, dtype=torch.bool)
    passes = run.model.top_down(run.latents, run.batch)
    after = run.objective.total(passes).objective
    refused = ~(after <= before + _SLACK * (1 + before.abs()))
    if bool(refused.any()):
        rows = [refused.reshape(-1, *[1] * (z.ndim - 1)) for z in run.latents]
        kept = [torch.where(r, old, new) for r, old, new in zip(rows, run.start_latents, run.latents, strict=True)]
        passes = run.model.top_down(kept, run.batch)
    return passes, refused


def _iterate(number: int, step: int, problem: Problem, seconds: float) -> Iterate:
    terms = problem.terms
    if terms is None:
        raise RuntimeError("a refiner's step must call problem.gradient at least once")
    return Iterate(number, step, problem.scales, problem.latents, terms.nll, terms.data, seconds)


def _record(history: History, iterate: Iterate) -> None:
    history.problem.append(iterate.problem)
    history.scale.append(max(iterate.scales))
    nll, data = float(iterate.nll.mean()), float(iterate.data.mean())
    history.nll.append(nll)
    history.data.append(data)
    history.objective.append(nll + data)
    history.seconds.append(iterate.seconds)


def check_by_scale(name: str, value: ByScale) -> None:
    """Check a setting's numbers as far as they can be checked without a model's scales."""
    scales = (
        list(value) if isinstance(value, Mapping) else list(range(len(value))) if isinstance(value, Sequence) else [1]
    )
    checked = by_scale(name, value, scales)
    if name == "steps" and not all(isinstance(v, int) for v in checked.values()):
        raise TypeError(f"steps must be integers, got {value!r}")


def _named(name: str, value: str | T, known: Mapping[str, type[T]], base: type[T]) -> T:
    if isinstance(value, str):
        if value not in known:
            raise ValueError(f"{name} must be one of {sorted(known)} or a {base.__name__}, got {value!r}")
        return known[value]()
    if not isinstance(value, base):
        raise TypeError(f"{name} must be a name or a {base.__name__}, got {value!r}")
    return value
