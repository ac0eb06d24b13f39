r"""Saving and sharing models.

    model  ⇄  (class names, arguments, {name: tensor})  ⇄  a folder

Nothing that a file says is executed: there is no pickle, and a class that is not the library's own
comes from the caller, or from an import path that the caller agreed to follow.
"""

import importlib
import inspect
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypedDict, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from separable_hvae._validation import check_flag, plain
from separable_hvae._version import __version__
from separable_hvae.decompositions import DECOMPOSITIONS, Decomposition
from separable_hvae.distributions import LIKELIHOODS, Likelihood
from separable_hvae.nn import CONDITIONS, HEADS, Condition, ScaleHead
from separable_hvae.serialization import model_folder
from separable_hvae.serialization.convert import converted_settings, converted_tensors

_KEYS = {"version": str, "model": str, "decomposition": dict, "scales": list, "options": dict, "dtype": str}
_DESCRIBED_KEYS = {"class": str, "arguments": dict}
_CASTS = {"float64": "double", "float32": "float", "bfloat16": "bfloat16", "float16": "half"}
_REGISTRIES: dict[type[nn.Module], Mapping[str, type[nn.Module]]] = {
    Decomposition: DECOMPOSITIONS,
    ScaleHead: {c.__name__: c for c in HEADS.values()},
    Condition: CONDITIONS,
    Likelihood: LIKELIHOODS,
}
"""The library's own classes of each kind, by name; a user's own are named by their import path."""
_PARTS: dict[str, type[nn.Module]] = {"condition": Condition, "likelihood": Likelihood}
"""Options of a model that are described by a class and its arguments, or ``None``."""

M = TypeVar("M", bound=nn.Module)


class Saveable(Protocol):
    """What is read of a model: an ``nn.Module`` with a decomposition and options of its own."""

    decomp: Decomposition
    config: dict[str, Any]

    @property
    def start(self) -> Tensor:
        """A tensor of the networks, which has their dtype."""


S = TypeVar("S", bound=Saveable)


class LoadOptions(TypedDict, total=False):
    """Options of :func:`load`, for methods that pass them on."""

    classes: Sequence[type[nn.Module]]
    trust_import_paths: bool
    device: str | torch.device
    revision: str | None


class PushOptions(TypedDict, total=False):
    """Options of :func:`push`, for methods that pass them on."""

    private: bool | None
    token: str | None
    branch: str | None
    commit_message: str


def save(model: Saveable, folder: str | os.PathLike[str]) -> None:
    """Write ``config.json``, ``model.safetensors`` and a model card ``README.md``.

    A model that is there already is replaced, all at once; a ``README.md`` is left as it is. Where
    several processes train, one of them saves.

    Args:
        model: The model.
        folder: Where to write; made if it is missing.

    Raises:
        TypeError: If something cannot be saved: what a decomposition of your own was built with
            (see :meth:`Decomposition.config`), an option of a subclass that is not in its ``config``,
            or state that is no tensor of a usual dtype.
        ValueError: If ``folder`` is a file.
    """
    place = _path("folder", folder)
    if place.is_file():
        raise ValueError(f"folder must be a folder, got the file {folder}")
    parts = [(_kind(model), model.decomp)]
    parts += [(type(part), part) for name in _PARTS if (part := model.config[name]) is not None]
    for kind, part in parts:
        try:
            _rebuilt(kind, plain(f"config() of {kind.__name__}", part.config()))
        except Exception as error:
            raise TypeError(f"{kind.__name__} cannot be built again: {error}: override its config()") from error
    arguments = plain("config() of the decomposition", model.decomp.config())
    _check_options(model)
    settings = {"version": __version__, **description(model, arguments)}
    _check_rebuilt(model, settings)
    model_folder.write(place, settings, _state(cast(nn.Module, model))[0], _card(model))


