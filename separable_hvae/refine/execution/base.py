"""Execution: how the pieces of a problem run.

Eager       one after the other, or on threads
Compiled    each traced with its gradient and compiled, see :mod:`separable_hvae.refine.execution.compiled`
CudaGraphs  recorded and replayed, see :mod:`separable_hvae.refine.execution.cuda_graphs`
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae._float32 import float32_settings
from separable_hvae._validation import check_integer
from separable_hvae.model.hvae import HVAE
from separable_hvae.refine.pieces import Call, Outcome

T = TypeVar("T")
Gradient = tuple[list[Tensor], Outcome]
Function = Callable[[Sequence[Tensor]], Any]
"""Maps tensors to any structure of tensors."""


class Execution(ABC):
    """How the pieces of a problem run."""

    @abstractmethod
    def gradients(self, calls: Sequence[Call]) -> list[Gradient]:
        """Gradients and outcome of each call."""

    def values(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcome of each call, without gradients."""
        return [call.value() for call in calls]

    def inference(self, key: Hashable, model: HVAE, infer: Function, tensors: Sequence[Tensor]) -> Any:
        """The result of a whole inference that depends on these tensors, the model, and what ``key`` tells apart."""
        return infer(tensors)


class Threaded(Execution):
    """An execution that shares the pieces of a step among threads on a CPU."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = None if threads is None else check_integer("threads", threads, 1)

    def _workers(self, calls: Sequence[Call]) -> int:
        if calls[0].moving[0].device.type != "cpu":
            return 1
        return min(self.threads or torch.get_num_threads(), len(calls))

    def _map(self, work: Callable[[T], Gradient], tasks: Sequence[T], workers: int) -> list[Gradient]:
        if workers < 2:
            return [work(task) for task in tasks]
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def alike(task: T) -> Gradient:
            # Autocast is a matter of each thread.
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                return work(task)

        # The finest pieces are the longest: they go first.
        return list(_pool(workers).map(alike, reversed(tasks)))[::-1]


class Eager(Threaded):
    """Operation by operation.

    Args:
        threads: Threads that share the pieces of a step on a CPU; ``None`` takes ``torch.get_num_threads()``.
            More than one pays where pieces are many and layers are wide: Python itself runs on one.
    """

    @override
    def gradients(self, calls: Sequence[Call]) -> list[Gradient]:
        return self._map(Call.gradient, calls, self._workers(calls))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that use one core each."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "refine")
    barrier = Barrier(workers)

    def start() -> None:
        torch.set_num_threads(1)
        barrier.wait()

    for started in [pool.submit(start) for _ in range(workers)]:
        started.result()
    # A worker's setting is its own, but threads that start later would inherit it.
    torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):
    # A forked process has the pools without their threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def signature(tensors: Sequence[Tensor]) -> Hashable:
    """Shapes, dtypes and devices."""
    return tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)


def precision() -> Hashable:
    """What a trace depends on beside its tensors."""
    kinds = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return (*kinds, float32_settings())
