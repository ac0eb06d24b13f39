"""CUDA graphs: work that is recorded once and replayed, so that no time is lost on launching operations.

A recording has memory of its own for what goes in and comes out, serves every later batch of the same
shapes, and runs objectives that do not wait for one another on streams of their own.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import RLock, local
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from separable_hvae._validation import check_flag
from separable_hvae.model.hvae import HVAE
from separable_hvae.refine.execution.base import (
    Eager,
    Execution,
    Function,
    Gradient,
    Infer,
    Point,
    T,
    numerics_key,
    objective_keys,
    signature,
    split,
)
from separable_hvae.refine.execution.cache import LRUCache, WeightGuard
from separable_hvae.refine.execution.compiled import Compiled
from separable_hvae.refine.execution.fingerprint import fingerprint
from separable_hvae.refine.objective import ObjectiveValue

Method = Literal["gradients", "values"]
_WARM_UPS = 2
_MOST = 16


class CudaGraphs(Execution):
    """Record on a CUDA device what is to be done, and replay it.

    Everything from the encoder's activations to the decoded latents, all steps included, is one graph where
    nothing has to look at values on the way. Where something has to (a callback, a tolerance, a budget, a drawn
    start, a :class:`Measurement`), the objectives of a step are one graph, replayed for each step.

    The 16 recordings that were used last are kept. They share memory, so that threads take turns.

    Args:
        whole: Whether to record whole inferences; ``False`` records steps alone, which rules and schedules
            of your own need if they look at values.
        compiled: Whether the objectives of steps are compiled before they are recorded, see :class:`Compiled`:
            minutes on first use, then fewer and longer kernels.

    Raises:
        ValueError: On the first use, if the tensors are not on a CUDA device.
        RuntimeError: On the first use, if what is to be recorded looks at values.
    """

    def __init__(self, whole: bool = True, compiled: bool = False) -> None:
        check_flag("whole", whole)
        check_flag("compiled", compiled)
        self.whole, self.compiled = whole, compiled
        self._objectives = Compiled() if compiled else Eager(threads=1)
        self._recorded = LRUCache[Recording](_MOST)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: dict[torch.device, torch.cuda.Stream] = {}
        self._turn, self._here = RLock(), _Here()

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # Recordings stay with the process that made them.
        return type(self), (self.whole, self.compiled)

    @override
    def gradients(self, points: Sequence[Point]) -> list[Gradient]:
        return cast(list[Gradient], self._step("gradients", points))

    @override
    def values(self, points: Sequence[Point]) -> list[ObjectiveValue]:
        return cast(list[ObjectiveValue], self._step("values", points))

    @override
    def inference(self, infer: Infer[T], model: HVAE, settings: Callable[[], object]) -> Infer[T]:
        if not self.whole:
            return infer
        key = "inference", fingerprint(settings(), same=(model, model.decomp, model.likelihood))

        def replayed(inputs: Any) -> Any:
            tensors, filled = split(inputs)
            return self._replay(key, model, lambda tensors: infer(filled(tensors)), tensors)

        return replayed

    def _step(self, method: Method, points: Sequence[Point]) -> Any:
        if self._here.recording:
            return self._on_streams(method, points)
        objectives = [objective for objective, _ in points]
        tensors, filled = split([(objective.inputs, latents) for objective, latents in points])

        def step(tensors: Sequence[Tensor]) -> Any:
            parts = zip(objectives, filled(tensors), strict=True)
            return self._on_streams(method, [(replace(o, inputs=inputs), latents) for o, (inputs, latents) in parts])

        return self._replay((method, tuple(objective_keys(points))), objectives[0].model, step, tensors)

    def _replay(self, key: Hashable, model: HVAE, function: Function, tensors: Sequence[Tensor]) -> Any:
        device = tensors[0].device
        if not _is_cuda(device):
            raise ValueError(f"CUDA graphs need a model on a CUDA device, got {device}; execution='eager' runs on any")
        key = (key, model, signature(tensors), numerics_key())
        with self._turn, torch.cuda.device(device):
            current = torch.cuda.current_stream()
            current.wait_stream(self._last.get(device, current))
            self._last[device] = current
            # A graph reads weights at their addresses: trained in place they serve it, moved they do not.
            recording = self._recorded.take(
                key, lambda recording: recording.weights.stayed(), lambda: self._record(model, function, tensors)
            )
            return recording(tensors)

    def _record(self, model: HVAE, function: Function, tensors: Sequence[Tensor]) -> "Recording":
        device = tensors[0].device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream()
        beside = next((r for r in self._recorded.values() if r.inputs[0].device == device), None)
        return Recording(self._plain(function), tensors, WeightGuard(model), self._streams[device], beside)

    def _on_streams(self, method: Method, points: Sequence[Point]) -> list[Any]:
        """Evaluate objectives at the same time, each on a stream of its own between a fork and a join."""
        main = torch.cuda.current_stream()
        # Urgent streams are none of those that graphs are recorded on.
        streams = [torch.cuda.Stream(priority=-1) for _ in points] if len(points) > 1 else [main]
        # All of them fork before any joins: one that forked later would wait for those that had joined.
        for stream in streams:
            stream.wait_stream(main)
        results: list[Any] = []
        for point, stream in zip(points, streams, strict=True):
            with torch.cuda.stream(stream):
                results += getattr(self._objectives, method)([point])
        for stream in streams:
            main.wait_stream(stream)
        return results

    def _plain(self, function: Function) -> Function:
        """The function with its steps as they are, instead of replayed from other graphs."""

        def alone(tensors: Sequence[Tensor]) -> Any:
            self._here.recording = True
            try:
                return function(tensors)
            finally:
                self._here.recording = False

        return alone


class _Here(local):
    """What the current thread does."""

    recording = False


class Recording:
    """A function of tensors in a CUDA graph of the current device.

    Args:
        function: What is recorded; it must not look at values.
        tensors: Those that it is recorded with.
        weights: What else it reads.
        stream: The stream that it is recorded on, the same for all that share memory.
        beside: Another recording of this device, to share its memory: none runs while another's results are read.
    """

    def __init__(
        self,
        function: Function,
        tensors: Sequence[Tensor],
        weights: WeightGuard,
        stream: torch.cuda.Stream,
        beside: "Recording | None" = None,
    ) -> None:
        self.inputs, self.weights = [t.detach().clone() for t in tensors], weights
        self.graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside.graph.pool()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):  # Plans and workspaces have to exist before the recording.
                function(self.inputs)
            try:
                with _refusing_to_wait():
                    function(self.inputs)
                # Other threads, such as those that load data, may allocate meanwhile.
                with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    results = function(self.inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "what is to be recorded looks at tensors' values, or moves them between devices: "
                    "execution='eager' runs it, CudaGraphs(whole=False) records the objectives of its steps alone"
                ) from error
        torch.cuda.current_stream().wait_stream(stream)
        self.outputs, self.structure = pytree.tree_flatten(results)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Replay, with other numbers."""
        torch._foreach_copy_(self.inputs, [t.detach() for t in tensors])
        self.graph.replay()
        results = [t.clone() if isinstance(t, Tensor) else t for t in self.outputs]
        return pytree.tree_unflatten(results, self.structure)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Raise an error where Python would wait for the device: within a capture it would leave PyTorch in disorder."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"
