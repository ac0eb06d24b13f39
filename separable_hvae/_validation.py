"""Checks of arguments, in the same words everywhere: what came, and what is allowed.

Numbers of numpy count as numbers, and come back as Python's own: a configuration is JSON.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Allowed = Literal["positive", "positive and finite", "at least 0 and finite", "in [0, 1)"]

_RANGES: dict[Allowed, Callable[[float], bool]] = {
    "positive": lambda v: v > 0,
    "positive and finite": lambda v: 0 < v < math.inf,
    "at least 0 and finite": lambda v: 0 <= v < math.inf,
    "in [0, 1)": lambda v: 0 <= v < 1,
}


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; flags and tensors are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number; flags and tensors are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(name: str, value: object, allowed: Allowed) -> float:
    """Return a number in a range, as an int or a float.

    Raises:
        TypeError: If it is no number; flags are none.
        ValueError: If it is out of range.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    number = int(value) if is_integer(value) else float(value)
    if not _RANGES[allowed](number):
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def check_integer(name: str, value: object, least: int) -> int:
    """Return an integer of at least ``least``, as an int.

    Raises:
        TypeError: If it is no integer; flags are none.
        ValueError: If it is too small.
    """
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_seed(name: str, value: object) -> int:
    """Return an integer of 64 bits, which is what a ``torch.Generator`` takes, as an int.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it has more bits.
    """
    seed = check_integer(name, value, -(2**63))
    if seed >= 2**64:
        raise ValueError(f"{name} must be below 2^64, got {seed}")
    return seed


def check_flag(name: str, value: object) -> None:
    """Raise a ``TypeError`` unless the value is ``True`` or ``False``: the text ``"no"`` would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_callable(name: str, value: object, form: str) -> None:
    """Raise a ``TypeError`` unless the value can be called; ``form`` says how it will be."""
    if not callable(value):
        raise TypeError(f"{name} must be a callable {form}, got {shown(value)}")


def check_instance(name: str, value: object, kind: type) -> None:
    """Raise a ``TypeError`` unless the value is an instance of ``kind``, a class itself being none."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {with_article(kind)}, got {came(value)}")


def came(value: object) -> str:
    """What came where an instance of something else was wanted; for an array, what makes a tensor of it."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    return f"{kind}: make it a tensor with torch.from_numpy" if isinstance(value, np.ndarray) else kind


def came_as(value: object) -> str:
    """The dtype of what came where a tensor of another one was wanted, or what came instead of a tensor."""
    return str(value.dtype) if isinstance(value, Tensor) else came(value)


def shown(value: object) -> str:
    """A wrong value in one line: tensors and arrays by shape and dtype, classes by name."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{with_article(type(value))} of shape {tuple(value.shape)}, {value.dtype}"
    return repr(value)


def with_article(kind: type) -> str:
    """The name of a class with its article, as it is spoken."""
    return f"{'an' if kind.__name__.startswith(('A', 'E', 'HV', 'I', 'O', 'nd')) else 'a'} {kind.__name__}"


def listed(value: object) -> object:
    """An array of numpy as a list, anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def check_generator(generator: object) -> None:
    """Raise a ``TypeError`` unless it is a ``torch.Generator`` or ``None``; a seed is none."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {shown(generator)}")


def plain(name: str, value: Any) -> Any:
    """Return ``value`` as JSON gives it back: sequences become lists, numbers of numpy those of Python.

    Raises:
        TypeError: If JSON cannot hold it, or only as something else.
    """
    if isinstance(value, (list, tuple)):
        return [plain(name, v) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: plain(name, v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, str)):
        return value
    if is_number(value) and math.isfinite(value):
        return int(value) if is_integer(value) else float(value)
    shown = type(value).__name__ if isinstance(value, (Tensor, nn.Module)) else repr(value)
    raise TypeError(f"{name} holds {shown}, which JSON cannot hold")


def constructor_arguments(made: object) -> dict[str, Any]:
    """Arguments that build an object again, as JSON holds them: for each, the attribute of the same name.

    Raises:
        TypeError: If an attribute is missing or JSON cannot hold it; the object's class is to override ``config``.
    """
    kind, arguments = type(made).__name__, {}
    for name, parameter in inspect.signature(type(made)).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{kind} cannot tell what its argument {parameter} was: override its config()")
        if not hasattr(made, name):
            raise TypeError(f"{kind} has no attribute {name!r} for its argument: set it, or override its config()")
        try:
            arguments[name] = plain(f"{kind}.{name}", getattr(made, name))
        except TypeError as error:
            raise TypeError(f"{error}: override its config()") from error
    return arguments


T = TypeVar("T")


def instance_of(name: str, value: Any, known: Mapping[str, Callable[[], T]], base: type[T]) -> T:
    """Return the instance that ``value`` is or names.

    Raises:
        TypeError: If it is neither a name nor an instance of ``base``.
        ValueError: If the name is unknown.
    """
    if isinstance(value, str):
        if value not in known:
            raise ValueError(f"{name} must be one of {sorted(known)} or {with_article(base)}, got {value!r}")
        return known[value]()
    if not isinstance(value, base):
        hint = f": call it, {value.__name__}(…)" if isinstance(value, type) and issubclass(value, base) else ""
        raise TypeError(f"{name} must be a name or {with_article(base)}, got {shown(value)}{hint}")
    return value
