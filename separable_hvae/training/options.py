r"""What a training run was asked for, checked, and the schedules that follow from it.

With t in [0, 1] the share of the run that is done, the larger one of steps and time, and w a warm-up,

    learning rate       λ · max(min(1, t / w) · ½ (1 + cos πt), 10⁻³),     or λ · schedule(t)
    weight of the KL    min(1, t / w_KL)
"""

import functools
import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, Protocol, TypeAlias, TypeVar, cast

from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from separable_hvae._validation import (
    Allowed,
    came,
    check_callable,
    check_flag,
    check_instance,
    check_integer,
    check_number,
    check_seed,
    plain,
)
from separable_hvae.functional import require_autograd, widen
from separable_hvae.model.batches import Batch, checked_batches
from separable_hvae.model.hvae import HVAE
from separable_hvae.training.evaluation import check_model, require_condition

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = "checkpoint.safetensors"
"""Name of the checkpoint in its folder."""

Data: TypeAlias = Batch | Dataset[Any] | Iterable[Any]
Augment: TypeAlias = Callable[[Tensor, Generator], Tensor]
AugmentPairs: TypeAlias = Callable[[tuple[Tensor, Any], Generator], tuple[Tensor, Any]]
Callback: TypeAlias = Callable[[dict[str, Any], HVAE], bool | None]
Loss: TypeAlias = Callable[[HVAE, Any, Generator], Tensor]
PathLike: TypeAlias = str | os.PathLike[str]

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)

_OWN_SETTINGS = {"seed", "batch_size", "processes", "count", "checksum", "optimizer", "loss"}
_REPLACED = {"learning_rate": "optimizer", "weight_decay": "optimizer", "warmup": "schedule", "kl_warmup": "loss"}
"""What an option is part of, and must be left alone with one of the caller's own."""
_LEAST_RATE = 1e-3
_HELDOUT_TIMES = 20

MAY_CHANGE = ("learning_rate", "weight_decay", "warmup", "kl_warmup", "ema", "clip", "skip")
"""Options that a resumed run may have otherwise, though it is then another run than one that never stopped."""


Check: TypeAlias = Callable[[str, Any], Any]
"""Of an option's name and value: it returns what is kept of that."""


def _number(allowed: Allowed) -> Check:
    return lambda name, value: check_number(name, value, allowed)


def _integer(least: int) -> Check:
    return lambda name, value: check_integer(name, value, least)


def _callable(form: str) -> Check:
    def check(name: str, value: Any) -> Any:
        check_callable(name, value, form)
        return value

    return check


def _path(kind: str) -> Check:
    def check(name: str, value: Any) -> Path:
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{name} must be a path, got {value!r}")
        path = Path(value).expanduser()
        if kind == "folder" and path.is_file():
            raise ValueError(f"{name} must be a folder, got the file {path}")
        if kind == "file" and path.is_dir():
            raise ValueError(f"{name} must be a file, got the folder {path}")
        return path

    return check


def _seed(name: str, value: Any) -> int:
    return check_seed(name, value)


def _flag(name: str, value: Any) -> bool:
    check_flag(name, value)
    return bool(value)


