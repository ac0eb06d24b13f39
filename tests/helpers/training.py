"""Short training runs."""

from typing import Any

import torch
from torch import Tensor

from separable_hvae import (
    HVAE,
    FFT1Real,
    FitReport,
    fit,
)
from tests.helpers.models import seeded, tiny


def fresh(seed: int = 0, **options: Any) -> HVAE:
    return tiny(FFT1Real(4, scales=[1, 4]), perturbed=False, layers=1, seed=seed, **options)


def train(model: HVAE, data: Any = None, **options: Any) -> FitReport:
    settings: dict[str, Any] = {"steps": 8, "batch_size": 8, "every": 1, "progress": False}
    return fit(model, waves() if data is None else data, **(settings | options))


def waves(n: int = 40, seed: int = 0) -> Tensor:
    """Signals with something to learn: one shape at random heights, and a little noise."""
    height, noise = torch.randn(n, 1, 1, generator=seeded(seed)), torch.randn(n, 1, 4, generator=seeded(seed + 1))
    return 0.5 * height * torch.tensor([1.0, -1.0, 2.0, 0.5]) + 0.05 * noise