def load(
    cls: type[S],
    source: str | os.PathLike[str],
    *,
    classes: Sequence[type[nn.Module]] = (),
    trust_import_paths: bool = False,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> S:
    """Load what :func:`save` wrote, in eval mode.

    Args:
        cls: Class of the model.
        source: A folder, or the id ``"owner/name"`` of a model on the Hugging Face hub.
        classes: Classes of your own (decompositions, heads, conditions, likelihoods) that the model is made of.
        trust_import_paths: Whether to import classes of your own from the modules that the file
            names. Importing a module runs it: only for files whose origin you trust.
        device: Where the model goes.
        revision: Branch, tag or commit on the hub.

    Raises:
        TypeError: If ``classes`` holds anything but such classes, or another argument has the wrong type.
        ValueError: If a file is missing, truncated, altered or of a newer format, or does not fit
            the model, a class is unknown, or there is no such device; the message names the file and
            the reason.
        ImportError: If ``source`` is a hub id and the extra ``hub`` is not installed.
    """
    check_flag("trust_import_paths", trust_import_paths)
    _check_device(device)
    if not isinstance(classes, Sequence):
        raise TypeError(f"classes must be a sequence of classes, got {classes!r}")
    bases = tuple(_REGISTRIES)
    for c in classes:
        if not (isinstance(c, type) and issubclass(c, bases)):
            names = ", ".join(base.__name__ for base in bases)
            raise TypeError(f"classes must hold subclasses of {names}, got {c!r}")
    folder = _folder(source, revision)
    settings, tensors, version = model_folder.read(folder)
    # Parameters made in inference mode could not be trained; loading is no draw of random numbers.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            model = _build(cls, converted_settings(settings, version), classes, trust_import_paths)
        except Exception as error:
            file = folder / model_folder.CONFIG
            raise ValueError(f"{file} does not describe a {cls.__name__}: {error}") from error
        try:
            _restore(cast(nn.Module, model), converted_tensors(tensors, version, cast(nn.Module, model)))
        except ValueError as error:
            raise ValueError(f"{folder / model_folder.WEIGHTS} does not fit the model: {error}") from error
    cast(nn.Module, model).to(device).eval()
    return model


def push(
    model: Saveable,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Upload the model to the Hugging Face hub; a model card that is there already is kept.

    Args:
        model: The model.
        repo_id: Repository ``"owner/name"``, made if it is missing.
        private: Whether a new repository is private; ``None`` takes the owner's default.
        token: Access token; ``None`` takes the one of the login.
        branch: Branch to upload to, made if it is missing; ``None`` is the main one.
        commit_message: Message of the commit, whose address is returned.

    Raises:
        ImportError: If the extra ``hub`` is not installed.
    """
    api = _hub("push_to_hub").HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    kept = [model_folder.CARD] if api.file_exists(repo_id, model_folder.CARD, revision=branch) else []
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        what = {"folder_path": folder, "ignore_patterns": kept, "commit_message": commit_message}
        return str(api.upload_folder(repo_id=repo_id, revision=branch, **what))


def _build(cls: type[S], settings: dict[str, Any], classes: Sequence[type[nn.Module]], trust: bool) -> S:
    """The model that a configuration describes, untrained."""
    _check_keys("", settings, _KEYS)
    _check_keys("decomposition.", settings["decomposition"], _DESCRIBED_KEYS)
    if settings["model"] != cls.__name__:
        raise ValueError(f"its model is {settings['model']!r}")
    if settings["dtype"] not in _CASTS:
        raise ValueError(f"dtype must be one of {sorted(_CASTS)}, got {settings['dtype']!r}")
    options, described = dict(settings["options"]), settings["decomposition"]
    kind = _class(Decomposition, described["class"], classes, trust)  # type: ignore[type-abstract]
    if isinstance(options.get("head"), str) and options["head"] not in HEADS:
        options["head"] = _class(ScaleHead, options["head"], classes, trust)
    for name, base in _PARTS.items():
        if options.get(name) is not None:
            options[name] = _part(base, f"options.{name}", options[name], classes, trust)
    make = cast(Callable[..., S], cls)
    model = make(_rebuilt(kind, described["arguments"]), scales=settings["scales"], **options)
    if missing := sorted(set(model.config) - set(options)):
        raise ValueError(f"options {missing} are missing")
    if settings["dtype"] != _dtype(model):
        getattr(model, _CASTS[settings["dtype"]])()
    return model


def _card(model: Saveable) -> str:
    """A short model card; its author adds what the library cannot know."""
    name, bands = type(model).__name__, _kind(model).__name__
    return f"""---
library_name: separable-hvae
tags: [hierarchical-vae, variational-autoencoder]
---

# {name} over {bands}

A hierarchical VAE whose decoder is a sum of linear pieces: `{bands}({model.decomp.extra_repr()})`.

```python
from separable_hvae import HVAE

model = HVAE.from_pretrained(".")  # this folder, or its id on the hub
```

To be described by its author: training data, range of the signals, intended use, limits.
"""


def description(model: Saveable, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a model is, as JSON holds it.

    Args:
        model: The model.
        arguments: What its decomposition was built with.
    """
    options = dict(model.config)
    if isinstance(options["head"], type):
        options["head"] = _name(options["head"])
    options |= {name: _described(options[name]) for name in _PARTS if options[name] is not None}
    return {
        "model": type(model).__name__,
        "decomposition": {"class": _name(_kind(model)), "arguments": arguments},
        "scales": list(model.decomp.scales),
        "options": plain("config of the model", options),
        "dtype": _dtype(model),
    }


def _part(base: type[M], place: str, described: object, classes: Sequence[type[nn.Module]], trust: bool) -> M:
    """The part that a configuration describes as :func:`_described` does."""
    if not isinstance(described, dict):
        raise ValueError(f"{place} must be null or of type dict, got {described!r}")
    _check_keys(f"{place}.", described, _DESCRIBED_KEYS)
    return _rebuilt(_class(base, described["class"], classes, trust), described["arguments"])


def _described(part: Any) -> dict[str, Any]:
    """The class of a part and the arguments that build it again."""
    return {"class": _name(type(part)), "arguments": plain(f"config() of {type(part).__name__}", part.config())}


def _kind(model: Saveable) -> type[Decomposition]:
    """The class of a model's decomposition, without what PyTorch makes of it where its tensors are parametrized."""
    return cast(type[Decomposition], type_before_parametrizations(model.decomp))


def _name(kind: type) -> str:
    """What a configuration calls a class: its name if it is the library's own, else its import path."""
    own = any(registry.get(kind.__name__) is kind for registry in _REGISTRIES.values())
    return kind.__name__ if own else f"{kind.__module__}:{kind.__qualname__}"


def _class(base: type[M], name: str, classes: Sequence[type[nn.Module]], trust: bool) -> type[M]:
    """The class that a configuration names."""
    own = cast(Mapping[str, type[M]], _REGISTRIES[base])
    if name in own:
        return own[name]
    if ":" not in name:
        raise ValueError(f"{name!r} is no {base.__name__} of this library, which has {sorted(own)}")
    short = re.split("[:.]", name)[-1]
    fitting = [c for c in dict.fromkeys(classes) if issubclass(c, base) and c.__name__ == short]
    fitting = [c for c in fitting if _name(c) == name] or fitting
    if len(fitting) > 1:
        raise ValueError(f"{name!r} may be any of {fitting} in classes")
    if fitting:
        return fitting[0]
    if not trust:
        raise ValueError(
            f"{name!r} is no class of this library: pass it as classes=[{short}], or agree to import it with "
            "trust_import_paths=True"
        )
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name!r} is no {base.__name__}")
    return found


def _rebuilt(kind: type[M], arguments: dict[str, Any]) -> M:
    with torch.random.fork_rng(devices=[]):
        built: Any = kind(**arguments)
    if (now := plain("config()", built.config())) != arguments:
        raise ValueError(f"built with {arguments}, its config() gives {now}")
    return cast(M, built)


def _check_options(model: Saveable) -> None:
    """Raise a ``TypeError`` unless ``config`` holds every option of the model's constructor, and nothing else."""
    kind, signature = type(model).__name__, inspect.signature(type(model))
    try:
        given = signature.bind(model.decomp, scales=model.decomp.scales, **model.config).arguments
    except TypeError as error:
        raise TypeError(f"{kind} cannot be built again from its decomposition, scales and config: {error}") from error
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if missing := [n for n, p in signature.parameters.items() if n not in given and p.kind not in open_ended]:
        raise TypeError(f"{kind} takes {missing}, which its config lacks: set self.config[{missing[0]!r}] in __init__")


def _check_rebuilt(model: Saveable, settings: dict[str, Any]) -> None:
    """Raise a ``TypeError`` unless the model that the settings describe takes the tensors and options of this one."""
    kind, own = type(model), cast(nn.Module, model)
    classes = [type_before_parametrizations(m) for m in own.modules() if isinstance(m, tuple(_REGISTRIES))]
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            again = _build(kind, json.loads(json.dumps(settings)), classes, trust=False)
        except Exception as error:
            raise TypeError(f"{kind.__name__} cannot be built again from its config: {error}") from error
    here, there = (
        {name: tuple(t.shape) for name, t in m.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        for m in (own, cast(nn.Module, again))
    )
    wrong = sorted(set(here.items()) ^ set(there.items()))
    if wrong:
        raise TypeError(
            f"{kind.__name__} cannot be loaded again: built from its config, it would not have {wrong[0][0]} of shape "
            f"{wrong[0][1]} in common with this one. A part that was wrapped (torch.compile), parametrized "
            "(weight_norm) or exchanged has to be undone first, or made in the constructor"
        )
    open_ended = inspect.Parameter.VAR_KEYWORD in {p.kind for p in inspect.signature(kind).parameters.values()}
    for name, value in vars(again).items() if open_ended else ():
        is_plain = isinstance(value, (bool, int, float, str, tuple)) and not name.startswith("_") and name != "training"
        if is_plain and getattr(model, name) != value:
            raise TypeError(
                f"{kind.__name__} cannot be loaded again: {name} is {getattr(model, name)!r}, and {value!r} in a model "
                f"built from its config: set the option that makes it so in self.config"
            )


def _check_keys(place: str, values: dict[str, Any], kinds: Mapping[str, type]) -> None:
    if missing := [place + k for k in kinds if k not in values]:
        raise ValueError(f"keys {missing} are missing")
    if unknown := [place + k for k in values if k not in kinds]:
        raise ValueError(f"keys {unknown} are unknown")
    for k, kind in kinds.items():
        if type(values[k]) is not kind:
            raise ValueError(f"{place + k} must be of type {kind.__name__}, got {values[k]!r}")


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a model once, under its first name, and for each of its names the first."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: only tensors can be saved")
        names[name] = first.setdefault(id(tensor), name)
        tensors.setdefault(names[name], tensor)
    return tensors, names


def _restore(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Copy stored tensors into a model; tensors with several names stay shared."""
    tensors, names = _state(model)
    if missing := sorted(set(tensors) - set(stored)):
        raise ValueError(f"tensors {missing} are missing")
    if unknown := sorted(set(stored) - set(tensors)):
        raise ValueError(f"tensors {unknown} are unexpected")
    for name, tensor in tensors.items():
        given = stored[name]
        if given.shape != tensor.shape:
            raise ValueError(f"{name} must have shape {tuple(tensor.shape)}, got {tuple(given.shape)}")
        if given.dtype != tensor.dtype:
            if not (given.is_floating_point() and tensor.is_floating_point()):
                raise ValueError(f"{name} must be {tensor.dtype}, got {given.dtype}")
            # This part of the model had been cast on its own.
            tensor.data = tensor.data.to(given.dtype)
    model.load_state_dict({name: stored[first] for name, first in names.items()})


def _path(name: str, given: object) -> Path:
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {given!r}")
    return Path(given).expanduser()


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch has on this machine, got {device!r}: {reason}") from error


def _folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    folder = _path("source", source)
    if folder.is_dir():
        return folder
    if folder.exists() or not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise ValueError(f"{source} is neither a folder nor an id 'owner/name' of a model on the hub")
    hub = _hub(f"{source!r} is no folder here, and loading it from the hub")
    try:
        return Path(
            hub.snapshot_download(source, revision=revision, allow_patterns=[model_folder.CONFIG, model_folder.WEIGHTS])
        )
    except Exception as error:
        error.add_note(f"{source!r} is no folder here, so it was looked up on the hub.")
        raise


def _hub(purpose: str) -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(f'{purpose} needs the extra "hub": pip install "separable-hvae[hub]"') from error


def _dtype(model: Saveable) -> str:
    return str(model.start.dtype).removeprefix("torch.")
