r"""Refiners: from an amortized guess to a better posterior.

A refiner is one small step; the loop around it is the same for all:

    start ← encoder's guess (or the prior)
    for each problem of the schedule, for each of its steps:  z ← step(z)
    return the decoded latents of each sample whose objective is not worse than its start's, else the start

A sampler moves to where the objective may be higher: it returns whatever is finite.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae._contexts import eval_mode, refcounted
from separable_hvae._float32 import float32, full_precision
from separable_hvae._validation import (
    check_callable,
    check_flag,
    check_generator,
    check_integer,
    check_number,
    instance_of,
)
from separable_hvae.data_terms.base import BoundTerm, DataTerm
from separable_hvae.data_terms.signal import Loss, Signal, check_loss
from separable_hvae.functional import as_plain, per_sample, require_autograd
from separable_hvae.model.batches import map_tensors
from separable_hvae.model.hvae import HVAE
from separable_hvae.model.latents import require_all
from separable_hvae.model.result import Result
from separable_hvae.nn.decoder import Observation
from separable_hvae.nn.subset import SubsetCondition, SubsetPass
from separable_hvae.refine.acceptance import is_refused, require_finite_start
from separable_hvae.refine.by_scale import ByScale, by_scale, check_by_scale
from separable_hvae.refine.execution.base import Eager, Execution
from separable_hvae.refine.execution.compiled import Compiled
from separable_hvae.refine.execution.cuda_graphs import CudaGraphs
from separable_hvae.refine.history import Iterate, Recorder, Step
from separable_hvae.refine.objective import Objective, ObjectiveValue
from separable_hvae.refine.problem import Problem
from separable_hvae.refine.schedules import SCHEDULES, Schedule, checked_latents
from separable_hvae.refine.state import InferenceState, Init
from separable_hvae.refine.stopping import Clock, Stopping

Precision = Literal["bfloat16", "tf32"]
EXECUTIONS: dict[str, type[Execution]] = {"eager": Eager, "compiled": Compiled, "cuda-graphs": CudaGraphs}


class Refiner(ABC):
    """Improve latents by decoder gradients; a subclass gives the step.

    Args:
        steps: Steps N, one number or by scale; 0 everywhere is amortized inference.
        guidance: Weight β of the data term, one number or by scale.
        loss: ``"likelihood"`` (the model's own), ``"l2"`` or ``"l1"`` (Gaussian or Laplace of the same variance), or a
            callable ``(h_hat, h) -> (B,)`` in nats.
        schedule: ``"latent"``, ``"scale"``, ``"parallel"``, ``"joint"``, ``"combined"``, or a :class:`Schedule`.
        init: ``"posterior"`` starts from the encoder's guess, ``"prior"`` from the prior (fully
            iterative), a list of L tensors from these (a warm start: ``init=previous.latents``).
        sample: Start from a draw instead of the mean.
        tolerance: A sample stops moving once three steps have not lowered the problem's objective by more
            than ``tolerance · (1 + |J|)``; ``None`` takes every step.
        budget: Seconds that a call may take: fewer steps, shared among the problems, if they do not fit.
        batch_size: Samples at a time, to bound the memory; ``None`` takes all at once.
        execution: ``"eager"``, ``"compiled"``, ``"cuda-graphs"``, or an :class:`Execution`.
        precision: ``"bfloat16"`` or ``"tf32"`` runs the steps in less than float32, and starts and results in
            full; ``history.rounding`` says what that does to the objective. ``None`` leaves networks to
            PyTorch's own settings all the way: autocast, and TF32, which its convolutions use by default.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is negative or not finite, or a name is unknown.
    """

    never_worse: bool = True
    """Whether a sample whose objective has risen comes back as it started; samplers set it to ``False``."""

    def __init__(
        self,
        steps: int | Mapping[int, int] | Sequence[int] = 25,
        *,
        guidance: ByScale = 1.0,
        loss: Loss = "likelihood",
        schedule: str | Schedule = "scale",
        init: Init | Sequence[Tensor] = "posterior",
        sample: bool = False,
        tolerance: float | None = None,
        budget: float | None = None,
        batch_size: int | None = None,
        execution: str | Execution = "eager",
        precision: Precision | None = None,
    ) -> None:
        check_loss(loss)
        check_flag("sample", sample)
        if isinstance(init, str) and init not in ("posterior", "prior"):
            raise ValueError(f"init must be 'posterior', 'prior' or a list of latents, got {init!r}")
        if not isinstance(init, Sequence):
            raise TypeError(f"init must be 'posterior', 'prior' or a list of latents, got {type(init).__name__}")
        check_by_scale("steps", steps)
        check_by_scale("guidance", guidance)
        for name, value in {"tolerance": tolerance, "budget": budget}.items():
            if value is not None:
                check_number(name, value, "at least 0 and finite")
        if batch_size is not None:
            batch_size = check_integer("batch_size", batch_size, 1)
        if precision not in (None, "bfloat16", "tf32"):
            raise ValueError(f"precision must be 'bfloat16', 'tf32' or None, got {precision!r}")
        self.steps, self.guidance, self.loss, self.init, self.sample = steps, guidance, loss, init, sample
        self.tolerance, self.budget, self.batch_size, self.precision = tolerance, budget, batch_size, precision
        self.schedule = instance_of("schedule", schedule, SCHEDULES, Schedule)  # type: ignore[type-abstract]
        self.execution = instance_of("execution", execution, EXECUTIONS, Execution)  # type: ignore[type-abstract]

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
        x: Tensor | DataTerm,
        generator: torch.Generator | None = None,
        callback: Callable[[Iterate], None] | None = None,
        condition: Any = None,
    ) -> Result:
        """Refine the latents of signals.

        Works in any mode and under ``no_grad`` or ``inference_mode``, and leaves the model, the
        signals, gradients and modes as they were.

        Args:
            model: The model.
            x: Signals ``(B, C, *size)``, or what is known of them: a :class:`DataTerm`.
            generator: Random numbers of a drawn start.
            callback: Sees every iterate.
            condition: What the model's condition takes, one for each sample.

        Returns:
            The decoded latents with ``objective``, ``history`` and ``refused``, all detached.

        Raises:
            TypeError: If the model is no HVAE, or ``x`` does not fit it.
            ValueError: If ``x`` does not fit the model, or a setting by scale does not fit its scales.
            FloatingPointError: If a sample's objective is not finite at its start.
            RuntimeError: If a schedule or step of your own breaks its contract.
        """
        if not isinstance(model, HVAE):
            raise TypeError(f"model must be an HVAE, got {type(model).__name__}")
        check_generator(generator)
        if callback is not None:
            check_callable("callback", callback, "(iterate) -> None")
        steps = {s: int(n) for s, n in by_scale("steps", self.steps, model.scales).items()}
        guidance = by_scale("guidance", self.guidance, model.scales)
        term = self._term(model, x)
        init = self.init if isinstance(self.init, str) else _given(model, self.init, len(term))
        dtype = term.x.dtype if isinstance(term, Signal) else None
        clock, recorder, results = Clock(self.budget, model.device), Recorder(), list[Result]()
        size = self.batch_size or max(1, len(term))
        looks = self.sample or any(o is not None for o in (callback, self.tolerance, self.budget))

        def started(bound: BoundTerm, inputs: Any) -> InferenceState:
            *seen, data, start, conditions = inputs
            bound = replace(bound, data=data)
            options = {"generator": generator, "execution": self.execution, "conditions": conditions}
            return InferenceState(model, Observation(*seen), bound, guidance, steps, start, self.sample, **options)

        def conditions_of(here: slice) -> list[SubsetCondition] | None:
            with torch.no_grad():
                if model.condition is None or size >= len(term):
                    return model.conditions(condition, len(term))
                some = map_tensors(operator.itemgetter(here), condition)
                return model.conditions(some, len(range(len(term))[here]))

        if model.condition is not None and condition is not None:
            model.condition.check(condition, len(term))

        def decoded(passes: list[SubsetPass], x: Tensor, objective: Tensor) -> Result:
            result = model.result(passes, dtype or x.dtype, None if dtype is None else x)
            return replace(result, objective=objective)

        with _evaluation(model), self._full(model):
            for first in range(0, max(1, len(term)), size):
                here = slice(first, first + size)
                clock.share(min(size, len(term) - first), len(term) - first)
                with torch.no_grad():
                    some = term if len(term) <= size else term.rows(here)
                    seen = model.observe(some.guess(model))
                    bound = some.bind(model, seen)
                start = init if isinstance(init, str) else [z[here] for z in init]
                conditions = conditions_of(here)
                inputs = seen.x, seen.activations, seen.targets, bound.data, start, conditions
                infer: Callable[[Any], _Found] = partial(
                    self._infer, partial(started, bound), decoded, clock, recorder, callback, first
                )
                if not looks and bound.pure:
                    settings = partial(self._settings, dtype, bound.misfit, init if isinstance(init, str) else "given")
                    infer = self.execution.inference(infer, model, settings)
                found = infer(inputs)
                recorder.add(found.steps, found.sums, found.rounding, clock.seconds())
                require_finite_start(found.start_objective, found.start_nll, first)
                result, before = Result(**found.decoded), found.start_objective
                refused = is_refused(before, found.decoded["objective"], self.never_worse)
                if bool(refused.any()):
                    with torch.no_grad():
                        pairs = zip(result.latents, found.start, strict=True)
                        latents = [torch.where(per_sample(refused, new), old, new) for new, old in pairs]
                        passes = model.decoder(latents, len(refused), conditions=conditions)
                        result = decoded(passes, seen.x, torch.where(refused, before, found.decoded["objective"]))
                results.append(replace(result, refused=refused))
        return replace(_joined(results), history=recorder.history())

    def _infer(
        self,
        started: Callable[[Any], InferenceState],
        decoded: Callable[..., Result],
        clock: Clock,
        recorder: Recorder,
        callback: Callable[[Iterate], None] | None,
        first: int,
        inputs: Any,
    ) -> "_Found":
        """Refine some samples: a function of tensors alone, unless something looks at values on the way."""
        with torch.no_grad():
            state = started(inputs)
            full = state.full_objective()
            before = full.of_passes(state.start)
            rounding = self._rounding(state, before.objective)
        loop, latents = _Loop(self, state, clock, recorder, callback, first), state.latents
        if any(state.steps.values()):
            clock.reserve()
            latents = checked_latents(self.schedule, self.schedule(state, loop), state.latents)
        with torch.no_grad():
            passes = state.passes(latents)
            after = before if all(map(operator.is_, passes, state.start)) else full.of_passes(passes)
            sums = torch.stack(loop.sums) if loop.sums else before.nll.new_zeros(0, 4)
            result = decoded(passes, state.seen.x, after.objective)
        return _Found(state.latents, before.nll, before.objective, vars(result), loop.steps, sums, rounding)

    def _settings(self, *others: object) -> object:
        """All that a result depends on beside the model and tensors."""
        return {k: v for k, v in vars(self).items() if k not in ("init", "execution")}, type(self), others

    @override
    def __repr__(self) -> str:
        public = {name: value for name, value in vars(self).items() if value is not None and name[0] != "_"}
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(value)}' for name, value in public.items())})"

    def _term(self, model: HVAE, x: Tensor | DataTerm) -> DataTerm:
        if not isinstance(x, DataTerm):
            model.decomp.check_signal(x)
            return Signal(x, self.loss)
        if self.loss not in ("likelihood", "l2"):
            raise ValueError(
                f"loss is for signals, a data term has its own: got {_brief(self.loss)} beside a {type(x).__name__}. "
                "Leave loss out (MAPRefiner.paper sets one: use MAPRefiner), or give a Measurement another Noise"
            )
        return x

    @contextmanager
    def _full(self, model: HVAE) -> Iterator[None]:
        """Where a precision of the steps is given, everything else is computed in full."""
        device = model.device
        if self.precision == "tf32" and device.type != "cuda":
            raise ValueError(f"precision 'tf32' needs a CUDA device, got {device}")
        if self.precision is None:
            yield
        else:
            with full_precision(device), float32(device, "conv"):
                yield

    def _lowered(self, model: HVAE) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        if self.precision == "tf32":
            return float32(model.device, "conv", tf32=True)
        return torch.autocast(model.device.type, dtype=torch.bfloat16)

    def _rounding(self, state: InferenceState, objective: Tensor) -> Tensor | None:
        """What the reduced precision does to the objective at the start, relative to it: ``(B,)``."""
        if self.precision is None:
            return None
        with self._lowered(state.model):
            lowered = state.full_objective()(state.latents).objective
        return (lowered - objective).abs() / (1 + objective.abs())


class _Found(NamedTuple):
    """What an inference gives: a structure of tensors, which may be recorded and replayed.

    Attributes:
        start: The latents that were started from.
        start_nll: Their ``−log p(z)``, in nats: ``(B,)``.
        start_objective: Their full MAP objective.
        decoded: The attributes of a :class:`Result`.
        steps: The steps that were taken.
        sums: What :meth:`Iterate.sums` says of each: ``(steps, 4)``.
        rounding: Relative error of a reduced precision, ``(B,)``.
    """

    start: list[Tensor]
    start_nll: Tensor
    start_objective: Tensor
    decoded: dict[str, Any]
    steps: list[Step]
    sums: Tensor
    rounding: Tensor | None


@dataclass
class _Loop:
    """The loop around a refiner's step, which takes the problems of a schedule one after the other.

    Attributes:
        steps: The steps taken.
        sums: What is recorded of each.
    """

    refiner: Refiner
    state: InferenceState
    clock: Clock
    recorder: Recorder
    callback: Callable[[Iterate], None] | None
    first: int
    problems: int = 0
    steps: list[Step] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        problem: Problem,
        *,
        until: float = 1.0,
        after_step: Callable[[list[ObjectiveValue]], Sequence[Objective]] | None = None,
    ) -> list[Tensor]:
        """Take the steps of a problem, see :class:`Solve`."""
        refiner, clock, latents, carried = self.refiner, self.clock, problem.latents, None
        clock.enter(until)
        stopping = Stopping(refiner.tolerance, self.state.batch, latents[0].device)
        for n in range(problem.steps):
            if clock.is_over() or stopping.is_over():
                break
            with refiner._lowered(self.state.model):
                moved, carried = _checked_step(refiner, refiner.step(problem, latents, carried), latents)
            if (value := problem.value) is None:
                raise RuntimeError("a refiner's step must call problem.gradient at least once")
            iterate = Iterate(
                self.problems,
                n,
                problem.scales,
                latents,
                value.nll,
                value.data,
                stopping.moving,
                clock.seconds(),
                self.first,
            )
            self.steps.append((self.problems, n, max(problem.scales)))
            self.sums.append(iterate.sums())
            self.recorder.seconds[iterate.problem, n] = iterate.seconds
            if self.callback is not None:
                self.callback(iterate)
            if after_step is not None:
                problem.objectives = list(after_step(problem.values))
            latents = stopping.hold(iterate.objective, latents, moved)
        self.problems += 1
        return latents


def _checked_step(refiner: Refiner, moved: Any, before: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
    """What a refiner's step returned: it may be a user's."""
    if not (isinstance(moved, tuple) and len(moved) == 2 and isinstance(moved[0], list)):
        raise TypeError(f"{type(refiner).__name__}.step must return (latents, state), got {type(moved).__name__}")
    shapes, wanted = ([tuple(z.shape) for z in latents] for latents in (moved[0], before))
    if shapes != wanted:
        raise ValueError(f"{type(refiner).__name__}.step must return latents of shapes {wanted}, got {shapes}")
    return moved[0], moved[1]


@contextmanager
def _evaluation(model: HVAE) -> Iterator[None]:
    """Evaluation mode with gradients of latents alone, whatever the caller's modes; each comes back."""
    require_autograd(model)
    once = refcounted(("evaluation", id(model)), partial(_frozen, model))
    with once, torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        with eval_mode(model):
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def _given(model: HVAE, latents: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Check the latents to start from and copy them, so that ones from inference mode can move too."""
    with torch.inference_mode(False):
        full = require_all("init", latents, model.latent_shapes, batch)
        given = [as_plain(z.detach()).to(model.device, model.real_dtype, copy=True) for z in full]
    if not all(bool(torch.isfinite(z).all()) for z in given):
        raise ValueError("init must be finite, got NaN or infinity")
    return given


def _joined(results: Sequence[Result]) -> Result:
    """The results of several chunks as one."""
    if len(results) == 1:
        return results[0]
    joined: dict[str, Any] = {}
    for name in (f.name for f in fields(Result)):
        parts = [getattr(result, name) for result in results]
        if isinstance(parts[0], Tensor):
            joined[name] = torch.cat(parts)
        elif isinstance(parts[0], list):
            joined[name] = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    return Result(**joined)


def _brief(value: object) -> str:
    """A setting in few words: tensors by their number, what has no short form by its name."""
    if isinstance(value, Sequence) and any(isinstance(part, Tensor) for part in value):
        return f"[{len(value)} tensors]"
    if isinstance(value, (int, float, str, Sequence, Mapping)):
        return repr(value)
    return getattr(value, "__name__", type(value).__name__)
