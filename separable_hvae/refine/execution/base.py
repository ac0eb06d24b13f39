"""Execution: how the objectives of a problem are evaluated.

Eager       one after the other, or on threads
Compiled    each traced with its gradient and compiled, see :mod:`separable_hvae.refine.execution.compiled`
CudaGraphs  recorded and replayed, see :mod:`separable_hvae.refine.execution.cuda_graphs`
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import cache
from itertools import starmap
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from separable_hvae._float32 import float32_settings
from separable_hvae._validation import check_integer
from separable_hvae.model.hvae import HVAE
from separable_hvae.refine.execution.fingerprint import fingerprint
from separable_hvae.refine.objective import Objective, ObjectiveValue, value_and_gradient

T = TypeVar("T")
_SHARED = {"model", "misfit", "guidance", "inputs"}
Point = tuple[Objective, list[Tensor]]
"""An objective, and the latents that it is evaluated at."""
Gradient = tuple[ObjectiveValue, list[Tensor]]
Infer = Callable[[Any], T]
Function = Callable[[Sequence[Tensor]], Any]
"""Maps tensors to any structure of tensors."""


class Execution(ABC):
    """How the objectives of a problem are evaluated."""

    @abstractmethod
    def gradients(self, points: Sequence[Point]) -> list[Gradient]:
        """Value and gradients of each objective at its latents."""

    def values(self, points: Sequence[Point]) -> list[ObjectiveValue]:
        """The value of each objective at its latents, without gradients."""
        with torch.no_grad():
            return [objective(latents) for objective, latents in points]

    def inference(self, infer: Infer[T], model: HVAE, settings: Callable[[], object]) -> Infer[T]:
        """A whole inference, or what gives the same.

        Args:
            infer: A pure function of the tensors in its argument, whatever their structure.
            model: The model that it reads.
            settings: Gives all else that it depends on.
        """
        return infer


class Threaded(Execution):
    """An execution that shares the objectives of a step among threads on a CPU."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = None if threads is None else check_integer("threads", threads, 1)

    def _workers(self, points: Sequence[Point]) -> int:
        if points[0][1][0].device.type != "cpu":
            return 1
        return min(self.threads or torch.get_num_threads(), len(points))

    def _map(self, work: Callable[[T], Gradient], tasks: Sequence[T], workers: int) -> list[Gradient]:
        if workers < 2:
            return [work(task) for task in tasks]
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def alike(task: T) -> Gradient:
            # Autocast is a matter of each thread.
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                return work(task)

        # The finest subsets take longest: they go first.
        return list(_pool(workers).map(alike, reversed(tasks)))[::-1]


class Eager(Threaded):
    """Operation by operation.

    Args:
        threads: Threads that share the objectives of a step on a CPU; ``None`` takes ``torch.get_num_threads()``.
            More than one pays where objectives are many and layers are wide: Python itself runs on one.
    """

    @override
    def gradients(self, points: Sequence[Point]) -> list[Gradient]:
        if (workers := self._workers(points)) < 2:
            return list(starmap(value_and_gradient, points))
        return self._map(lambda point: value_and_gradient(*point), points, workers)


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


def split(structure: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a structure, and what puts others in their place."""
    leaves, spec = pytree.tree_flatten(structure)

    def filled(tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], filled


def objective_keys(points: Sequence[Point]) -> list[Hashable]:
    """What each objective computes, its tensors aside."""
    first = points[0][0]
    # The same for all objectives of a step; what the decomposition holds is watched with the model's weights.
    shared = fingerprint((first.misfit, first.guidance), same=(first.model, first.model.decomp, first.model.likelihood))
    own = [[getattr(o, f.name) for f in fields(o) if f.name not in _SHARED] for o, _ in points]
    parts = zip(points, own, strict=True)
    return [(type(o), o.model, len(latents), fingerprint(settings), shared) for (o, latents), settings in parts]


def signature(tensors: Sequence[Tensor]) -> Hashable:
    """Shapes, dtypes and devices."""
    return tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)


def numerics_key() -> Hashable:
    """What a trace depends on beside its tensors."""
    kinds = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return (*kinds, float32_settings())
