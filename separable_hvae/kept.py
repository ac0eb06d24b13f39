"""The tensors that a user's code keeps beside those it is given.

What was compiled with them is of no use once one is exchanged or written.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor
from typing_extensions import override

_DEPTH = 8
_MANY = 1000


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor as it was: equal only to the same one, unwritten since."""

    tensor: Tensor
    version: int

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and self.tensor is other.tensor and self.version == other.version

    @override
    def __hash__(self) -> int:
        return hash((id(self.tensor), self.version))


def kept_by(code: object) -> tuple[Kept, ...]:
    """The tensors within reach of a callable: in closures, defaults, attributes and containers of up to 1,000."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    level: list[Any] = [code]
    for _ in range(_DEPTH):
        level = [thing for thing in level if id(thing) not in seen]
        seen.update(map(id, level))
        found |= {id(thing): thing for thing in level if isinstance(thing, Tensor)}
        level = [part for thing in level for part in _parts(thing)]
    return tuple(Kept(t, -1 if t.is_inference() else t._version) for t in found.values())


def _parts(thing: Any) -> Iterable[Any]:
    """What a thing consists of, where it may hold tensors."""
    if isinstance(thing, (Tensor, type, ModuleType, str)):
        return ()
    if isinstance(thing, Mapping):
        return thing.values() if len(thing) <= _MANY else ()
    if isinstance(thing, (list, tuple, set, frozenset)):
        return thing if len(thing) <= _MANY else ()
    if isinstance(thing, functools.partial):
        return thing.func, thing.args, thing.keywords
    if isinstance(thing, MethodType):
        return thing.__self__, thing.__func__
    if isinstance(thing, FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if not _is_empty(cell)]
        return cells, thing.__defaults__, thing.__kwdefaults__
    return (getattr(thing, "__dict__", None),)


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
