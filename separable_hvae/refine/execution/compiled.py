"""Compiled objectives: each traced with its gradient, and compiled by TorchInductor.

They are kept by what they compute and by the shapes of their tensors, the 256 that were used last.
Nothing is compiled unless it is asked for.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from separable_hvae._float32 import full_precision
from separable_hvae.refine.execution.base import (
    Gradient,
    Point,
    Threaded,
    numerics_key,
    objective_keys,
    signature,
    split,
)
from separable_hvae.refine.execution.cache import LRUCache, WeightGuard, plain
from separable_hvae.refine.objective import Objective, ObjectiveValue, value_and_gradient

Method = Callable[[Objective, Sequence[Tensor]], Any]
_MOST = 256


class Compiled(Threaded):
    """Compile each objective, its gradient included, on first use: minutes for deep models, then less time a step.

    Pays most for small layers and small batches, where launching operations costs more than they do.
    A loss or operator of your own must not depend on tensors' values by Python's ``if``, nor on globals that
    change. Where what it closes over or its object holds has changed, objectives are compiled anew: tensors that
    differ from call to call belong into ``given``.

    Args:
        threads: Threads that share the objectives of a step on a CPU, see :class:`Eager`. Compiled ones do not
            wait for Python, so they gain more.
    """

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(threads)
        self._compiled = LRUCache[_CompiledCode](_MOST)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # Code stays with the process that compiled it.
        return type(self), (self.threads,)

    @override
    def gradients(self, points: Sequence[Point]) -> list[Gradient]:
        workers = self._workers(points)
        ready = self._ready(value_and_gradient, points, 1 if workers > 1 else torch.get_num_threads())
        return self._map(lambda pair: cast(Gradient, pair[0](pair[1])), ready, workers)

    @override
    def values(self, points: Sequence[Point]) -> list[ObjectiveValue]:
        ready = self._ready(_value, points, torch.get_num_threads())
        return [cast(ObjectiveValue, code(tensors)) for code, tensors in ready]

    def _ready(
        self, method: Method, points: Sequence[Point], threads: int
    ) -> "list[tuple[_CompiledCode, list[Tensor]]]":
        """The compiled code of each objective, with tensors as the code takes them."""
        ready = []
        for point, own in zip(points, objective_keys(points), strict=True):
            objective, latents = point
            tensors, _ = split((latents, objective.inputs))
            count = len(latents)
            tensors = [*(z.contiguous() for z in tensors[:count]), *map(_dense, tensors[count:])]
            layouts = tuple(tuple(step for step, n in zip(t.stride(), t.shape, strict=True) if n > 1) for t in tensors)
            key = (method, own, signature(tensors), layouts, numerics_key(), threads)
            make = partial(_compile, method, point, tensors, threads)
            ready.append((self._compiled.take(key, lambda code: code.weights.fit(), make), tensors))
        return ready


def _value(objective: Objective, latents: Sequence[Tensor]) -> ObjectiveValue:
    with torch.no_grad():
        return objective(latents)


@dataclass(frozen=True)
class _CompiledCode:
    """Compiled code with what it reads.

    Attributes:
        code: Maps tensors to the leaves of the result.
        weights: Those of the model's tensors that the code reads.
        rest: Numbers of the other tensors that the code reads.
        structure: Puts the leaves together.
    """

    code: Callable[..., Any]
    weights: WeightGuard
    rest: list[int]
    structure: Any

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        with torch.no_grad(), full_precision(tensors[0].device):
            leaves = self.code(*self.weights.plain, *[plain(tensors[i].detach()) for i in self.rest])
        return pytree.tree_unflatten(list(leaves), self.structure)


def _compile(method: Method, point: Point, given: Sequence[Tensor], threads: int) -> _CompiledCode:
    """Trace an objective to a graph of tensors in and out, weights among them, and compile it for some threads."""
    from torch.fx.experimental.proxy_tensor import make_fx

    objective, latents = point
    _, filled = split((latents, objective.inputs))
    model = _Holder(objective.model)
    weights = WeightGuard(model)
    names = weights.names
    structure: list[Any] = []

    def pure(*tensors: Tensor) -> list[Tensor]:
        read = dict(zip(names, tensors[: len(names)], strict=True))
        moving, inputs = filled(tensors[len(names) :])
        again = partial(method, replace(objective, inputs=inputs), moving)
        leaves, spec = pytree.tree_flatten(torch.func.functional_call(model, read, (again,)))
        structure[:] = [spec]
        return leaves

    inputs = weights.plain + [plain(t.detach()) for t in given]
    with torch.no_grad():
        try:
            graph = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        except Exception as error:
            raise RuntimeError(
                f"{type(objective).__name__} cannot be traced, so it cannot be compiled; "
                "execution='eager' runs it as it is"
            ) from error
        used = _drop_unused(graph)
        with warnings.catch_warnings(), _quiet("torch._inductor.ir"):
            # Transforms of complex numbers stay outside the compiled kernels, as they should.
            warnings.filterwarnings("ignore", message=".*complex")
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch._inductor import compile as inductor
            from torch._inductor import config

            # Called from C++, small operations cost half as much as from Python, and leave other threads alone.
            options = {"cpp_wrapper": inputs[0].device.type == "cpu", "cpp.threads": threads, "size_asserts": False}
            if hasattr(config, "cpp_wrapper_build_separate"):
                # Otherwise one function of thousands of lines goes through every optimisation.
                options["cpp_wrapper_build_separate"] = True
            try:
                compiled = inductor(graph, [inputs[i] for i in used], options)
            except Exception as error:
                raise RuntimeError(
                    f"{type(objective).__name__} cannot be compiled here, perhaps for want of a C++ compiler; "
                    f"execution='eager' runs it without: {error}"
                ) from error

    read = WeightGuard(model, [names[i] for i in used if i < len(names)])
    return _CompiledCode(compiled, read, [i - len(names) for i in used if i >= len(names)], structure[0])


class _Holder(nn.Module):
    """A module whose forward pass runs any function while the model's weights are exchanged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def _drop_unused(graph: torch.fx.GraphModule) -> list[int]:
    """Remove the inputs that the graph does not read; return the numbers of the others."""
    used = []
    for i, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        if node.users:
            used.append(i)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return used


def _dense(tensor: Tensor) -> Tensor:
    """The tensor with one of the few layouts that compiled code is made for."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if channels_last is not None and tensor.is_contiguous(memory_format=channels_last):
        return tensor
    return tensor.contiguous()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Errors alone from a logger: what lacks a way of its own from C++ is called through Python, and works."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
