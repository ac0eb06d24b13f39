r"""Refiners: from an amortized guess to a better posterior.

A refiner is one small step; the loop around it is the same for all:

    start ← encoder's guess (or the prior)
    for each problem of the schedule, for each of its steps:  z ← step(z)
    return the decoded latents of each sample whose objective is not worse than its start's, else the start

A sampler moves to where the objective may be higher: it returns whatever is finite.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from separable_hvae._contexts import eval_mode, refcounted
from separable_hvae._fingerprint import Fingerprint, fingerprint
from separable_hvae._float32 import float32, full_precision
from separable_hvae._validation import (
    check_callable,
    check_flag,
    check_generator,
    check_integer,
    check_number,
    instance_of,
)
from separable_hvae.data_terms.base import DataTerm
from separable_hvae.data_terms.signal import Loss, Signal, check_loss
from separable_hvae.functional import require_autograd
from separable_hvae.model.hvae import HVAE
from separable_hvae.model.latents import require_all
from separable_hvae.model.result import Result
from separable_hvae.refine.acceptance import Chunk, Job, Reached, Watch
from separable_hvae.refine.budget import Clock
from separable_hvae.refine.by_scale import ByScale, by_scale, check_by_scale
from separable_hvae.refine.execution.base import Eager, Execution
from separable_hvae.refine.execution.compiled import Compiled
from separable_hvae.refine.execution.cuda_graphs import CudaGraphs
from separable_hvae.refine.history import Iterate, Recorder, Row
from separable_hvae.refine.pieces import Call
from separable_hvae.refine.problem import Problem
from separable_hvae.refine.schedules import SCHEDULES, Schedule
from separable_hvae.refine.state import InferenceState, Init
from separable_hvae.refine.stopping import Stopping

Precision = Literal["bfloat16", "tf32"]
EXECUTIONS: dict[str, type[Execution]] = {"eager": Eager, "compiled": Compiled, "cuda-graphs": CudaGraphs}


class Refiner(ABC):
    """Improve latents by decoder gradients; a subclass gives the step.

    Args:
        steps: Steps N, one number or by scale; 0 everywhere is amortized inference.
        guidance: Weight β of the data term, one number or by scale.
        loss: ``"likelihood"`` (the model's own), ``"l2"`` or ``"l1"`` (Gaussian or Laplace of the same variance), or
            a callable ``(h_hat, h) -> (B,)`` in nats.
        schedule: ``"latent"``, ``"scale"``, ``"parallel"``, ``"joint"``, ``"combined"``, or a :class:`Schedule`.
        init: ``"posterior"`` starts from the encoder's guess, ``"prior"`` from the prior (fully
            iterative), a list of L tensors from these (a warm start: ``init=previous.latents``).
        sample: Start from a draw instead of the mean.
        tolerance: A sample stops moving once three steps have not lowered the problem's objective by more
            than ``tolerance · (1 + |J|)``; ``None`` takes every step.
        budget: Seconds that a call may take: fewer steps, refcounted among the problems, if they do not fit.
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
    ) -> Result:
        """Refine the latents of signals.

        Works in any mode and under ``no_grad`` or ``inference_mode``, and leaves the model, the
        signals, gradients and modes as they were.

        Args:
            model: The model.
            x: Signals ``(B, C, *size)``, or what is known of them: a :class:`DataTerm`.
            generator: Random numbers of a drawn start.
            callback: Sees every iterate.

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
        guidance = tuple(by_scale("guidance", self.guidance, model.scales).values())
        term = self._term(model, x)
        init = self.init if isinstance(self.init, str) else _given(model, self.init, len(term))
        dtype = term.x.dtype if isinstance(term, Signal) else None
        job = Job(model, steps, guidance, dtype, generator, self.never_worse)
        clock = Clock(self.budget, model.device)
        recorder, results = Recorder(), []
        size = self.batch_size or max(1, len(term))
        with _evaluation(model), self._full(model):
            for first in range(0, max(1, len(term)), size):
                here = slice(first, first + size)
                clock.share(min(size, len(term) - first), len(term) - first)
                with torch.no_grad():
                    some = term if len(term) <= size else term.rows(here)
                    seen = model.observe(some.guess(model))
                    bound = some.bind(model, seen)
                chunk = Chunk(seen, bound, init if isinstance(init, str) else [z[here] for z in init])
                reached = self._reach(job, chunk, Watch(clock, recorder, callback, first))
                recorder.add(reached.rows, reached.rounding, clock.seconds())
                with torch.no_grad():
                    results.append(reached.kept(job, seen.x, first))
        return replace(_joined(results), history=recorder.history())

    def _reach(self, job: Job, chunk: Chunk, watch: Watch) -> Reached:
        """Refine a chunk: a function of its tensors alone, unless something looks at values on the way."""
        tensors, structure = pytree.tree_flatten(chunk.tensors)

        def infer(tensors: Sequence[Tensor]) -> Reached:
            seen, term, init = chunk.on(pytree.tree_unflatten(list(tensors), structure))
            with torch.no_grad():
                run = InferenceState(job.model, seen, term, job.guidance, job.steps, init, self.sample, job.generator)
                rounding = self._rounding(run)
            taken = self._loop(run, watch) if any(job.steps.values()) else []
            with torch.no_grad():
                return Reached.of(job, run, taken, rounding)

        looks = self.tolerance is not None or self.budget is not None or watch.callback is not None
        if looks or self.sample or not chunk.term.pure:
            return infer(tensors)
        start = chunk.init if isinstance(chunk.init, str) else "given"
        key = (self._settings(), job.dtype, job.guidance, tuple(job.steps.values()), chunk.term.misfit, start)
        reached: Reached = self.execution.inference(key, job.model, infer, tensors)
        return reached

    def _settings(self) -> Fingerprint:
        """All settings, as a key; where it starts and how it runs aside."""
        bare = copy(self)
        bare.init, bare.execution = "posterior", Eager()
        return fingerprint(bare)

    def _loop(self, run: InferenceState, watch: Watch) -> list[Row]:
        """Solve the problems of the schedule, one after the other."""
        taken: list[Row] = []
        watch.clock.reserve()
        for number, problem in enumerate(self.schedule.solving(run)):
            problem.execution, problem.generator = self.execution, run.generator
            watch.clock.enter(problem)
            stopping = Stopping(self.tolerance, run.batch, run.context.device)
            state: Any = None
            for n in range(problem.steps):
                if watch.clock.is_over() or stopping.is_over():
                    break
                with self._lowered(run.model):
                    latents, state = _moved(self, problem, state)
                iterate = Iterate.of(problem, number, n, stopping.moving, watch.clock.seconds(), watch.first)
                taken.append(Row.of(iterate))
                watch.see(iterate)
                settled = problem.settle(latents, n + 1)
                problem.latents = stopping.hold(iterate.objective, problem.latents, settled)
        return taken

    @override
    def __repr__(self) -> str:
        public = {name: value for name, value in vars(self).items() if value is not None and name[0] != "_"}
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(value)}' for name, value in public.items())})"

    def _term(self, model: HVAE, x: Tensor | DataTerm) -> DataTerm:
        if not isinstance(x, DataTerm):
            model.decomp.check_signal(x)
            return Signal(x, self.loss)
        if self.loss != "likelihood":
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
        device = model.device
        if self.precision == "bfloat16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return float32(device, "conv", tf32=True) if self.precision == "tf32" else nullcontext()

    def _rounding(self, run: InferenceState) -> Tensor | None:
        """What the reduced precision does to the objective at the start, relative to it: ``(B,)``."""
        if self.precision is None:
            return None
        with self._lowered(run.model):
            lowered = Call(run.whole, run.start_latents, run.term.data).value().objective
        return (lowered - run.start_objective).abs() / (1 + run.start_objective.abs())


def _moved(refiner: Refiner, problem: Problem, state: Any) -> tuple[list[Tensor], Any]:
    """A refiner's step, checked: it may be a user's."""
    moved: Any = refiner.step(problem, problem.latents, state)
    if not (isinstance(moved, tuple) and len(moved) == 2 and isinstance(moved[0], list)):
        raise TypeError(f"{type(refiner).__name__}.step must return (latents, state), got {type(moved).__name__}")
    latents: list[Tensor] = moved[0]
    shapes, wanted = ([tuple(z.shape) for z in zs] for zs in (latents, problem.latents))
    if shapes != wanted:
        raise ValueError(f"{type(refiner).__name__}.step must return latents of shapes {wanted}, got {shapes}")
    return latents, moved[1]


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
        given = [
            z.detach().to(model.device, model.real_dtype, copy=True)
            for z in require_all("init", latents, model.latent_shapes, batch)
        ]
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
