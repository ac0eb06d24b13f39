"""Execution: how the pieces of a problem run.

    Eager       one after the other, or on threads
    Compiled    each traced with its gradient and compiled by TorchInductor
    CudaGraphs  all pieces of a step recorded in one CUDA graph, each on a stream of its own

Compiled and recorded pieces are kept by what they compute and by the shapes of their tensors, for as
long as the execution lives. Nothing is compiled unless it is asked for.
"""

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Barrier
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from separable_hvae.refine.pieces import Call, Outcome

Gradient = tuple[list[Tensor], Outcome]


class Execution(ABC):
    """How the pieces of a problem run."""

    @abstractmethod
    def gradients(self, calls: Sequence[Call]) -> list[Gradient]:
        """Gradients and outcome of each call."""

    def values(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcome of each call, without gradients."""
        return [call.value() for call in calls]


class Eager(Execution):
    """Operation by operation.

    Args:
        threads: Threads that share the pieces of a step on a CPU; ``None`` takes ``torch.get_num_threads()``.
            More than one pays where pieces are many and layers are wide: Python itself runs on one.
    """

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
            raise TypeError(f"threads must be an integer or None, got {threads!r}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.threads = threads

    @override
    def gradients(self, calls: Sequence[Call]) -> list[Gradient]:
        workers = min(self.threads or torch.get_num_threads(), len(calls))
        if workers < 2 or calls[0].held[0].device.type != "cpu":
            return [call.gradient() for call in calls]
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def work(call: Call) -> Gradient:
            # Autocast is a matter of each thread.
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                return call.gradient()

        # The finest pieces are the longest: they go first.
        return list(_pool(workers).map(work, reversed(calls)))[::-1]


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


class Compiled(Execution):
    """Compile each piece, its gradient included, on first use: minutes for deep models, then less time a step.

    Pays most for small layers and small batches, where launching operations costs more than they do.
    A loss or operator of your own must not depend on tensors' values by Python's ``if``, nor on globals that
    change: what differs from call to call belongs into ``given``, or into the object whose method it is.
    """

    def __init__(self) -> None:
        self._compiled: dict[Hashable, _CompiledCall] = {}

    @override
    def gradients(self, calls: Sequence[Call]) -> list[Gradient]:
        return [cast(Gradient, self._run("gradient", call)) for call in calls]

    @override
    def values(self, calls: Sequence[Call]) -> list[Outcome]:
        return [cast(Outcome, self._run("value", call)) for call in calls]

    def _run(self, method: str, call: Call) -> Any:
        call = call._replace(moving=[z.contiguous() for z in call.moving], held=[_dense(t) for t in call.held])
        tensors = [*call.moving, *call.held]
        layouts = tuple(tuple(step for step, n in zip(t.stride(), t.shape, strict=True) if n > 1) for t in tensors)
        key = (method, call.piece, len(call.moving), _signature(tensors), layouts, _precision())
        if key not in self._compiled or not self._compiled[key].fits():
            self._compiled[key] = _compile(method, call)
        return self._compiled[key](call)


@dataclass(frozen=True)
class _CompiledCall:
    """Compiled code with what it reads.

    Attributes:
        code: Maps tensors to the leaves of the result.
        weights: Where the model keeps those that the code reads: they may be replaced.
        kinds: Their dtypes, devices and strides when the code was compiled.
        rest: Numbers of the call's tensors that the code reads.
        structure: Puts the leaves together.
    """

    code: Callable[..., Any]
    weights: list[tuple[dict[str, Any], str]]
    kinds: list[Hashable]
    rest: list[int]
    structure: Any

    def fits(self) -> bool:
        """Whether the weights still have the layout that the code was compiled for."""
        return self.kinds == [_kind(own[key]) for own, key in self.weights]

    def __call__(self, call: Call) -> Any:
        given = [*call.moving, *call.held]
        with torch.no_grad():
            tensors = [*[own[key] for own, key in self.weights], *[given[i] for i in self.rest]]
            leaves = self.code(*[_plain(t.detach()) for t in tensors])
        return pytree.tree_unflatten(list(leaves), self.structure)


def _kind(tensor: Tensor) -> Hashable:
    return tensor.dtype, tensor.device, tensor.stride()


def _compile(method: str, call: Call) -> _CompiledCall:
    """Trace a call to a graph of tensors in, tensors out, weights among the inputs, and compile it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model = _Holder(call.piece.objective.model)
    slots = _weight_slots(model)
    weights = {name: own[key] for name, (own, key) in slots.items()}
    structure: list[Any] = []
    count = len(call.moving)

    def pure(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(weights, tensors[: len(weights)], strict=True))
        rest = tensors[len(weights) :]
        again = call._replace(moving=list(rest[:count]), held=list(rest[count:]))
        result = torch.func.functional_call(model, given, (getattr(again, method),))
        leaves, spec = pytree.tree_flatten(result)
        structure[:] = [spec]
        return leaves

    inputs = [_plain(t.detach()) for t in [*weights.values(), *call.moving, *call.held]]
    with torch.no_grad():
        try:
            graph = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        except Exception as error:
            raise RuntimeError(
                f"{type(call.piece).__name__} cannot be traced, so it cannot be compiled; "
                "execution='eager' runs it as it is"
            ) from error
        used = _drop_unused(graph)
        with warnings.catch_warnings():
            # Transforms of complex numbers stay outside the compiled kernels, as they should.
            warnings.filterwarnings("ignore", message=".*complex")
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch._inductor import compile as inductor

            compiled = inductor(graph, [inputs[i] for i in used])

    places = list(slots.values())
    read = [places[i] for i in used if i < len(places)]
    rest = [i - len(places) for i in used if i >= len(places)]

    return _CompiledCall(compiled, read, [_kind(own[key]) for own, key in read], rest, structure[0])


def _weight_slots(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where a model keeps each parameter and buffer: the dictionary and its key, by full name."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
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


class CudaGraphs(Execution):
    """Record the pieces of a step in one CUDA graph and replay it: no time is lost on launching operations.

    Raises:
        ValueError: On the first use, if the tensors are not on a CUDA device.
    """

    def __init__(self) -> None:
        self._recorded: dict[Hashable, _Recorded] = {}

    @override
    def gradients(self, calls: Sequence[Call]) -> list[Gradient]:
        return cast(list[Gradient], self._run("gradient", calls))

    @override
    def values(self, calls: Sequence[Call]) -> list[Outcome]:
        return cast(list[Outcome], self._run("value", calls))

    def _run(self, method: str, calls: Sequence[Call]) -> Any:
        tensors = [t for call in calls for t in [*call.moving, *call.held]]
        if not _on_cuda(tensors[0]):
            raise ValueError(f"CUDA graphs need a model on a CUDA device, got {tensors[0].device}")
        model = calls[0].piece.objective.model
        # A graph reads weights at their addresses: trained in place they serve it, moved they do not.
        addresses = tuple(t.data_ptr() for t in [*model.parameters(), *model.buffers()])
        pieces = tuple((call.piece, len(call.moving)) for call in calls)
        key = (method, pieces, _signature(tensors), _precision(), addresses)
        if key not in self._recorded:
            self._recorded[key] = _Recorded(method, calls)
        return self._recorded[key](tensors)


class _Recorded:
    """A step's calls in one CUDA graph, with memory of its own for what goes in and comes out."""

    def __init__(self, method: str, calls: Sequence[Call]) -> None:
        self.inputs = [t.clone() for call in calls for t in [*call.moving, *call.held]]
        mine, first = [], 0
        for call in calls:
            middle, last = first + len(call.moving), first + len(call.moving) + len(call.held)
            mine.append(call._replace(moving=self.inputs[first:middle], held=self.inputs[middle:last]))
            first = last
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # Plans and workspaces have to exist before the recording.
                _on_streams(method, mine)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            results = _on_streams(method, mine)
        self.outputs, self.structure = pytree.tree_flatten(results)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        torch._foreach_copy_(self.inputs, [t.detach() for t in tensors])
        self.graph.replay()
        return pytree.tree_unflatten([t.clone() for t in self.outputs], self.structure)


def _on_streams(method: str, calls: Sequence[Call]) -> list[Any]:
    """Run each call on a stream of its own, between a fork and a join."""
    main = torch.cuda.current_stream()
    results = []
    for call in calls:
        stream = torch.cuda.Stream() if len(calls) > 1 else main
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            results.append(getattr(call, method)())
        main.wait_stream(stream)
    return results


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


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


def _signature(tensors: Sequence[Tensor]) -> Hashable:
    return tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)


def _precision() -> Hashable:
    """What a trace depends on beside its tensors."""
    kinds = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return (*kinds, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


EXECUTIONS: dict[str, type[Execution]] = {"eager": Eager, "compiled": Compiled, "cuda-graphs": CudaGraphs}
