"""What a training run must keep to go on exactly where it stopped, in one safetensors file."""

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from separable_hvae._validation import plain
from separable_hvae._version import __version__
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.model.hvae import HVAE
from separable_hvae.serialization import atomic
from separable_hvae.serialization.save import description

FORMAT = 1
"""A version that adds or renames anything in the file raises this."""

_PARTS = ("counters", "model", "settings", "options", "trained", "groups", "moments")


class TrainingState:
    """What a checkpoint holds: weights, their average, the optimizer's moments and counters.

    Args:
        model: The model.
        averaged: Its averaged weights.
        optimizer: The optimizer.
        settings: What a checkpoint must agree with.
        options: What a checkpoint should agree with.

    Attributes:
        step: Steps done.
        seconds: Time spent.
        norm: Running mean of the gradient's norm, 0 until there is one.
        in_a_row: Steps skipped since the last that was not.
        skipped: Steps skipped in all.
    """

    def __init__(
        self,
        model: HVAE,
        averaged: AveragedModel,
        optimizer: torch.optim.Optimizer,
        *,
        settings: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self.model, self.averaged, self.optimizer = model, averaged, optimizer
        self.described = description(model, _arguments(model.decomp))
        # The optimizer's moments go by number: with other parameters trained they would be those of others.
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        # As a file gives them back: tuples as lists, keys as strings.
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.options: dict[str, Any] = json.loads(json.dumps(options))
        self._initial_groups = self._groups()
        self.step, self.seconds = 0, 0.0
        self.norm, self.in_a_row, self.skipped = 0.0, 0, 0

    def _groups(self) -> list[dict[str, Any]]:
        """What the optimizer's groups hold beside parameters, as a file gives it back."""
        groups = self.optimizer.state_dict()["param_groups"]
        held = [{k: len(v) if k == "params" else v for k, v in group.items()} for group in groups]
        return cast(list[dict[str, Any]], json.loads(json.dumps(held, default=_plain)))

    def save(self, path: Path) -> None:
        """Write the checkpoint, all at once.

        Raises:
            OSError: If it cannot be written, for example to a full disk; an earlier one stays as it was.
        """
        counters = {k: getattr(self, k) for k in ("step", "seconds", "norm", "in_a_row", "skipped")}
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.averaged.state_dict().items()}
        moments = _encode(self.optimizer.state_dict()["state"], tensors, "optimizer")
        groups = [self._initial_groups, self._groups()]
        parts = (counters, self.described, self.settings, self.options, self.trained, groups, moments)
        metadata = {name: json.dumps(part) for name, part in zip(_PARTS, parts, strict=True)}
        metadata |= {"format": str(FORMAT), "version": __version__}
        try:
            atomic.write({path: save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, metadata)})
        except OSError as error:
            raise OSError(f"{path} was not written, an earlier checkpoint is kept: {error}") from error

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; warns if it belongs to a run with other options.

        Raises:
            ValueError: If the file is damaged or of a newer format, belongs to another model, data or setting, or
                other parameters were trained; nothing has changed then.
        """
        try:
            with torch.device("cpu"), safe_open(path, framework="pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            if (version := json.loads(metadata["format"])) > FORMAT:
                raise ValueError(
                    f"{path} has format {version}, of version {metadata['version']} of the library; this one, "
                    f"{__version__}, reads up to {FORMAT}: upgrade it"
                )
            counters, described, settings, options, trained, groups, moments = (json.loads(metadata[k]) for k in _PARTS)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no checkpoint of a training run: {error}") from error
        if described != self.described:
            changed = _differences(described, self.described)
            raise ValueError(f"{path} belongs to another model (there, here): {changed}")
        self._require_same_shapes(path, tensors)
        self._require_same_trained(path, trained)
        if settings != self.settings:
            changed = _differences(settings, self.settings)
            hint = ""
            if changed.keys() & {"count", "checksum"}:
                hint = (
                    ". Data are part of a run: to train on with more of them, give the model that it leaves (resume it "
                    "with its own data; a finished run ends at once) to a fit with another checkpoint folder"
                )
            raise ValueError(f"{path} belongs to a run with other settings or data (there, here): {changed}{hint}")
        here = self._initial_groups
        sizes = [[group["params"] for group in part] for part in (groups[0], here)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{path} belongs to a run whose optimizer has other groups: there of {sizes[0]} parameters, "
                f"here {sizes[1]}"
            )
        changed = _differences(options, self.options)
        for i, (group, own) in enumerate(zip(groups[0], here, strict=True)):
            if self.settings["optimizer"] is not None and group != own:
                changed[f"optimizer's group {i}"] = _differences(group, own)
        if changed:
            warnings.warn(
                f"{path} belongs to a run with other options (there, here), and goes on with the new ones: {changed}",
                stacklevel=7,
            )

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        self.model.load_state_dict(part("model."))
        self.averaged.load_state_dict(part("average."))
        state = {**self.optimizer.state_dict(), "state": _decode(moments, tensors)}
        for then, last, now, group in zip(*groups, here, state["param_groups"], strict=True):
            # What the optimizer itself has changed since goes on, what the caller has changed holds.
            for k, v in last.items():
                if k not in ("lr", "params") and then.get(k) == now.get(k) and v != now.get(k):
                    group[k] = tuple(v) if isinstance(group.get(k), tuple) else v
        self.optimizer.load_state_dict(state)
        for parameter, found in self.optimizer.state.items():
            # In the parameter's memory format, as they were: kernels may round differently otherwise.
            for name, value in found.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    found[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
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


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else type(value).__name__


def _encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Nested values as JSON holds them; tensors go into a dictionary, by name."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_encode(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    return value


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {k: _decode(v, tensors) for k, v in held}
    parts = [_decode(v, tensors) for v in held]
    return tuple(parts) if kind == "tuple" else parts