def _settings(name: str, value: Any) -> dict[str, Any]:
    check_instance(name, value, Mapping)
    settings: dict[str, Any] = plain(name, dict(value))
    if own := sorted(_OWN_SETTINGS & set(settings)):
        raise ValueError(f"{name} must not hold {own}, which a checkpoint holds anyway")
    return settings


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The options of :func:`separable_hvae.fit`, each with its check; ``None`` is fine where it is the default.

    Args:
        steps: Optimizer steps; give this or ``time_budget``, or both: the first to be reached ends the run.
        time_budget: Seconds of training in all, over interruptions.
        batch_size: Signals in each step, on each process; an iterable of batches has its own.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup: Share of the run in which the learning rate rises; it then falls along a cosine to zero.
        kl_warmup: Share of the run in which the weight of the KL rises from zero to one.
        ema: Decay of the weights' moving average, reached gradually; 0 keeps the plain weights.
        clip: Gradients are clipped at this multiple of their typical norm; ``math.inf`` clips none.
        skip: A step is skipped where the norm exceeds this multiple of the typical one or is not finite,
            never more than three in a row; armed after 100 steps.
        loss: A loss of your own, ``(model, batch, generator) -> scalar`` in nats/dim, of what the data give: a batch
            of signals, or a pair of one and its condition. ``None`` is −ELBO per dimension.
        optimizer: Makes an optimizer of a list of parameters, such as ``torch.optim.RAdam`` or a ``partial`` of it
            with its options, its learning rate among them. ``None`` is AdamW, with no decay on biases.
        schedule: Maps the share of the run that is done, in [0, 1], to a factor on the learning rate, instead of
            warm-up and cosine.
        heldout: Signals to evaluate on, with the averaged weights: a tensor, a tuple of one and its condition, or
            batches (or pairs) such as those of a ``DataLoader``, which are read once before the first step, to
            check them.
        every: Steps between log records; one comes after the last of ``steps``, too.
        heldout_every: Steps between evaluations of ``heldout``, which are in the record of their step. ``None``
            makes about twenty in a run of known ``steps``, at multiples of ``every``; otherwise one at each tenth
            record. One comes after the last of ``steps``, too.
        augment: Maps a batch, or pair, and a generator to a batch, or pair, on the device.
        checkpoint: Folder for the checkpoint, written before the first step, now and then, and at the end.
            If it holds one, the run resumes from it; several machines need a folder that all of them see.
        checkpoint_every: Seconds between checkpoints.
        log: File that gets each record as a line of JSON, numbers that are not finite as ``null``.
        callback: Called with each record and the averaged model, on the main process. The run ends where it
            returns ``True``; it returns that, ``False`` or ``None``.
        settings: Further settings that a checkpoint must agree with, such as what ``augment`` does.
        seed: Seed of batches and noise.
        workers: Processes that load a data set.
        progress: Whether to show a progress bar, where there is a terminal for it.
        accelerator: An ``accelerate.Accelerator`` for mixed precision or several processes. ``None`` makes one,
            and so settles the precision of every later one in this process, as accelerate has it: for bf16
            make yours before the first ``fit``, and pass it on to each.
        clock: Clock of ``time_budget``.
    """

    steps: Annotated[int | None, _integer(1)] = None
    time_budget: Annotated[float | None, _number("positive and finite")] = None
    batch_size: Annotated[int, _integer(1)] = 64
    learning_rate: Annotated[float, _number("positive and finite")] = 2e-3
    weight_decay: Annotated[float, _number("at least 0 and finite")] = 0.01
    warmup: Annotated[float, _number("in [0, 1)")] = 0.05
    kl_warmup: Annotated[float, _number("in [0, 1)")] = 0.0
    ema: Annotated[float, _number("in [0, 1)")] = 0.999
    clip: Annotated[float, _number("positive")] = 3.0
    skip: Annotated[float, _number("positive")] = 20.0
    loss: Annotated[Loss | None, _callable("(model, batch, generator) -> scalar")] = None
    optimizer: Annotated[Callable[[list[nn.Parameter]], Optimizer] | None, _callable("(parameters) -> Optimizer")] = (
        None
    )
    schedule: Annotated[Callable[[float], float] | None, _callable("(share of the run) -> factor")] = None
    heldout: Batch | Iterable[Any] | None = None
    every: Annotated[int, _integer(1)] = 100
    heldout_every: Annotated[int | None, _integer(1)] = None
    augment: Annotated[Augment | AugmentPairs | None, _callable("(batch, generator) -> batch")] = None
    checkpoint: Annotated[PathLike | None, _path("folder")] = None
    checkpoint_every: Annotated[float, _number("at least 0 and finite")] = 60.0
    log: Annotated[PathLike | None, _path("file")] = None
    callback: Annotated[Callback | None, _callable("(record, model) -> stop")] = None
    settings: Annotated[Mapping[str, Any] | None, _settings] = None
    seed: Annotated[int, _seed] = 0
    workers: Annotated[int, _integer(0)] = 0
    progress: Annotated[bool, _flag] = True
    accelerator: "Accelerator | None" = None
    clock: Annotated[Callable[[], float], _callable("() -> seconds")] = time.perf_counter

    def __post_init__(self) -> None:
        if self.steps is None and self.time_budget is None:
            raise ValueError("fit needs steps or time_budget")
        for option in fields(self):
            value = getattr(self, option.name)
            if not (value is None and option.default is None):
                for check in getattr(option.type, "__metadata__", ()):
                    object.__setattr__(self, option.name, check(option.name, value))
            owner = _REPLACED.get(option.name)
            if owner is not None and getattr(self, owner) is not None and value != option.default:
                raise ValueError(f"{option.name} is for the built-in {owner}: with {owner}= leave it out")

    @property
    def heldout_interval(self) -> int:
        """Steps between evaluations of held-out signals."""
        if self.heldout_every is not None:
            return self.heldout_every
        tenth = 10 * self.every
        if self.steps is None:
            return tenth
        spread = self.every * max(1, math.ceil(self.steps / (_HELDOUT_TIMES * self.every)))
        return spread if self.time_budget is None else min(spread, tenth)

    def check_model(self, model: object) -> None:
        """Require a model that can be trained, in float32 at least, and that takes the held-out signals."""
        check_model(model)
        assert isinstance(model, HVAE)
        if self.heldout is not None:
            if isinstance(self.heldout, Iterator):
                raise TypeError(
                    "heldout must be a tensor or batches that can be read time and again, such as a DataLoader, "
                    f"got {came(self.heldout)}"
                )
            for _, condition in checked_batches(self.heldout, model.decomp, model.device, name="heldout"):
                require_condition(model, condition, "heldout")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model must have parameters to train, got none that requires a gradient")
        require_autograd(model)
        if widen(model.start).dtype != model.start.dtype:
            raise ValueError(
                f"model must be float32 or float64 to be trained, got {model.start.dtype}: averages of weights need "
                "the digits; train in float32 with Accelerator(mixed_precision='bf16'), and cast it afterwards"
            )

    @property
    def file(self) -> Path | None:
        """Where the checkpoint is."""
        return None if self.checkpoint is None else cast(Path, self.checkpoint) / CHECKPOINT

    def done(self, step: int, seconds: float) -> float:
        """Share of the run that is done, at least 1 at its end."""
        return max(step / self.steps if self.steps else 0.0, seconds / self.time_budget if self.time_budget else 0.0)

    def rate(self, done: float) -> float:
        """Factor on the learning rate at this share of the run.

        Raises:
            TypeError: If ``schedule`` returns no number.
            ValueError: If that is negative or not finite.
        """
        if self.schedule is not None:
            return check_number("what schedule returns", self.schedule(done), "at least 0 and finite")
        share = min(1.0, done / self.warmup if self.warmup else 1.0) * 0.5 * (1 + math.cos(math.pi * done))
        return max(share, _LEAST_RATE)

    def kl_weight(self, done: float) -> float:
        """Weight of the KL at this share of the run."""
        return min(1.0, done / self.kl_warmup) if self.kl_warmup else 1.0

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that comes every so many steps, and after the last one, comes after this one."""
        return step % every == 0 or step == self.steps


