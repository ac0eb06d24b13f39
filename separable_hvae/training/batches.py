"""Batch k of a training run: a function of the seed and k alone, or whatever a stream gives next."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from typing_extensions import override

from separable_hvae._validation import came
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import check_finite, pack
from separable_hvae.model.batches import (
    Batch,
    check_batch,
    check_conditions,
    check_signals,
    index_batch,
    is_tensor_pair,
    map_tensors,
    split_pair,
)
from separable_hvae.model.hvae import HVAE
from separable_hvae.training.graceful_stop import iterate
from separable_hvae.training.options import Data

_LOOKED_AT = 64
_AHEAD = 16  # Batches of a stream that are held, until they are trained on, to calibrate on.


class Batches(ABC):
    """The batches of one process.

    Attributes:
        fingerprint: What a checkpoint knows of them.
        may_end: Whether they may come to an end.
    """

    fingerprint: dict[str, Any]
    may_end = False

    @abstractmethod
    def first(self, n: int) -> Iterator[Batch]:
        """The first signals, ``n`` or a batch more at most."""

    @abstractmethod
    def start_at(self, step: int) -> Iterator[Batch]:
        """Batches from this step on."""


def batches_of(
    model: HVAE, data: Data, batch_size: int, seed: int, workers: int, rank: int, world: int
) -> "IndexedBatches | StreamedBatches":
    """The batches of data of whatever kind, see :class:`IndexedBatches` and :class:`StreamedBatches`.

    Raises:
        TypeError: If the data are of no kind that can be trained on, or their dtype does not fit.
        ValueError: If there are too few signals, or they do not fit the model or are not finite.
    """
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
    if isinstance(data, (Mapping, np.ndarray, str, bytes)) or not (indexed or hasattr(data, "__iter__")):
        raise TypeError(
            "data must be a tensor (N, C, *size), a map-style dataset of tensors, or an iterable of batches, got "
            f"{came(data)}"
        )
    if not indexed or _is_list_of_batches(data, model.decomp):
        return StreamedBatches(model, cast(Iterable[Any], data), rank, world)
    return IndexedBatches(model, data, batch_size, seed, workers, rank, world)


def _is_list_of_batches(data: Any, decomp: Decomposition) -> bool:
    if not isinstance(data, (list, tuple)) or not data or is_tensor_pair(data, decomp):
        return False
    first, _ = split_pair(data[0])
    return isinstance(first, Tensor) and first.ndim == decomp.dims + 2


class IndexedBatches(Batches):
    """Batch k of a run, as a function of the seed and k alone.

    Args:
        model: Says what signals are allowed, and where they go.
        data: Signals ``(N, C, *size)``, alone or in a tuple with their condition, which move to the model's device as
            a whole, or a dataset of signals, or of pairs of a signal and its condition.
        batch_size: Signals of one process's batch.
        seed: Seed of the order.
        workers: Processes that load a dataset.
        rank: Number of this process.
        world: Number of processes.

    Attributes:
        fingerprint: Size of the batches, number and checksum of the signals and conditions; of a dataset's, the
            checksum of the first 64, or ``None`` where these change from one look to the next, as random transforms
            make them.
    """

    def __init__(
        self, model: HVAE, data: Data, batch_size: int, seed: int, workers: int, rank: int, world: int
    ) -> None:
        self.batch, self.seed, self.workers = batch_size, seed, workers
        self.rank, self.world, self.decomp = rank, world, model.decomp
        self.dataset, self.tensors = cast(Dataset[Any], data), cast(Batch | None, None)
        if isinstance(data, Tensor) or is_tensor_pair(data, model.decomp):
            given = check_batch(data, model.decomp, "data")
            x, condition = split_pair(given)
            if not isinstance(given, Tensor):
                check_conditions(condition, len(x), "data")
            self.tensors = map_tensors(lambda t: t.to(model.device), given)
            check_finite("data", split_pair(self.tensors)[0])
            self.count = len(x)
        else:
            self.count = len(cast(Sequence[Any], data))
        if not self.count:
            raise ValueError("data must hold at least one signal")
        if self.count <= batch_size * (world - 1):
            raise ValueError(
                f"data must hold more than {batch_size * (world - 1)} signals, so that each of {world} processes "
                f"has some in its batches of {batch_size}, got {self.count}"
            )
        looks = [self._look(), self._look()] if self.tensors is None else [_checksum(self.tensors)]
        self.fingerprint = {
            "batch_size": batch_size,
            "count": self.count,
            "checksum": looks[0] if looks[0] == looks[-1] else None,
        }

    @override
    def first(self, n: int) -> Iterator[Batch]:
        for numbers in torch.arange(min(n, self.count), device="cpu").split(self.batch):
            if self.tensors is None:
                yield _Join(self.decomp)([self.dataset[i] for i in numbers.tolist()])
            else:
                yield index_batch(self.tensors, slice(int(numbers[0]), int(numbers[-1]) + 1))

    def _look(self) -> int:
        """Checksum of the first signals of a dataset."""
        total = place = 0
        for batch in self.first(_LOOKED_AT):
            total, place = total + _checksum(batch, place), place + pack(split_pair(batch)[0]).numel()
        return total % 2**64

    def _indices(self, first: int) -> Iterator[Tensor]:
        stride = self.batch * self.world
        per_epoch = max(self.count // stride, 1)
        order, epoch = torch.empty(0, device="cpu"), -1
        for k in range(first, 2**62):
            if k // per_epoch != epoch:
                epoch = k // per_epoch
                generator = torch.Generator().manual_seed(mix(self.seed, epoch, 1 << 20))
                order = torch.randperm(self.count, generator=generator, device="cpu")
            begin = (k % per_epoch) * stride + self.rank * self.batch
            yield order[begin : begin + self.batch]

    @override
    def start_at(self, step: int) -> Iterator[Batch]:
        """Batches from this step on, without end."""
        if self.tensors is not None:
            device = split_pair(self.tensors)[0].device
            for index in self._indices(step):
                yield index_batch(self.tensors, index.to(device))
        else:
            loader = DataLoader(
                self.dataset,
                batch_sampler=cast(Any, _Forward(self._indices(step))),
                collate_fn=_Join(self.decomp),
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator().manual_seed(mix(self.seed, step, 2 << 20)),
            )
            with torch.device("cpu"):  # Where its generator is.
                loaded = iterate(loader)
            yield from loaded


class StreamedBatches(Batches):
    """The batches that an iterable gives, one after the other, in passes.

    What can be iterated time and again, such as a loader, begins a new pass where one ends; an iterator, such as a
    generator, ends for good. A run that resumes begins with a new pass: it may see again what it has seen of the one
    that it had begun. Several processes take turns: each reads all batches, and trains on its own.

    Args:
        model: Says what signals are allowed.
        data: Gives batches, or pairs of one and its condition.
        rank: Number of this process.
        world: Number of processes.
    """

    may_end = True

    def __init__(self, model: HVAE, data: Iterable[Any], rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.fingerprint = {"batch_size": None, "count": None, "checksum": None}
        self._ahead: list[Batch] = []
        self._rest = _passes(data, model.decomp)

    @override
    def first(self, n: int) -> Iterator[Batch]:
        """The first batches, 16 at most, which are trained on later."""
        count = 0
        while count < n and len(self._ahead) < _AHEAD and (batch := next(self._rest, None)) is not None:
            self._ahead.append(batch)
            count += len(split_pair(batch)[0])
            yield batch

    @override
    def start_at(self, step: int) -> Iterator[Batch]:
        """Batches, whatever the step."""
        batches = chain(self._held(), self._rest)
        while len(group := list(islice(batches, self.world))) == self.world:
            yield group[self.rank]

    def _held(self) -> Iterator[Batch]:
        while self._ahead:
            yield self._ahead.pop(0)


def _passes(data: Iterable[Any], decomp: Decomposition) -> Iterator[Batch]:
    """Checked batches of as many passes as there are."""
    any_came = False
    while True:
        came_now = False
        for item in iterate(data) if isinstance(data, DataLoader) else data:
            any_came = came_now = True
            batch = check_batch(item, decomp, "data")
            check_finite("data", split_pair(batch)[0])
            yield batch
        if not any_came:
            raise ValueError("data must hold at least one signal, got no batch of them")
        if not came_now or isinstance(data, Iterator):
            return


@dataclass
class _Forward:
    indices: Iterator[Tensor]

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in self.indices)


@dataclass
class _Join:
    """Make a batch of a dataset's items, in the process that loaded them."""

    decomp: Decomposition

    def __call__(self, items: Sequence[Any]) -> Batch:
        signals, conditions = zip(*map(split_pair, items), strict=True)
        paired = {item is not x for item, x in zip(items, signals, strict=True)}
        shape = (self.decomp.channels, *self.decomp.size)
        for x in signals:
            if not isinstance(x, Tensor):
                hint = ": keep the signal alone, item[0]" if isinstance(x, (tuple, list)) else ""
                raise TypeError(
                    "data must be a dataset of tensors (C, *size), or of pairs of one and its condition, got an item "
                    f"of {came(x)}{hint}"
                )
            if tuple(x.shape) != shape:
                raise ValueError(f"data must hold signals of shape {shape}, got an item of shape {tuple(x.shape)}")
            if x.dtype != signals[0].dtype:
                raise TypeError(f"data must hold signals of one dtype, got {signals[0].dtype} and {x.dtype}")
        if len(paired) > 1:
            raise TypeError(
                "data must be a dataset of tensors or one of pairs with a condition, got both kinds of items"
            )
        joined = check_signals(default_collate([x.detach() for x in signals]), self.decomp, "data")
        check_finite("data", joined)
        if not all(paired):
            return joined
        try:
            return joined, default_collate([map_tensors(Tensor.detach, condition) for condition in conditions])
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"the conditions in data cannot be put into one batch: {error}") from error


