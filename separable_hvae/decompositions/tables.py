"""Tensors that follow from a decomposition's arguments: made with it, never learned or saved, and never rounded."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override


class Tables(nn.Module):
    """Non-persistent buffers that are where their module is, and hold what they were made with.

    Neither casts nor ``to_empty`` change them, and a model that was built on the meta device has them
    as soon as it is moved to another. (A device without float64 leaves such a table on the CPU.)

    Args:
        tables: Their numbers by name.
    """

    def __init__(self, tables: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        self._numbers = dict(tables)
        for name, numbers in tables.items():
            self.register_buffer(name, torch.as_tensor(numbers), persistent=False)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, numbers in self._numbers.items():
            before = self.get_buffer(name).device
            device = fn(torch.empty(0, device=before)).device
            if device != before and not (device.type == "mps" and numbers.dtype == "float64"):
                self._buffers[name] = torch.as_tensor(numbers, device=device)
        return self
