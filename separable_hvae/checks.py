"""Checks of arguments, in the same words everywhere: what came, and what is allowed."""

import math
from collections.abc import Callable
from typing import Literal

import torch

Allowed = Literal["positive", "positive and finite", "at least 0 and finite", "in [0, 1)"]

_RANGES: dict[Allowed, Callable[[float], bool]] = {
    "positive": lambda v: v > 0,
    "positive and finite": lambda v: 0 < v < math.inf,
    "at least 0 and finite": lambda v: 0 <= v < math.inf,
    "in [0, 1)": lambda v: 0 <= v < 1,
}


def check_number(name: str, value: object, allowed: Allowed) -> None:
    """Require an int or a float in a range.

    Raises:
        TypeError: If it is no number; flags are none.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not _RANGES[allowed](value):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_integer(name: str, value: object, least: int) -> None:
    """Require an int of at least ``least``.

    Raises:
        TypeError: If it is no int; flags are none.
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_seed(name: str, value: object) -> None:
    """Require an int of 64 bits, which is what a ``torch.Generator`` takes.

    Raises:
        TypeError: If it is no int.
        ValueError: If it has more bits.
    """
    check_integer(name, value, -(2**63))
    if isinstance(value, int) and value >= 2**64:
        raise ValueError(f"{name} must be below 2^64, got {value}")


def check_flag(name: str, value: object) -> None:
    """Raise a ``TypeError`` unless the value is ``True`` or ``False``: the text ``"no"`` would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_callable(name: str, value: object, form: str) -> None:
    """Raise a ``TypeError`` unless the value can be called; ``form`` says how it will be."""
    if not callable(value):
        raise TypeError(f"{name} must be a callable {form}, got {value!r}")


def check_instance(name: str, value: object, kind: type) -> None:
    """Raise a ``TypeError`` unless the value is an instance of ``kind``, a class itself being none."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__.startswith(("A", "E", "HV", "I", "O")) else "a"
        came = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {came}")


def check_generator(generator: object) -> None:
    """Raise a ``TypeError`` unless it is a ``torch.Generator`` or ``None``; a seed is none."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
