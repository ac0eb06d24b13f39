r"""Saving and sharing: a folder with a readable configuration, the weights and a model card.

    config.json          what the model is, and d_w = SHA-256(model.safetensors)
    model.safetensors    every tensor once, and d_c = SHA-256(config.json with d_w left out)

Each file vouches for the other: a changed bit in the weights (d_c among them) breaks d_w, one in the
configuration breaks d_c, one in d_w itself breaks d_w. The digests find accidents, not forgeries; what
holds against a hostile file is that nothing in it is executed: there is no pickle, and a class that is
not the library's own comes from the caller, or from an import path that the caller agreed to follow.

Both files are written beside the old ones and renamed, the configuration last. A save that is cut off
between the two renames leaves new weights, and their configuration complete under its temporary name:
the digests tell, and loading takes it. So at any moment a folder holds the old model or the new one.
"""

import contextlib
import hashlib
import importlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from separable_hvae._version import __version__
from separable_hvae.decomposition import Decomposition, Identity, plain
from separable_hvae.fourier import FFT1Complex, FFT1Real, FFT2Complex, FFT2Real, FFT3Complex, FFT3Real
from separable_hvae.heads import HEADS, ScaleHead
from separable_hvae.wavelet import Wavelet1, Wavelet2, Wavelet3

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_PARTIAL = ".partial"
_SEAL = "config_sha256"

FORMAT = 1
"""Format of the files. A version that adds or renames a key raises it, and completes older files."""

_KEYS: dict[str, type] = {
    "format": int,
    "version": str,
    "model": str,
    "decomposition": dict,
    "scales": list,
    "options": dict,
    "dtype": str,
    "sha256": str,
}
_CASTS = {
    "float64": nn.Module.double,
    "float32": nn.Module.float,
    "bfloat16": nn.Module.bfloat16,
    "float16": nn.Module.half,
}
_FOURIER = (FFT1Real, FFT2Real, FFT3Real, FFT1Complex, FFT2Complex, FFT3Complex)
_OWN_DECOMPOSITIONS = {c.__name__: c for c in (*_FOURIER, Wavelet1, Wavelet2, Wavelet3, Identity)}
_OWN_HEADS = {c.__name__: c for c in HEADS.values()}

M = TypeVar("M", bound=nn.Module)


class Pretrained(nn.Module):
    """A model that is saved to a folder, loaded from it, and shared."""

    decomp: Decomposition
    start: nn.Parameter
    config: dict[str, Any]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json``, ``model.safetensors`` and a model card ``README.md``.

        A model that is there already is replaced, all at once; a ``README.md`` is left as it is.

        Args:
            folder: Where to write; made if it is missing.

        Raises:
            TypeError: If something cannot be saved: an argument of a decomposition of your own (see
                :meth:`Decomposition.config`), or state that is no tensor.
        """
        folder = Path(folder)
        description = self._description()
        seal = _digest(_render(description))
        try:
            weights = safetensors.torch.save(_stored(self), {_SEAL: seal})
        except KeyError as error:
            raise TypeError(f"safetensors cannot hold a tensor of dtype {error}") from error
        config = _render({**description, "sha256": _digest(weights)})
        folder.mkdir(parents=True, exist_ok=True)
        _finish(folder)
        files = {WEIGHTS: weights, CONFIG: config}
        if not (folder / CARD).exists():
            files = {CARD: self._card().encode(), **files}
        try:
            for name, data in files.items():
                _write(folder / (name + _PARTIAL), data)
            _sync(folder)
        except BaseException:
            for name in files:
                (folder / (name + _PARTIAL)).unlink(missing_ok=True)
            raise
        for name in files:
            (folder / (name + _PARTIAL)).replace(folder / name)
            _sync(folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        classes: Sequence[type] = (),
        trust_import_paths: bool = False,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote, in eval mode.

        Args:
            source: A folder, or the id ``"owner/name"`` of a model on the Hugging Face hub.
            classes: Decompositions and heads of your own that the model may be made of.
            trust_import_paths: Whether to import classes of your own from the module that the file
                names. Importing a module runs it: only for files whose origin you trust.
            device: Where the model goes.
            revision: Branch, tag or commit on the hub.

        Raises:
            ValueError: If a file is missing, altered, truncated or of a newer format, or does not
                describe the model; if a class is unknown. The message names the file and the reason.
            ImportError: If ``source`` is a hub id and the extra ``hub`` is not installed.
        """
        wrong = [c for c in classes if not (isinstance(c, type) and issubclass(c, (Decomposition, ScaleHead)))]
        if wrong:
            raise TypeError(f"classes must be Decomposition and ScaleHead subclasses, got {wrong}")
        folder = _folder(source, revision)
        path, config = _find(folder)
        if config["model"] != cls.__name__:
            raise ValueError(f"{path} describes a {config['model']}: load it with {config['model']}.from_pretrained")

        def known(base: type[M], name: object, own: dict[str, Any]) -> type[M]:
            try:
                return _class(base, name, own, classes, trust_import_paths)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error

        options = dict(config["options"])
        if options.get("head") not in HEADS:
            options["head"] = known(ScaleHead, options.get("head"), _OWN_HEADS)
        made = known(Decomposition, config["decomposition"]["class"], _OWN_DECOMPOSITIONS)
        arguments = config["decomposition"]["arguments"]
        try:
            # Parameters made in inference mode could not be trained; loading draws no random numbers.
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                model = cls(made(**arguments), scales=config["scales"], **options)
                rebuilt = model.decomp.config()
        except Exception as error:
            raise ValueError(f"{path} does not describe a {cls.__name__}: {error}") from error
        if missing := sorted(set(model.config) - set(options)):
            raise ValueError(f"{path} lacks options {missing}")
        if changed := sorted(k for k in {*rebuilt, *arguments} if rebuilt.get(k) != arguments.get(k, NotImplemented)):
            raise ValueError(f"{path}: {made.__name__} does not keep its arguments {changed}; let its config() give them")
        if next(model.parameters()).dtype != config["dtype"]:
            _CASTS[config["dtype"]](model)
        _restore(model, folder / WEIGHTS)
        return model.to(device).eval()
