r"""Model folders: a readable configuration and tensors, each of which vouches for the other.

    config.json          settings, and d_w = SHA-256(model.safetensors)
    model.safetensors    tensors, and d_c = SHA-256(config.json with d_w left out)

A changed bit in the tensors' file (d_c among them) breaks d_w, one in the configuration breaks d_c, one
in d_w itself breaks d_w. The digests find accidents, not forgeries: who can write a file can seal it.

Files are written beside the old ones and renamed, the configuration last. A save that is cut off between
the two renames leaves new tensors, and their configuration complete under its temporary name: the
digests tell, and reading takes it. So at any moment a folder holds the old pair or the new one.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from separable_hvae.serialization import atomic

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

FORMAT = 2
"""A version that adds or renames anything in the files raises this, and completes what older ones wrote."""

_SEAL = "config_sha256"


def write(folder: Path, settings: dict[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    """Replace what a folder holds, all at once; a ``README.md`` that is there already is left as it is.

    Args:
        folder: Where to write; made if it is missing.
        settings: What JSON can hold.
        tensors: Tensors by name.
        card: Text of a new ``README.md``.

    Raises:
        TypeError: If a tensor has a dtype that safetensors cannot hold.
    """
    seal = _digest(_render(settings, ""))
    # Clones, since safetensors refuses tensors that share memory.
    alone = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        data = safetensors.torch.save(alone, {_SEAL: seal})
    except KeyError as error:
        raise TypeError(f"a tensor of dtype {error} cannot be saved") from error
    files = {CARD: card.encode(), WEIGHTS: data, CONFIG: _render(settings, _digest(data))}
    if (folder / CARD).exists():
        del files[CARD]
    partial = atomic.beside(folder / CONFIG)
    if partial.exists():
        # Left by a save that was cut off, it may be the configuration that counts.
        with contextlib.suppress(ValueError):
            _verify(partial, folder / WEIGHTS)
            partial.replace(folder / CONFIG)
    atomic.write({folder / name: content for name, content in files.items()})


class Contents(NamedTuple):
    """What a folder holds.

    Attributes:
        settings: What JSON holds.
        tensors: Tensors by name.
        version: Number of the format that both were written in.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    version: int


def read(folder: Path) -> Contents:
    """Return what a folder holds.

    Raises:
        ValueError: If a file is missing, truncated, altered or of a newer format; the message names the
            file and the reason.
    """
    path, weights = folder / CONFIG, folder / WEIGHTS
    try:
        settings = _verify(path, weights)
    except ValueError as error:
        try:
            settings = _verify(atomic.beside(path), weights)
        except ValueError:
            raise error from None
    try:
        with torch.device("cpu"), safe_open(weights, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Contents(settings, tensors, settings.pop("format"))
    except SafetensorError as error:
        raise ValueError(f"{weights} is no safetensors file: {error}") from error


def _verify(path: Path, weights: Path) -> dict[str, Any]:
    """Read a configuration, if it and the tensors vouch for each other."""
    for file in (path, weights):
        if not file.is_file():
            raise ValueError(f"{file} is missing")
    content = path.read_bytes()
    try:
        settings = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON, it is truncated or altered: {error}") from error
    held = settings if isinstance(settings, dict) else {}
    version, expected = held.get("format"), held.pop("sha256", None)
    if type(version) is int and version > FORMAT:
        raise ValueError(f"{path} has format {version}; this version of the library reads up to {FORMAT}: upgrade it")
    if type(version) is not int or version < 1:
        raise ValueError(f"{path} must hold an object with the key 'format', 1 to {FORMAT}")
    with weights.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected:
        raise ValueError(f"{weights} is truncated or altered: its SHA-256 is {digest}, {path} says {expected!r}")
    try:
        with safe_open(weights, framework="pt") as opened:
            seal = (opened.metadata() or {}).get(_SEAL)
    except SafetensorError as error:
        raise ValueError(f"{weights} is no safetensors file: {error}") from error
    if seal != _digest(content.replace(digest.encode(), b"")):
        raise ValueError(f"{path} was altered: its SHA-256 is not the one that {weights} holds")
    assert isinstance(settings, dict)
    return settings


def _render(settings: dict[str, Any], digest: str) -> bytes:
    return (json.dumps({"format": FORMAT, **settings, "sha256": digest}, indent=2, allow_nan=False) + "\n").encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
