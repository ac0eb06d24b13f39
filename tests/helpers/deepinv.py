"""deepinv, where it is installed, beside any build of torch."""

import importlib
import importlib.util
from functools import cache
from typing import Any

import pytest
import torch


def require_deepinv() -> Any:
    """The module; a test goes without where it is not installed."""
    if importlib.util.find_spec("deepinv") is None:
        pytest.skip("deepinv is not installed")
    _let_torchvision_import()
    return importlib.import_module("deepinv")


@cache
def _let_torchvision_import() -> torch.library.Library | None:
    """Declare what deepinv's torchvision misses: the published one is built for CUDA, and looks for its operators."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library  # What it declares lives as long as it does.
    return None
