"""The clock of the speed scripts, and what they time."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from separable_hvae import HVAE, MAPRefiner
from separable_hvae.refine import Compiled, CudaGraphs, Eager, Execution

EXECUTIONS: dict[str, Callable[..., Execution]] = {
    "eager": Eager,
    "compiled": Compiled,
    "step-graphs": partial(CudaGraphs, whole=False),
    "graphs": CudaGraphs,
    "compiled-graphs": partial(CudaGraphs, compiled=True),
}


def seconds(refiner: MAPRefiner, model: HVAE, x: Tensor) -> float:
    """Wall time of one refinement, the device's work included."""
    if x.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    refiner(model, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin
