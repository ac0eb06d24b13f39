"""What is read of a deepinv physics, or of anything like it; deepinv itself is not needed."""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from separable_hvae.distributions.noise import GaussianNoise, LaplaceNoise, Noise, PoissonNoise


@runtime_checkable
class Physics(Protocol):
    """An object that measures signals; ``A_adjoint`` and ``noise_model`` are read too where there are any."""

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        """Measure signals, without noise."""


def noise_of(physics: Physics) -> Noise | None:
    """The noise of a deepinv physics, ``None`` where it has none.

    Raises:
        ValueError: If its noise model is none of Gaussian, Laplace, Poisson and none, or differs by sample.
    """
    model = getattr(physics, "noise_model", None)
    if model is None:
        return None
    kind = type(model).__name__
    if kind == "ZeroNoise":
        return GaussianNoise(0.0)
    if kind == "GaussianNoise":
        return GaussianNoise(_number("sigma", model.sigma))
    if kind == "LaplaceNoise":
        return LaplaceNoise(math.sqrt(2) * _number("b", model.b))
    if kind == "PoissonNoise" and bool(model.normalize):
        return PoissonNoise(_number("gain", model.gain))
    raise ValueError(
        f"physics has a noise model {kind} that cannot be read; those that can are GaussianNoise, LaplaceNoise, "
        "PoissonNoise with normalize=True and ZeroNoise: pass noise="
    )


def _number(name: str, value: Any) -> float:
    numbers = torch.as_tensor(value).flatten()
    if numbers.numel() != 1:
        raise ValueError(
            f"the physics' noise must have one {name} for all samples, got {numbers.tolist()}: pass noise="
        )
    return float(numbers)
