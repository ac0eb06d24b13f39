"""Compiled pieces: each traced with its gradient, and compiled by TorchInductor.

They are kept by what they compute and by the shapes of their tensors, for as long as the execution
lives. Nothing is compiled unless it is asked for.
"""

import logging
import math
import operator
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from separable_hvae.refine.execution import Gradient, Threaded, precision, signature
from separable_hvae.refine.pieces import Call, Outcome


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
        self._compiled: dict[Hashable, _CompiledCall] = {}

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
        if key not in self._compiled or not self._compiled[key].weights.fit():
            self._compiled[key] = _compile(method, call, threads)
        return self._compiled[key], call


Place = tuple[dict[str, Any], str]
"""Where a model keeps a parameter or buffer: the dictionary that holds it, and its key there."""


class _Weights:
    """Parameters and buffers that compiled code reads, where the model keeps them: they may be replaced there.

    Args:
        places: Where they are.

    Attributes:
        plain: The tensors as code takes them.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = list(places)
        self._look()
        self._kinds = [(t.dtype, t.device, t.stride()) for t in self._tensors]

    def _look(self) -> None:
        self._tensors = [own[key] for own, key in self._places]
        self._layout = _layout(self._tensors)
        self.plain = [_plain(t.detach()) for t in self._tensors]

    def fit(self) -> bool:
        """Look at what is there now; whether it is still of the kind that code was compiled for."""
        now = [own[key] for own, key in self._places]
        if all(map(operator.is_, now, self._tensors)) and _layout(now) == self._layout:
            return True
        self._look()
        return self._kinds == [(t.dtype, t.device, t.stride()) for t in self._tensors]


def _layout(tensors: Sequence[Tensor]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Where numbers are, which assigning ``data`` changes without another tensor being there."""
    return list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors))


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
    weights: _Weights
    rest: list[int]
    structure: Any

    def __call__(self, call: Call) -> Any:
        given = [*call.moving, *call.held]
        with torch.no_grad():
            leaves = self.code(*self.weights.plain, *[_plain(given[i].detach()) for i in self.rest])
        return pytree.tree_unflatten(list(leaves), self.structure)


def _compile(method: str, call: Call, threads: int) -> _CompiledCall:
    """Trace a call to a graph of tensors in, tensors out, weights among the inputs, and compile it for some threads."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model = _Holder(call.piece.objective.model)
    slots = _weight_slots(model)
    places = list(slots.values())
    structure: list[Any] = []
    count = len(call.moving)

    def pure(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(slots, tensors[: len(slots)], strict=True))
        rest = tensors[len(slots) :]
        again = call._replace(moving=list(rest[:count]), held=list(rest[count:]))
        result = torch.func.functional_call(model, given, (getattr(again, method),))
        leaves, spec = pytree.tree_flatten(result)
        structure[:] = [spec]
        return leaves

    inputs = _Weights(places).plain + [_plain(t.detach()) for t in [*call.moving, *call.held]]
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

    read = _Weights([places[i] for i in used if i < len(places)])
    return _CompiledCall(compiled, read, [i - len(places) for i in used if i >= len(places)], structure[0])


def _weight_slots(model: nn.Module) -> dict[str, Place]:
    """Where a model keeps each parameter and buffer, by full name."""
    slots: dict[str, Place] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    slots[f"{prefix}.{key}" if prefix else key] = own, key
    return slots


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


def _plain(tensor: Tensor) -> Tensor:
    """The tensor with the usual strides on axes of one point, where any would do: compilers take them literally."""
    if not tensor.is_contiguous():
        return tensor
    strides = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim))
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


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