def mix(*numbers: int) -> int:
    """One seed from several numbers, spread over 63 bits."""
    mixed = 0
    for n in numbers:
        mixed = ((mixed ^ n) * 6364136223846793005 + 1442695040888963407) % 2**64
    return mixed >> 1


def _checksum(batch: Batch, place: int = 0) -> int:
    """Checksum of signals and of whatever tensors are in their condition."""
    x, condition = split_pair(batch)
    total, tensors = checksum(x, place), list[Tensor]()
    map_tensors(lambda t: tensors.append(t) or t, condition)  # type: ignore[func-returns-value]
    return (total + sum(checksum(t, i + place) for i, t in enumerate(tensors, 1))) % 2**64


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(x: Tensor, place: int = 0) -> int:
    """A number of 64 bits that changes with any bit of ``x`` and its place, the same on every device.

    It is Σ_i (2 i' + 1) b_i modulo 2^64 over the entries' bits b, where i' is i spread over 63 bits: exact
    integer arithmetic, so no order of summation matters, and checksums of parts add up.

    Args:
        x: Real or complex numbers.
        place: Real entries that come before those of ``x``.
    """
    bits = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).detach().contiguous().flatten()
    bits = bits.view(_BITS[bits.itemsize])
    total = 0
    for start in range(0, len(bits), 1 << 22):
        part = bits[start : start + (1 << 22)].long()
        i = torch.arange(place + start, place + start + len(part), device=x.device) * 0x1E3779B97F4A7C15
        total += int(((2 * i + 1) * part).sum())
    return total % 2**64
