"""How steps run: operation by operation, compiled, or as recorded CUDA graphs. Not needed to understand refinement."""

from separable_hvae.refine.execution.base import Eager, Execution
from separable_hvae.refine.execution.compiled import Compiled
from separable_hvae.refine.execution.cuda_graphs import CudaGraphs

__all__ = ["Compiled", "CudaGraphs", "Eager", "Execution"]
