"""What code of a user's depends on beside what it is given, as a key.

What was compiled or recorded is of no use once a tensor in reach was exchanged or written, or a number changed.
"""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

Fingerprint = tuple[Hashable, ...]

_VALUES = (int, float, complex, str, bytes, NoneType)
_MANY = 1000


@dataclass(frozen=True, eq=False)
class _Same:
    """A thing as it was: equal only to the same one and, if it is a tensor, unwritten since."""

    thing: object
    version: int

    @classmethod
    def now(cls, thing: object) -> "_Same":
        return cls(thing, thing._version if isinstance(thing, Tensor) and not thing.is_inference() else 0)

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing and self.version == other.version

    @override
    def __hash__(self) -> int:
        return hash((id(self.thing), self.version))


def fingerprint(thing: object, same: Sequence[object] = ()) -> Fingerprint:
    """All that is within reach of a callable or another object as it is now: with equal keys, it does the same.

    Numbers and strings count by value, objects by their class and attributes, functions by their code and what
    they close over, tensors by being the same, unwritten since. Not looked into are globals, classes, containers
    of more than 1,000 things, and whatever shows no attributes: these count by being the same.

    Args:
        thing: The object.
        same: Objects that count by being the same, too.
    """
    found: list[Hashable] = []
    seen: dict[int, tuple[int, object]] = {}  # With the things: what is freed leaves its address to others.
    left: list[Any] = [thing]
    while left:
        thing = left.pop()
        if isinstance(thing, _VALUES):
            found.append((type(thing), thing))
        elif id(thing) in seen:
            found.append(seen[id(thing)][0])
        else:
            seen[id(thing)] = len(seen), thing
            mark, parts = (_Same.now(thing), ()) if any(thing is other for other in same) else _opened(thing)
            found.append((type(thing), mark, len(parts)))
            left.extend(reversed(parts))
    return tuple(found)


def _opened(thing: Any) -> tuple[Hashable, Sequence[Any]]:
    """What tells a thing from others of its type, and what it consists of."""
    if isinstance(thing, (list, tuple, set, frozenset, deque)) and len(thing) <= _MANY:
        return None, tuple(thing)
    if isinstance(thing, Mapping) and len(thing) <= _MANY:
        return tuple(thing), tuple(thing.values())
    if isinstance(thing, np.ndarray):
        return (str(thing.dtype), thing.shape, thing.tobytes()), ()
    if isinstance(thing, CellType):
        try:
            return None, (thing.cell_contents,)
        except ValueError:
            return None, ()
    if isinstance(thing, MethodType):
        return None, (thing.__self__, thing.__func__)
    if isinstance(thing, (Tensor, type, ModuleType)):
        return _Same.now(thing), ()
    # Without a user's own way of pickling, which may leave things out or refuse.
    attributes = object.__getstate__(thing)
    if isinstance(thing, FunctionType):
        return thing.__code__, (thing.__closure__, thing.__defaults__, thing.__kwdefaults__, attributes)
    if isinstance(thing, partial):
        return None, (thing.func, thing.args, thing.keywords, attributes)
    return (_Same.now(thing), ()) if attributes is None and not is_dataclass(thing) else (None, (attributes,))
