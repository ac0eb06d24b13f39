"""What a training run must keep to go on exactly where it stopped, in one safetensors file."""

import contextlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from separable_hvae._validation import plain
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.model.hvae import HVAE
from separable_hvae.serialization.save import description

_PARTS = ("counters", "model", "settings", "options", "trained")
_ARMED_AFTER = 100  # Steps before gradient norms count as typical.
_MOST_SKIPS = 3  # Steps skipped in a row at most.


class TrainingState:
    """What a checkpoint holds: weights, their average, the optimizer's moments and counters.

    Args:
        model: The model.
        averaged: Its averaged weights.
        optimizer: The optimizer.
        settings: What a checkpoint must agree with.
        options: What a checkpoint should agree with.
    """

    def __init__(
        self,
        model: HVAE,
        averaged: AveragedModel,
        optimizer: torch.optim.Optimizer,
        *,
        settings: dict[str, Any],
        options: dict[str, float],
    ) -> None:
        self.model, self.averaged, self.optimizer = model, averaged, optimizer
        self.described = description(model, _arguments(model.decomp))
        # The optimizer's moments go by number: with other parameters trained they would be those of others.
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        # As a file gives them back: tuples as lists, keys as strings.
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.options = options
        self.step, self.seconds = 0, 0.0
        self.norm, self.in_a_row, self.skipped = 0.0, 0, 0

    @property
    def typical_norm(self) -> float:
        """Running mean of gradient norms, infinite until there is one."""
        return self.norm or math.inf

    def judge(self, norm: float, skip: float) -> bool:
        """Whether to skip a step of this gradient norm; otherwise take the norm into account."""
        finite = math.isfinite(norm)
        wild = not finite or (self.step >= _ARMED_AFTER and norm > skip * self.typical_norm)
        if wild and self.in_a_row >= _MOST_SKIPS:
            if not finite:
                raise FloatingPointError(
                    f"the gradient was not finite {self.in_a_row + 1} times in a row, at step {self.step}"
                )
            wild = False
        self.in_a_row = self.in_a_row + 1 if wild else 0
        self.skipped += wild
        if finite:
            # A wild norm counts too, capped: where norms do grow for good, the threshold follows.
            typical = self.norm or norm
            self.norm += (min(norm, skip * typical) - self.norm) * (0.02 if self.norm else 1.0)
        return wild

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.averaged.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}

    def save(self, path: Path) -> None:
        """Write the checkpoint to a temporary file and rename it.

        Raises:
            OSError: If it cannot be written, for example to a full disk; an earlier one stays as it was.
        """
        counters = {k: getattr(self, k) for k in ("step", "seconds", "norm", "in_a_row", "skipped")}
        parts = (counters, self.described, self.settings, self.options, self.trained)
        metadata = {name: json.dumps(part) for name, part in zip(_PARTS, parts, strict=True)}
        content = save(self._tensors(), metadata)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OSError(f"{path} was not written, an earlier checkpoint is kept: {error}") from error

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; warns if it belongs to a run with other options.

        Raises:
            ValueError: If the file is damaged, belongs to another model, data or setting, or other
                parameters were trained; nothing has changed then.
        """
        try:
            with torch.device("cpu"), safe_open(path, framework="pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            counters, described, settings, options, trained = (json.loads(metadata[k]) for k in _PARTS)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no checkpoint of a training run: {error}") from error
        if described != self.described:
            changed = _differences(described, self.described)
            raise ValueError(f"{path} belongs to another model (there, here): {changed}")
        self._require_same_shapes(path, tensors)
        self._require_same_trained(path, trained)
        if settings != self.settings:
            changed = _differences(settings, self.settings)
            raise ValueError(f"{path} belongs to a run with other settings or data (there, here): {changed}")
        if options != self.options:
            changed = _differences(options, self.options)
            warnings.warn(
                f"{path} belongs to a run with other options (there, here), and goes on with the new ones: {changed}",
                stacklevel=6,
            )

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        self.model.load_state_dict(part("model."))
        self.averaged.load_state_dict(part("average."))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimizer.").items():
            i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for parameter, moments in self.optimizer.state.items():
            # In the parameter's memory format, as they were: kernels may round differently otherwise.
            for name, value in moments.items():
                if value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        for name, value in counters.items():
            setattr(self, name, value)

    def _require_same_shapes(self, path: Path, tensors: dict[str, Tensor]) -> None:
        # Looked at before anything is loaded, so that a model stays as it was if it is refused.
        here = {f"model.{k}": tuple(v.shape) for k, v in self.model.state_dict().items()}
        there = {k: tuple(v.shape) for k, v in tensors.items() if k.startswith("model.")}
        differing = [k for k in here | there if here.get(k) != there.get(k)]
        if differing:
            k = differing[0]
            raise ValueError(
                f"{path} belongs to another model: {len(differing)} parameters or buffers differ, the first is "
                f"{k.removeprefix('model.')} with shape {there.get(k)} there and {here.get(k)} here"
            )

    def _require_same_trained(self, path: Path, there: list[str]) -> None:
        frozen = [name for name in there if name not in self.trained]
        thawed = [name for name in self.trained if name not in there]
        wanted = [f"{flag} for {_few(names)}" for flag, names in ((True, frozen), (False, thawed)) if names]
        if wanted:
            raise ValueError(
                f"{path} belongs to a run that trained other parameters: requires_grad must be {' and '.join(wanted)}"
            )


def _arguments(decomp: Decomposition) -> dict[str, Any]:
    """What a decomposition was built with; nothing, where one of the user's own cannot tell."""
    try:
        return cast(dict[str, Any], plain("config() of the decomposition", decomp.config()))
    except TypeError:
        return {}


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """What differs, as pairs; ``None`` stands for what one of them lacks."""
    found: dict[str, Any] = {}
    for k in [*there, *(k for k in here if k not in there)]:
        a, b = there.get(k), here.get(k)
        if a != b:
            found[k] = _differences(a, b) if isinstance(a, dict) and isinstance(b, dict) else (a, b)
    return found
