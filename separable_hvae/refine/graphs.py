"""CUDA graphs: work that is recorded once and replayed, so that no time is lost on launching operations.

A recording has memory of its own for what goes in and comes out, serves every later batch of the same
shapes, and runs pieces that do not wait for one another on streams of their own.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from separable_hvae.checks import check_flag
from separable_hvae.hvae import HVAE
from separable_hvae.refine.compiled import Compiled
from separable_hvae.refine.execution import Eager, Execution, Gradient, precision, signature
from separable_hvae.refine.pieces import Call, Outcome

Function = Callable[[Sequence[Tensor]], Any]
Method = Literal["gradients", "values"]
_WARM_UPS = 2


class CudaGraphs(Execution):
    """Record on a CUDA device what is to be done, and replay it.

    Everything from the encoder's activations to the decoded latents, all steps included, is one graph where
    nothing has to look at values on the way. Where something has to (a callback, a tolerance, a budget, a drawn
    start, a :class:`Measurement`), the pieces of a step are one graph, replayed for each step.

    Args:
        whole: Whether to record whole inferences; ``False`` records steps alone, which rules and schedules
            of your own need if they look at values.
        compiled: Whether the pieces of steps are compiled before they are recorded, see :class:`Compiled`:
            minutes on first use, then fewer and longer kernels.

    Raises:
        ValueError: On the first use, if the tensors are not on a CUDA device.
        RuntimeError: On the first use, if what is to be recorded looks at values.
    """

    def __init__(self, whole: bool = True, compiled: bool = False) -> None:
        check_flag("whole", whole)
        check_flag("compiled", compiled)
        self.whole = whole
        self._pieces = Compiled() if compiled else Eager(threads=1)
        self._recorded: dict[Hashable, Recording] = {}
        self._inside = False

    @override
    def gradients(self, calls: Sequence[Call]) -> list[Gradient]:
        return cast(list[Gradient], self._step("gradients", calls))

    @override
    def values(self, calls: Sequence[Call]) -> list[Outcome]:
        return cast(list[Outcome], self._step("values", calls))

    @override
    def inference(self, key: Hashable, model: HVAE, infer: Function, tensors: Sequence[Tensor]) -> Any:
        return self._replay(("inference", key), model, infer, tensors) if self.whole else infer(tensors)

    def _step(self, method: Method, calls: Sequence[Call]) -> Any:
        if self._inside:
            return self._on_streams(method, calls)
        pieces = tuple((call.piece, len(call.moving)) for call in calls)
        tensors, structure = pytree.tree_flatten([(call.moving, call.held) for call in calls])

        def step(tensors: Sequence[Tensor]) -> Any:
            parts = zip(calls, pytree.tree_unflatten(list(tensors), structure), strict=True)
            return self._on_streams(method, [call._replace(moving=m, held=h) for call, (m, h) in parts])

        return self._replay((method, pieces), calls[0].piece.objective.model, step, tensors)

    def _replay(self, key: Hashable, model: HVAE, function: Function, tensors: Sequence[Tensor]) -> Any:
        device = tensors[0].device
        if not _is_cuda(device):
            raise ValueError(f"CUDA graphs need a model on a CUDA device, got {device}")
        # A graph reads weights at their addresses: trained in place they serve it, moved they do not.
        addresses = tuple(t.data_ptr() for t in [*model.parameters(), *model.buffers()])
        key = (key, signature(tensors), precision(), addresses)
        with torch.cuda.device(device):
            if key not in self._recorded:
                self._recorded[key] = Recording(self._plain(function), tensors)
            return self._recorded[key](tensors)

    def _on_streams(self, method: Method, calls: Sequence[Call]) -> list[Any]:
        """Run pieces at the same time, each on a stream of its own between a fork and a join."""
        main = torch.cuda.current_stream()
        # Urgent streams are none of those that graphs are recorded on.
        streams = [torch.cuda.Stream(priority=-1) for _ in calls] if len(calls) > 1 else [main]
        # All of them fork before any joins: one that forked later would wait for those that had joined.
        for stream in streams:
            stream.wait_stream(main)
        results: list[Any] = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                results += getattr(self._pieces, method)([call])
        for stream in streams:
            main.wait_stream(stream)
        return results

    def _plain(self, function: Function) -> Function:
        """The function with its steps as they are, instead of replayed from other graphs."""

        def alone(tensors: Sequence[Tensor]) -> Any:
            self._inside = True
            try:
                return function(tensors)
            finally:
                self._inside = False

        return alone


class Recording:
    """A function of tensors in a CUDA graph of the current device.

    Args:
        function: Maps tensors to any structure of tensors; it must not look at their values.
        tensors: Those that it is recorded with.
    """

    def __init__(self, function: Function, tensors: Sequence[Tensor]) -> None:
        self.inputs = [t.detach().clone() for t in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):  # Plans and workspaces have to exist before the recording.
                function(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                results = function(self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "what is to be recorded looks at tensors' values, or moves them between devices: "
                "execution='eager' runs it, CudaGraphs(whole=False) records the pieces of its steps alone"
            ) from error
        self.outputs, self.structure = pytree.tree_flatten(results)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Replay, with other numbers."""
        torch._foreach_copy_(self.inputs, [t.detach() for t in tensors])
        self.graph.replay()
        results = [t.clone() if isinstance(t, Tensor) else t for t in self.outputs]
        return pytree.tree_unflatten(results, self.structure)


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"
