"""Setups: a data set, a model and how it is trained, read from one TOML file.

dataset = "cifar10"          or "fastmri"
[data]                       size, augment, and how the set is read
[model]                      decomposition, and the arguments of HVAE
[training]                   epochs, and the arguments of fit
[tiny.data], [tiny.model], [tiny.training]    what the twin for a CPU changes
"""

import inspect
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from data import cifar10
from mri import fastmri
from torch import Tensor

from separable_hvae import HVAE, Decomposition, FFT2Complex, FFT2Real, Identity, Wavelet2, fit

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Setup:
    """What one configuration file says.

    Attributes:
        dataset: ``"cifar10"`` or ``"fastmri"``.
        data: Size, augmentations, and how the set is read.
        model: Decomposition and arguments of :class:`HVAE`.
        training: ``epochs`` and arguments of :func:`fit`.
    """

    dataset: str
    data: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """The setup as JSON can hold it."""
        return asdict(self)

    def build(self) -> HVAE:
        """The untrained model."""
        options = dict(self.model)
        kind, size = options.pop("decomposition"), self.data["size"]
        channels, is_complex = (1, True) if self.dataset == "fastmri" else (3, False)
        decompositions: dict[str, Callable[[], Decomposition]] = {
            "FFT2Real": lambda: FFT2Real(size, channels),
            "FFT2Complex": lambda: FFT2Complex(size, channels),
            "Wavelet2": lambda: Wavelet2(size, options.pop("wavelet", "haar"), channels, is_complex=is_complex),
            "Identity": lambda: Identity(size, channels, is_complex=is_complex),
        }
        if kind not in decompositions:
            raise ValueError(f"decomposition must be one of {sorted(decompositions)}, got {kind!r}")
        return HVAE(decompositions[kind](), **options).to(memory_format=torch.channels_last)

    def load(self, source: Path, *, train: bool) -> Tensor:
        """The training set or the held-out one, ``(N, C, size, size)``."""
        options = {k: v for k, v in self.data.items() if k != "augment"}
        if self.dataset == "fastmri":
            return fastmri(source, train=train, **options)
        options["side"] = options.pop("size")
        return cifar10(source, train=train, **options)

    def augment(self) -> Augmentation | None:
        """What happens to each training batch, on its device."""
        chosen = [AUGMENTATIONS[name] for name in self.data.get("augment", [])]

        def apply(x: Tensor, generator: torch.Generator) -> Tensor:
            for one in chosen:
                x = one(x, generator)
            return x

        return apply if chosen else None


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images ``(B, C, H, W)`` left to right."""
    mirrored = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator) < 0.5
    return torch.where(mirrored, x.flip(-1), x)


def phase(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each complex image ``(B, C, H, W)`` by a random angle: a scanner's global phase is arbitrary."""
    angle = 2 * math.pi * torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator)
    return x * torch.polar(torch.ones_like(angle), angle)


SECTIONS = ("data", "model", "training")
AUGMENTATIONS: dict[str, Augmentation] = {"flip": flip, "phase": phase}
DATA = {"cifar10": {"size", "augment"}, "fastmri": {"size", "augment", "crop", "coils", "unusable"}}


def read(path: Path, *, tiny: bool = False) -> Setup:
    """Read a configuration file, or the tiny twin that it describes.

    Raises:
        ValueError: If it is no TOML, a section or key is missing or unknown, or the model cannot be built;
            the message names file and reason.
    """
    try:
        with path.open("rb") as file:
            given = tomllib.load(file)
        twin = given.pop("tiny", {})
        if unknown := sorted(set(twin) - set(SECTIONS)):
            raise ValueError(f"tiny has unknown sections {unknown}, allowed are {list(SECTIONS)}")
        setup = _checked(given, twin if tiny else {})
        # Arguments are judged by who takes them.
        with torch.random.fork_rng(devices=[]):
            setup.build()
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return setup


def _checked(given: dict[str, Any], twin: Mapping[str, Any]) -> Setup:
    if set(given) != {"dataset", *SECTIONS}:
        raise ValueError(f"a setup has {['dataset', *SECTIONS]} and perhaps tiny, got {sorted(given)}")
    if given["dataset"] not in DATA:
        raise ValueError(f"dataset must be one of {sorted(DATA)}, got {given['dataset']!r}")
    setup = Setup(given["dataset"], *({**given[s], **twin.get(s, {})} for s in SECTIONS))
    if unknown := sorted(set(setup.data) - DATA[setup.dataset]):
        raise ValueError(f"data has unknown keys {unknown}, allowed are {sorted(DATA[setup.dataset])}")
    if unknown := sorted(set(setup.data.get("augment", [])) - set(AUGMENTATIONS)):
        raise ValueError(f"augment has {unknown}, allowed are {sorted(AUGMENTATIONS)}")
    missing = [f"{s}.{k}" for s, k in (("data", "size"), ("model", "decomposition")) if k not in getattr(setup, s)]
    if missing:
        raise ValueError(f"{missing} are missing")
    known = {"epochs", *inspect.signature(fit).parameters}
    if unknown := sorted(set(setup.training) - known):
        raise ValueError(f"training has unknown keys {unknown}, allowed are epochs and the arguments of fit")
    return setup
