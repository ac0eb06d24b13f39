r"""What a training run was asked for, checked, and the schedules that follow from it.

With t in [0, 1] the share of the run that is done, the larger one of steps and time, and w a warm-up,

    learning rate       λ · max(min(1, t / w) · ½ (1 + cos πt), 10⁻³)
    weight of the KL    min(1, t / w_KL)
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from separable_hvae.model.hvae import HVAE
from separable_hvae.model.standardization import batches_of

CHECKPOINT = "checkpoint.safetensors"
"""Name of the checkpoint in its folder."""

Augment = Callable[[Tensor, torch.Generator], Tensor]
Callback = Callable[[dict[str, Any], HVAE], bool | None]

_NUMBERS: dict[str, Allowed] = {
    "time_budget": "positive and finite",
    "learning_rate": "positive and finite",
    "weight_decay": "at least 0 and finite",
    "warmup": "in [0, 1)",
    "kl_warmup": "in [0, 1)",
    "ema": "in [0, 1)",
    "clip": "positive",
    "skip": "positive",
    "checkpoint_every": "at least 0 and finite",
}
_INTEGERS = {"steps": 1, "batch_size": 1, "every": 1, "workers": 0}
"""The least of each."""
_CALLABLES = {
    "augment": "(batch, generator) -> batch",
    "callback": "(record, model) -> stop",
    "clock": "() -> seconds",
}
_MAY_BE_NONE = {"steps", "time_budget", "augment", "callback"}
_OWN_SETTINGS = {"seed", "batch_size", "processes", "count", "checksum"}
_LEAST_RATE = 1e-3

MAY_CHANGE = ("learning_rate", "weight_decay", "warmup", "kl_warmup", "ema", "clip", "skip")
"""Options that a resumed run may have otherwise, though it is then another run than one that never stopped."""


@dataclass(frozen=True)
class TrainingOptions:
    """The options of :func:`separable_hvae.fit`, which says what each one means."""

    steps: int | None
    time_budget: float | None
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float
    kl_warmup: float
    ema: float
    clip: float
    skip: float
    heldout: Tensor | Iterable[Tensor] | None
    every: int
    augment: Augment | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: float
    log: str | os.PathLike[str] | None
    callback: Callback | None
    settings: Mapping[str, Any] | None
    seed: int
    workers: int
    progress: bool
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        if self.steps is None and self.time_budget is None:
            raise ValueError("fit needs steps or time_budget")
        for name, value in list(vars(self).items()):
            if value is None and name in _MAY_BE_NONE:
                continue
            if name in _INTEGERS:
                self._set(name, check_integer(name, value, _INTEGERS[name]))
            if name in _NUMBERS:
                self._set(name, check_number(name, value, _NUMBERS[name]))
            if name in _CALLABLES:
                check_callable(name, value, _CALLABLES[name])
        self._set("seed", check_seed("seed", self.seed))
        check_flag("progress", self.progress)
        for name, path in {"checkpoint": self.checkpoint, "log": self.log}.items():
            if path is not None and not isinstance(path, (str, os.PathLike)):
                raise TypeError(f"{name} must be a path, got {path!r}")
        if self.checkpoint is not None and Path(self.checkpoint).is_file():
            raise ValueError(f"checkpoint must be a folder, got the file {self.checkpoint}")
        if self.log is not None and Path(self.log).is_dir():
            raise ValueError(f"log must be a file, got the folder {self.log}")
        if self.settings is not None:
            check_instance("settings", self.settings, Mapping)
            self._set("settings", plain("settings", dict(self.settings)))
            if own := sorted(_OWN_SETTINGS & set(self.settings)):
                raise ValueError(f"settings must not hold {own}, which a checkpoint holds anyway")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def check_model(self, model: object) -> None:
        """Require a model that can be trained, in float32 at least, and that takes the held-out signals."""
        check_instance("model", model, HVAE)
        assert isinstance(model, HVAE)
        if self.heldout is not None:
            if isinstance(self.heldout, Iterator):
                raise TypeError(
                    "heldout must be a tensor or batches that can be read time and again, such as a DataLoader, "
                    f"got {came(self.heldout)}"
                )
            for _ in batches_of(self.heldout, model.decomp, model.device, name="heldout"):
                pass
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
        return None if self.checkpoint is None else Path(self.checkpoint) / CHECKPOINT

    def done(self, step: int, seconds: float) -> float:
        """Share of the run that is done, at least 1 at its end."""
        return max(step / self.steps if self.steps else 0.0, seconds / self.time_budget if self.time_budget else 0.0)

    def rate(self, done: float) -> float:
        """Learning rate at this share of the run."""
        share = min(1.0, done / self.warmup if self.warmup else 1.0) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * max(share, _LEAST_RATE)

    def kl_weight(self, done: float) -> float:
        """Weight of the KL at this share of the run."""
        return min(1.0, done / self.kl_warmup) if self.kl_warmup else 1.0

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that comes every so many steps, and after the last one, comes after this one."""
        return step % every == 0 or step == self.steps
