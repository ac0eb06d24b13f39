"""Compiled pieces: each traced with its gradient, and compiled by TorchInductor.

They are kept by what they compute and by the shapes of their tensors, the 256 that were used last.
Nothing is compiled unless it is asked for.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from separable_hvae._float32 import full_precision
from separable_hvae.refine.execution.base import Gradient, Threaded, precision, signature
from separable_hvae.refine.execution.cache import LRUCache, WeightGuard, plain
from separable_hvae.refine.pieces import Call, Outcome

_MOST = 256


class Compiled(Threaded):
    """Compile each piece, its gradient included, on first use: minutes for deep models, then less time a step.

    Pays most for small layers and small batches, where launching operations costs more than they do.
    A loss or operator of your own must not depend on tensors' values by Python's ``if``, nor on globals that
    change. Where what it closes over or its object holds has changed, pieces are compiled anew: tensors that
    differ from call to call belong into ``given``.

    Args:
        threads: Threads that share the pieces of a step on a CPU, see :class:`Eager`. Compiled pieces do not
            wait for Python, so they gain more.
    """

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(threads)
        self._compiled = LRUCache[_CompiledCall](_MOST)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # Code stays with the process that compiled it.
        return type(self), (self.threads,)

    @override
    def gradients(self, calls: Sequence[Call]) -> list[Gradient]:
        workers = self._workers(calls)
        ready = [self._ready("gradient", call, 1 if workers > 1 else torch.get_num_threads()) for call in calls]
        return self._map(lambda pair: cast(Gradient, pair[0](pair[1])), ready, workers)

    @override
    def values(self, calls: Sequence[Call]) -> list[Outcome]:
        ready = [self._ready("value", call, torch.get_num_threads()) for call in calls]
        return [cast(Outcome, code(call)) for code, call in ready]

    def _ready(self, method: str, call: Call, threads: int) -> "tuple[_CompiledCall, Call]":
        """The compiled code of a call, and the call with tensors as the code takes them."""
        call = call._replace(moving=[z.contiguous() for z in call.moving], held=[_dense(t) for t in call.held])
        tensors = [*call.moving, *call.held]
        layouts = tuple(tuple(step for step, n in zip(t.stride(), t.shape, strict=True) if n > 1) for t in tensors)
        key = (method, call.piece, len(call.moving), signature(tensors), layouts, precision(), threads)
        code = self._compiled.take(key, lambda code: code.weights.fit(), lambda: _compile(method, call, threads))
        return code, call


@dataclass(frozen=True)
class _CompiledCall:
    """Compiled code with what it reads.

    Attributes:
        code: Maps tensors to the leaves of the result.
        weights: Those of the model's tensors that the code reads.
        rest: Numbers of the call's tensors that the code reads.
        structure: Puts the leaves together.
    """

    code: Callable[..., Any]
    weights: WeightGuard
    rest: list[int]
    structure: Any

    def __call__(self, call: Call) -> Any:
        given = [*call.moving, *call.held]
        with torch.no_grad(), full_precision(given[0].device):
            leaves = self.code(*self.weights.plain, *[plain(given[i].detach()) for i in self.rest])
        return pytree.tree_unflatten(list(leaves), self.structure)


def _compile(method: str, call: Call, threads: int) -> _CompiledCall:
    """Trace a call to a graph of tensors in, tensors out, weights among the inputs, and compile it for some threads."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model = _Holder(call.piece.objective.model)
    weights = WeightGuard(model)
    names = weights.names
    structure: list[Any] = []
    count = len(call.moving)

    def pure(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(names, tensors[: len(names)], strict=True))
        rest = tensors[len(names) :]
        again = call._replace(moving=list(rest[:count]), held=list(rest[count:]))
        result = torch.func.functional_call(model, given, (getattr(again, method),))
        leaves, spec = pytree.tree_flatten(result)
        structure[:] = [spec]
        return leaves

    inputs = weights.plain + [plain(t.detach()) for t in [*call.moving, *call.held]]
    with torch.no_grad():
        try:
            graph = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        except Exception as error:
            raise RuntimeError(
                f"{type(call.piece).__name__} cannot be traced, so it cannot be compiled; "
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
            compiled = inductor(graph, [inputs[i] for i in used], options)

    read = WeightGuard(model, [names[i] for i in used if i < len(names)])
    return _CompiledCall(compiled, read, [i - len(names) for i in used if i >= len(names)], structure[0])


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
