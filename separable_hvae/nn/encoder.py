"""The bottom-up path: one activation for each scale."""

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import override

from separable_hvae.functional import resample
from separable_hvae.nn.blocks import ResidualBlock, conv


class Encoder(nn.Module):
    """Bottom-up path: one activation for each scale.

    Args:
        channels: Real channels of the signal.
        grids: Grid of each scale, coarse to fine; the last one is the signal's.
        width: Channels of the activations.
        bottleneck: Channels inside residual blocks.
        blocks: Residual blocks at each scale.
        gain: Factor on the last convolution of each block, ``1/√L``.
    """

    def __init__(
        self,
        channels: int,
        grids: Sequence[tuple[int, ...]],
        *,
        width: int,
        bottleneck: int,
        blocks: int,
        gain: float,
    ) -> None:
        super().__init__()
        self.grids = list(grids)
        self.stem = conv(channels, width, self.grids[-1], gain=1.0)
        self.scales = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width, bottleneck, g, gain=gain) for _ in range(blocks))) for g in self.grids
        )

    @override
    def forward(self, x: Tensor) -> list[Tensor]:
        """Map packed signals ``(B, C, *size)`` to activations ``(B, width, *grid)``, coarse to fine."""
        y, activations = self.stem(x), []
        for grid, blocks in zip(reversed(self.grids), reversed(list(self.scales)), strict=True):
            y = blocks(y if y.shape[2:] == grid else resample(y, grid))
            activations.append(y)
        return activations[::-1]
