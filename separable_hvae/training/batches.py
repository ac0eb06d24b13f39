"""Batch k of a training run, as a function of the seed and k alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from separable_hvae._validation import came
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import check_finite, pack
from separable_hvae.model.hvae import HVAE

_LOOKED_AT = 64


class Batches:
    """Batch k of a run, as a function of the seed and k alone.

    Args:
        model: Says what signals are allowed, and where they go.
        data: Signals ``(N, C, *size)``, which move to the model's device as a whole, or a dataset of signals.
        batch_size: Signals of one process's batch.
        seed: Seed of the order.
        workers: Processes that load a dataset.
        rank: Number of this process.
        world: Number of processes.

    Attributes:
        fingerprint: Number and checksum of the signals; of a dataset's, the checksum of the first 64, or
            ``None`` where these change from one look to the next, as random transforms make them.

    Raises:
        TypeError: If the data are neither a tensor nor a map-style dataset, or their dtype does not fit.
        ValueError: If there are too few signals, or they do not fit the model or are not finite.
    """

    def __init__(
        self,
        model: HVAE,
        data: "Tensor | Dataset[Tensor]",
        batch_size: int,
        seed: int,
        workers: int,
        rank: int,
        world: int,
    ) -> None:
        self.data, self.batch, self.seed, self.workers = data, batch_size, seed, workers
        self.rank, self.world, self.decomp = rank, world, model.decomp
        if isinstance(data, Tensor):
            self.data = model.decomp.check_signal(data, "data").to(model.device)
            check_finite("data", self.data)
        elif isinstance(data, (IterableDataset, Mapping, np.ndarray)) or not _is_indexed(data):
            hint = ": pass its dataset, and batch_size and workers to fit" if isinstance(data, DataLoader) else ""
            raise TypeError(
                f"data must be a tensor (N, C, *size) or a map-style dataset of tensors, got {came(data)}{hint}"
            )
        self.count = len(cast(Sequence[Tensor], data))
        if not self.count:
            raise ValueError("data must hold at least one signal")
        if self.count <= batch_size * (world - 1):
            raise ValueError(
                f"data must hold more than {batch_size * (world - 1)} signals, so that each of {world} processes "
                f"has some in its batches of {batch_size}, got {self.count}"
            )
        looks = [checksum(self.data)] if isinstance(self.data, Tensor) else [self._look(), self._look()]
        self.fingerprint = {"count": self.count, "checksum": looks[0] if looks[0] == looks[-1] else None}

    def first(self, n: int) -> Iterator[Tensor]:
        """The first signals, at most ``n``, in batches."""
        if isinstance(self.data, Tensor):
            yield from self.data[:n].split(self.batch)
            return
        for numbers in torch.arange(min(n, self.count), device="cpu").split(self.batch):
            yield _Join(self.decomp)([self.data[i] for i in numbers.tolist()])

    def _look(self) -> int:
        """Checksum of the first signals of a dataset."""
        total = place = 0
        for batch in self.first(_LOOKED_AT):
            total, place = total + checksum(batch, place), place + pack(batch).numel()
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

    def start_at(self, step: int) -> Iterator[Tensor]:
        """Batches from this step on, without end."""
        if isinstance(self.data, Tensor):
            for index in self._indices(step):
                yield self.data[index.to(self.data.device)]
        else:
            loader = DataLoader(
                self.data,
                batch_sampler=cast(Any, _Forward(self._indices(step))),
                collate_fn=_Join(self.decomp),
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator().manual_seed(mix(self.seed, step, 2 << 20)),
            )
            with torch.device("cpu"):  # Where its generator is.
                loaded = iter(loader)
            yield from loaded


@dataclass
class _Forward:
    indices: Iterator[Tensor]

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in self.indices)


@dataclass
class _Join:
    """Make a batch of a dataset's items, in the process that loaded them."""

    decomp: Decomposition

    def __call__(self, items: Sequence[Tensor]) -> Tensor:
        shape = (self.decomp.channels, *self.decomp.size)
        for item in items:
            if not isinstance(item, Tensor):
                hint = ": keep the signal alone, item[0]" if isinstance(item, (tuple, list)) else ""
                raise TypeError(f"data must be a dataset of tensors (C, *size), got an item of {came(item)}{hint}")
            if tuple(item.shape) != shape:
                raise ValueError(f"data must hold signals of shape {shape}, got an item of shape {tuple(item.shape)}")
            if item.dtype != items[0].dtype:
                raise TypeError(f"data must hold signals of one dtype, got {items[0].dtype} and {item.dtype}")
        joined = self.decomp.check_signal(default_collate(list(items)), "data")
        check_finite("data", joined)
        return joined


def _is_indexed(data: object) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def mix(*numbers: int) -> int:
    """One seed from several numbers, spread over 63 bits."""
    mixed = 0
    for n in numbers:
        mixed = ((mixed ^ n) * 6364136223846793005 + 1442695040888963407) % 2**64
    return mixed >> 1


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
