import math

import numpy as np
import pytest
import torch
from torch import nn

from separable_hvae.functional import resample
from separable_hvae.nn.blocks import Bottleneck, ResidualBlock, conv
from separable_hvae.nn.encoder import Encoder
from tests.helpers.models import reach_every_parameter

GRIDS = [(4,), (1,), (4, 5), (1, 6), (3, 4, 5), (1, 1, 2)]


@pytest.mark.parametrize("grid", GRIDS)
def test_convolutions_keep_the_grid(grid: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *grid)
    layer, pointwise = conv(3, 5, grid), conv(3, 5, grid, pointwise=True)
    assert layer(x).shape == pointwise(x).shape == (2, 5, *grid)
    assert layer.weight.shape[2:] == tuple(1 if n == 1 else 3 for n in grid)
    assert pointwise.weight.shape[2:] == (1,) * len(grid)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", [Bottleneck, ResidualBlock])
def test_blocks_shapes_and_gradients(kind: type[Bottleneck], grid: tuple[int, ...]) -> None:
    block = ResidualBlock(6, 4, grid) if kind is ResidualBlock else Bottleneck(6, 4, 3, grid)
    x = torch.randn(2, 6, *grid, requires_grad=True)
    y = block(x)
    assert y.shape == (2, 6 if kind is ResidualBlock else 3, *grid)
    reach_every_parameter(block, [y])
    assert x.grad is not None


def test_gain_scales_the_branch_alone() -> None:
    """With the same seed, a gain of 1/√L divides the branch by √L."""
    x, branches = torch.randn(2, 6, 4, 4), []
    for gain in (1.0, 1 / math.sqrt(20), 0.0):
        torch.manual_seed(0)
        block = ResidualBlock(6, 4, (4, 4), gain=gain)
        branches.append(block(x) - x)
    assert float(branches[0].detach().abs().max()) > 1e-3
    torch.testing.assert_close(branches[1], branches[0] / math.sqrt(20))
    torch.testing.assert_close(branches[2], torch.zeros_like(x), rtol=0, atol=0)


def test_depth_does_not_blow_up_the_variance() -> None:
    torch.manual_seed(0)
    depth = 60
    x = torch.randn(64, 32, 4, 4)
    y = nn.Sequential(*(ResidualBlock(32, 16, (4, 4), gain=1 / math.sqrt(depth)) for _ in range(depth)))(x)
    assert 0.8 < float(y.detach().var()) < 8


def test_resampling_down_averages_blocks() -> None:
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    expected = x.numpy().reshape(2, 3, 4, 2, 3, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(resample(x, (4, 3)), expected, atol=1e-14)
    torch.testing.assert_close(resample(x, (1, 1)), x.mean((2, 3), keepdim=True))


def test_resampling_up_interpolates() -> None:
    n, m = 14, 28
    x = torch.randn(1, 1, n, dtype=torch.float64)
    at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    np.testing.assert_allclose(resample(x, (m,))[0, 0], np.interp(at, np.arange(n), x[0, 0]), atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "points"),
    [((1,), (5,)), ((14, 14), (28, 28)), ((5, 5), (4, 9)), ((9, 2), (3, 7)), ((1, 2, 3), (2, 3, 1)), ((3,), (3,))],
)
def test_resampling_to_explicit_sizes_keeps_constants(grid: tuple[int, ...], points: tuple[int, ...]) -> None:
    y = resample(torch.full((2, 3, *grid), 2.5), points)
    torch.testing.assert_close(y, torch.full((2, 3, *points), 2.5))


@pytest.mark.parametrize(
    "grids", [[(1,), (5,), (9,)], [(1, 1), (2, 2), (4, 4), (4, 6)], [(1, 1, 1), (2, 2, 2), (2, 3, 4)], [(4, 4)]]
)
@pytest.mark.parametrize("blocks", [0, 2])
def test_encoder(grids: list[tuple[int, ...]], blocks: int) -> None:
    encoder = Encoder(3, grids, width=6, bottleneck=4, blocks=blocks, gain=0.5)
    activations = encoder(torch.randn(2, 3, *grids[-1]))
    assert [a.shape for a in activations] == [(2, 6, *g) for g in grids]
    reach_every_parameter(encoder, activations)
