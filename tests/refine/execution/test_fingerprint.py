"""Keys of what code depends on: they change when it does, and only then."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae.refine.execution.fingerprint import fingerprint


@dataclass(slots=True)
class Slotted:
    value: Any


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value

    def method(self) -> Any:
        return self.value


class Deep(nn.Module):
    """A module that refuses to be pickled."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer("tensor", tensor)

    @override
    def __getstate__(self) -> Any:
        raise RuntimeError


def closing_over(value: Any, depth: int) -> Callable[[], Any]:
    return (lambda: value) if depth == 0 else closing_over(closing_over(value, depth - 1), 0)


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "closure": lambda value: closing_over(value, 0),
    "closures": lambda value: closing_over(value, 20),
    "default": lambda value: lambda x=value: x,
    "method": lambda value: Plain(value).method,
    "slots": Slotted,
    "partial": lambda value: partial(max, value),
    "containers": lambda value: {"a": [({"b": value},)]},
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("values", [(1, 50), (1.0, 1.5), (True, False), ("a", "b"), ({1}, {2}), (1, 1.0)], ids=str)
def test_values_are_found_wherever_they_are(hold: Callable[[Any], Any], values: tuple[Any, Any]) -> None:
    one, other = values
    assert fingerprint(hold(one)) == fingerprint(hold(one))
    assert hash(fingerprint(hold(one))) == hash(fingerprint(hold(one)))
    assert fingerprint(hold(one)) != fingerprint(hold(other))


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_tensors_are_found_wherever_they_are(hold: Callable[[Any], Any]) -> None:
    for tensor in (torch.ones(3), np.ones(3)):
        module = nn.Sequential(nn.Sequential(Deep(tensor))) if isinstance(tensor, Tensor) else tensor
        for held in (hold(tensor), hold(module)):
            before = fingerprint(held)
            assert fingerprint(held) == before
            tensor[1] = tensor[1] + 1
            assert fingerprint(held) != before
    assert fingerprint(hold(torch.ones(3))) != fingerprint(hold(torch.ones(3)))


def test_code_counts_and_cycles_end() -> None:
    this = Plain(None)
    this.value = [this, lambda: this]
    assert fingerprint(this) == fingerprint(this)
    assert fingerprint(lambda x: x + 1) != fingerprint(lambda x: x - 1)
