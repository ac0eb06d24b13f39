"""Gaussians side by side, and energies, against torch.distributions."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Laplace, Normal, kl_divergence

from separable_hvae.distributions import Gaussian
from separable_hvae.distributions.gaussian import (
    gaussian_energy,
    gaussian_log_partition,
    laplace_energy,
    laplace_log_partition,
)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(layers=st.integers(1, 4), channels=st.integers(1, 3), seed=st.integers(0, 1000))
def test_layers_side_by_side_are_the_layers_one_by_one(layers: int, channels: int, seed: int) -> None:
    params = [2 * drawn(3, 2 * channels, 5, seed=seed + i) for i in range(layers)]
    latents = [drawn(3, channels, 5, seed=seed - i) for i in range(layers)]
    stack, z = Gaussian.stack(params), torch.stack(latents, dim=1)
    other = Gaussian.stack([p.flip(-1) for p in params])
    for i, (p, latent) in enumerate(zip(params, latents, strict=True)):
        one = Gaussian.from_params(p)
        normal = Normal(one.mean, one.sigma)
        wanted = normal.log_prob(latent).flatten(1).sum(1)
        torch.testing.assert_close(one.log_prob(latent), wanted)
        torch.testing.assert_close(stack.log_prob(z)[:, i], wanted)
        torch.testing.assert_close(stack.whiten(z)[:, i], (latent - normal.mean) / normal.stddev)
        far = Gaussian.from_params(p.flip(-1))
        divergence = kl_divergence(normal, Normal(far.mean, far.sigma)).flatten(1).sum(1)
        torch.testing.assert_close(stack.kl(other)[:, i], divergence)


@given(seed=st.integers(0, 1000), each=st.booleans())
def test_energies_and_partitions_make_densities(seed: int, each: bool) -> None:
    error = drawn(2, 3, 4, seed=seed)
    sigma = drawn(1, 3, 4, seed=seed + 1).exp() if each else drawn(seed=seed + 1).exp()
    total = sigma.log().expand(3, 4).sum() if not each else sigma.log().sum()
    normal, laplace = Normal(0.0, sigma), Laplace(0.0, sigma / math.sqrt(2))
    found = gaussian_energy(error, sigma.square()) + gaussian_log_partition(total, 12)
    torch.testing.assert_close(found, -normal.log_prob(error).flatten(1).sum(1))
    found = laplace_energy(error, sigma.square()) + laplace_log_partition(total, 12)
    torch.testing.assert_close(found, -laplace.log_prob(error).flatten(1).sum(1))
    rows = gaussian_energy(error, axis=2)
    torch.testing.assert_close(rows, error.square().sum(2) / 2)
