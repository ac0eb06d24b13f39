"""What data give: batches of signals, or pairs of such a batch and its condition.

A condition is a tensor, or any nesting of tuples, lists and dictionaries of tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from separable_hvae._validation import came
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import check_finite

Batch: TypeAlias = Tensor | tuple[Tensor, Any]
"""Signals ``(B, C, *size)``, or a pair of them and their condition."""


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a nested structure with each of its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(change, v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(change, v) for v in value)
    return value


def split_pair(batch: Any) -> tuple[Any, Any]:
    """The signals of a batch and their condition, ``None`` where it has none."""
    return (batch[0], batch[1]) if _is_pair(batch) else (batch, None)


def check_batch(batch: Any, decomp: Decomposition, name: str) -> Batch:
    """Return a batch, or a pair of one and its condition, as plain tensors without a graph.

    Raises:
        TypeError: If it is neither, or its dtype does not fit the decomposition.
        ValueError: If its shape does not fit, or it holds no signal.
    """
    if isinstance(batch, (tuple, list)) and not _is_pair(batch):
        raise TypeError(
            f"{name} must give batches (B, C, *size) or pairs of one and its condition, got a {type(batch).__name__} "
            f"of {len(batch)}{': keep the signals alone, item[0]' if batch else ''}"
        )
    x, condition = split_pair(batch)
    x = check_signals(x, decomp, name)
    return (x, map_tensors(Tensor.detach, condition)) if _is_pair(batch) else x


def check_signals(x: Any, decomp: Decomposition, name: str) -> Tensor:
    """Return signals ``(B, C, *size)`` as a plain tensor without a graph, see :meth:`Decomposition.check_signal`."""
    if isinstance(x, Tensor):
        if x.is_meta or x.is_nested or x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor that holds numbers, got one of {x.layout} on {x.device}")
        x = x.detach().as_subclass(Tensor)
        shape = (decomp.channels, *decomp.size)
        if tuple(x.shape) == shape:
            raise ValueError(
                f"{name} must have shape (B, {', '.join(map(str, shape))}), got {shape}: signals without a batch "
                "axis, which x[None] adds to one of them and a DataLoader to those of a data set"
            )
    return decomp.check_signal(x, name)


def checked_batches(
    data: Batch | Iterable[Any],
    decomp: Decomposition,
    device: torch.device,
    batch_size: int = 256,
    name: str = "data",
) -> Iterator[tuple[Tensor, Any]]:
    """Batches ``(B, C, *size)`` with their conditions, ``None`` where there is none, that have been checked.

    Args:
        data: Signals ``(N, C, *size)``, a tuple of such and their condition, or batches of either, which stay as
            they are.
        decomp: The decomposition.
        device: Where they go.
        batch_size: Signals in each batch of a tensor.
        name: What errors call the data.

    Raises:
        TypeError: If ``data`` are of another kind.
        ValueError: If they do not fit the decomposition, are none or not finite.
    """
    if isinstance(data, Tensor):
        data = data.split(batch_size) if data.ndim else [data]
    elif isinstance(data, tuple) and is_tensor_pair(data, decomp):
        check_conditions(data[1], len(data[0]), name)
        data = [index_batch(data, slice(i, i + batch_size)) for i in range(0, max(len(data[0]), 1), batch_size)]
    try:
        batches = iter(data)
    except TypeError:
        raise TypeError(
            f"{name} must be a tensor (N, C, *size) or an iterable of such batches, got {came(data)}"
        ) from None
    count = 0
    for batch in batches:
        x, condition = split_pair(check_batch(batch, decomp, name))
        x = x.to(device)
        check_finite(name, x)
        count += len(x)
        yield x, map_tensors(lambda t: t.to(device), condition)
    if not count:
        raise ValueError(f"{name} must hold at least one signal")


def is_tensor_pair(data: object, decomp: Decomposition) -> bool:
    """Whether data are a tuple of signals ``(N, C, *size)`` and their condition: lists hold batches or signals."""
    return isinstance(data, tuple) and _is_pair(data) and data[0].ndim == decomp.dims + 2


def check_conditions(condition: Any, count: int, name: str) -> None:
    """Require a nesting of tensors, each with an entry for each signal.

    Raises:
        TypeError: If something else is in it.
        ValueError: If a tensor has another length.
    """
    if isinstance(condition, Mapping):
        condition = list(condition.values())
    if isinstance(condition, (tuple, list)):
        for part in condition:
            check_conditions(part, count, name)
    elif not isinstance(condition, Tensor):
        raise TypeError(f"the condition in {name} must be a tensor, or nested tensors, got {came(condition)}")
    elif not condition.ndim or len(condition) != count:
        raise ValueError(
            f"the condition in {name} must have an entry for each of the {count} signals, got shape "
            f"{tuple(condition.shape)}"
        )


def index_batch(batch: Batch, index: Any) -> Batch:
    """The signals of this index, and their condition where there is one."""
    x, condition = split_pair(batch)
    return x[index] if isinstance(batch, Tensor) else (x[index], map_tensors(lambda t: t[index], condition))


def _is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], Tensor)
