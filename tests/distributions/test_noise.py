"""Noise where it is extreme, and noise that users bring; its densities are in test_data_terms.py."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import poisson
from torch import Tensor

from separable_hvae import GaussianNoise, PoissonNoise
from separable_hvae.refine.execution.fingerprint import fingerprint

Array = NDArray[np.float64]
RATES = [-1e4, -300.0, -10.4, -3.0, -0.1, 0.0, 0.05, 0.1, 0.1001, 0.7, 12.0, 1e3, 1e6]
COUNTS = [0.0, 3.0, 250.0]


def counted(rates: Array, counts: float) -> tuple[Array, Array]:
    """``r̃ − y log r̃`` with ``r̃ = 0.1 exp(10 r − 1)`` below a tenth of a count, and its slope, by hand."""
    few = rates <= 0.1
    high = np.maximum(rates, 0.1)
    bent = 0.1 * np.exp(np.minimum(10 * rates - 1, 0))
    value = np.where(few, bent - counts * (np.log(0.1) + 10 * rates - 1), high - counts * np.log(high))
    return value, np.where(few, 10 * (bent - counts), 1 - counts / high)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_stay_finite_at_any_prediction(dtype: torch.dtype, counts: float) -> None:
    at = torch.tensor(RATES, dtype=dtype)[:, None].requires_grad_()
    misfit = PoissonNoise(1.0).misfit(at, torch.full_like(at, counts), torch.zeros((), dtype=dtype))
    (slope,) = torch.autograd.grad(misfit.sum(), at)
    value, wanted = counted(at.detach().double().numpy()[:, 0], counts)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(misfit.detach().double().numpy(), value, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(slope.double().numpy()[:, 0], wanted, rtol=tolerance, atol=tolerance)


def test_counts_have_the_density_of_scipy_where_predictions_are_positive() -> None:
    rates = np.array([0.11, 0.7, 12.0, 300.0])
    for y in (0.0, 3.0, 250.0):
        found = PoissonNoise(1.0).misfit(torch.tensor(rates)[:, None], torch.full((4, 1), y), torch.zeros(()))
        constant = found.numpy() + poisson.logpmf(y, rates)
        np.testing.assert_allclose(constant, constant[0], atol=1e-9)


class Floored(GaussianNoise):
    """White noise on top of a floor: a subclass with arguments of its own."""

    def __init__(self, floor: float, sigma: Tensor) -> None:
        super().__init__((sigma.square() + floor**2).sqrt())
        object.__setattr__(self, "floor", floor)


def test_some_rows_of_noise_are_noise_of_the_same_kind() -> None:
    sigma = torch.tensor([[0.1], [0.2], [0.3]])
    noise = Floored(0.5, sigma)
    part = noise.rows(torch.tensor([2, 0]))
    assert type(part) is Floored
    assert vars(part)["floor"] == 0.5
    y = torch.zeros(2, 4)
    torch.testing.assert_close(part.variance(y), torch.tensor([[0.34], [0.26]]))
    torch.testing.assert_close(noise.variance(torch.zeros(3, 4))[:, 0], torch.tensor([0.26, 0.29, 0.34]))
    # What was compiled for one level serves no other.
    assert fingerprint(part) != fingerprint(noise)
    assert fingerprint(noise.rows(torch.tensor([0, 1, 2]))) != fingerprint(noise) == fingerprint(noise)