class _Trains(Protocol[P, R_co]):
    def __call__(self, model: HVAE, data: Data, *args: P.args, **options: P.kwargs) -> R_co: ...


_OPTIONS = "    options: Each by its name, see :class:`TrainingOptions`.\n"


def takes_options(
    options: Callable[P, TrainingOptions],
) -> Callable[[Callable[[HVAE, Data, TrainingOptions], R_co]], _Trains[P, R_co]]:
    """Make a function of a model, data and options one that takes each option by name, and shows it in its help.

    Args:
        options: Makes the options: :class:`TrainingOptions`.
    """

    def decorate(train: Callable[[HVAE, Data, TrainingOptions], R_co]) -> _Trains[P, R_co]:
        @functools.wraps(train)
        def with_options(model: HVAE, data: Data, *args: P.args, **given: P.kwargs) -> R_co:
            return train(model, data, options(*args, **given))

        own, theirs = inspect.signature(train), inspect.signature(options).parameters.values()
        named = [p.replace(annotation=getattr(p.annotation, "__origin__", p.annotation)) for p in theirs]
        cast(Any, with_options).__signature__ = own.replace(parameters=[*list(own.parameters.values())[:2], *named])
        described = inspect.cleandoc(options.__doc__ or "").partition("Args:\n")[2]
        before, _, after = inspect.cleandoc(train.__doc__ or "").partition(_OPTIONS)
        with_options.__doc__ = f"{before}{described}\n{after}"
        return with_options

    return decorate
