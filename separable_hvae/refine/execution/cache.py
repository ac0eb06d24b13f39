"""What is expensive to make, kept for the next time: the things that were used last."""

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class LRUCache(OrderedDict[Hashable, T]):
    """Things by key, the one that was used last at the end.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def take(self, key: Hashable, fits: Callable[[T], bool], make: Callable[[], T]) -> T:
        """The thing of this key, made anew if there is none that fits."""
        thing = self.pop(key, None)
        if thing is None or not fits(thing):
            thing = make()
        self[key] = thing
        if len(self) > self.most:
            self.popitem(last=False)
        return thing


Place = tuple[Mapping[str, Any], str]
"""What holds a tensor or a module, and its key there."""


class WeightGuard:
    """Parameters and buffers of a model.

    Args:
        model: The model.
        names: Full names of those that are read; ``None`` takes all.

    Attributes:
        names: Their names.
        plain: The tensors, with the usual strides where any would do.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None) -> None:
        places = _places(model)
        self.names = list(places if names is None else names)
        self._places, self._way = [places[name] for name in self.names], _way(model, self.names)
        self._modules = _found(self._way)
        self._look()
        self._kinds = self._kinds_now()

    def stayed(self) -> bool:
        """Whether the same tensors are there as at the last look, with their numbers where they were."""
        return self._same_modules() and _identical(_found(self._places), self._tensors) and self._at == self._at_now()

    def fit(self) -> bool:
        """Look at what is there now; whether it is still of the kind that it was at first."""
        if self.stayed():
            return True
        if not self._same_modules() or any(t is None for t in _found(self._places)):
            return False
        self._look()
        return self._kinds == self._kinds_now()

    def _look(self) -> None:
        self._tensors: list[Tensor] = _found(self._places)
        self._at = self._at_now()
        self.plain = [plain(t.detach()) for t in self._tensors]

    def _same_modules(self) -> bool:
        return _identical(_found(self._way), self._modules)

    def _at_now(self) -> tuple[list[int], list[tuple[int, ...]]]:
        """Addresses and strides, which assigning ``data`` changes without another tensor being there."""
        return list(map(Tensor.data_ptr, self._tensors)), list(map(Tensor.stride, self._tensors))

    def _kinds_now(self) -> list[tuple[torch.dtype, torch.device, tuple[int, ...]]]:
        return [(t.dtype, t.device, t.stride()) for t in self._tensors]


def plain(tensor: Tensor) -> Tensor:
    """The tensor with the usual strides on axes of one point, where any would do: compilers take them literally."""
    if not tensor.is_contiguous():
        return tensor
    strides = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim))
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def _found(places: Iterable[Place]) -> list[Any]:
    return [own.get(key) for own, key in places]


def _identical(one: Sequence[object], other: Sequence[object]) -> bool:
    return all(map(operator.is_, one, other))


def _places(model: nn.Module) -> dict[str, Place]:
    """Where a model keeps each parameter and buffer, by full name."""
    places: dict[str, Place] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    places[f"{prefix}.{key}" if prefix else key] = own, key
    return places


def _way(model: nn.Module, names: Iterable[str]) -> list[Place]:
    """Where the modules on the way to tensors are kept."""
    way: dict[str, Place] = {}
    for name in names:
        module, path = model, ""
        for part in name.split(".")[:-1]:
            path += f".{part}"
            way[path] = module._modules, part
            module = module.get_submodule(part)
    return list(way.values())
