"""The clock of the speed scripts."""

import time

import torch
from torch import Tensor

from separable_hvae import HVAE, MAPRefiner


def seconds(refiner: MAPRefiner, model: HVAE, x: Tensor) -> float:
    """Wall time of one refinement, the device's work included."""
    if x.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    refiner(model, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin
