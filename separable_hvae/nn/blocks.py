r"""Building blocks of the networks, written once for one, two and three dimensions.

A residual bottleneck block is

    y = x + c · W₃ φ(W₂ φ(W₁ φ(x))),        φ = swish,  c = 1/√L at initialisation,

with W₁, W₃ pointwise and W₂ of three points on every axis that has more than one. There is no
normalisation layer: c keeps the variance of a deep top-down path near one (VDVAE).
"""

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
SWISH_GAIN = 1.68
"""1 / sqrt(E[swish(u)²]) for unit normal u."""

_CONV: dict[int, Callable[..., Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def conv(inputs: int, outputs: int, grid: Sequence[int], *, pointwise: bool = False, gain: float = SWISH_GAIN) -> Conv:
    """Convolution that keeps ``grid``, with weights of standard deviation ``gain / √fan_in`` and no bias at first.

    A gain of :data:`SWISH_GAIN` keeps the variance of a swish of unit normals, 1 that of plain inputs.
    """
    kernel = tuple(1 if pointwise or n == 1 else 3 for n in grid)
    layer = _CONV[len(grid)](inputs, outputs, kernel, padding=tuple(k // 2 for k in kernel))
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs * math.prod(kernel)))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Bottleneck(nn.Module):
    """Map ``(B, inputs, *grid)`` to ``(B, outputs, *grid)`` through ``hidden`` channels.

    Args:
        inputs: Channels that come in.
        hidden: Channels of the bottleneck.
        outputs: Channels that go out.
        grid: Points on each axis.
        gain: Factor on the initial weights of the last convolution.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, grid: Sequence[int], *, gain: float = 1.0) -> None:
        super().__init__()
        self.enter = conv(inputs, hidden, grid, pointwise=True)
        self.mix = conv(hidden, hidden, grid)
        self.leave = conv(hidden, outputs, grid, pointwise=True, gain=gain * SWISH_GAIN)

    @override
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.enter, self.mix, self.leave):
            x = layer(F.silu(x))
        return x


class ResidualBlock(Bottleneck):
    """Residual :class:`Bottleneck` from ``width`` to ``width`` channels."""

    def __init__(self, width: int, hidden: int, grid: Sequence[int], *, gain: float = 1.0) -> None:
        super().__init__(width, hidden, width, grid, gain=gain)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)
