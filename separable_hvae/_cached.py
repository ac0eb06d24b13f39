"""Properties that are computed once."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class cached_property(Generic[T]):  # noqa: N801
    """As that of :mod:`functools`, which takes a lock before Python 3.12: ``torch.compile`` cannot trace one."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, owner: Any, _: type) -> T:
        value = self.compute(owner)
        # Traced code computes it each time that it is asked for, and a compiler sees that it is the same.
        if not torch.compiler.is_compiling():
            owner.__dict__[self.compute.__name__] = value
        return value
