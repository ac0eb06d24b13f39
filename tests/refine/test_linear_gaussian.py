"""Evidence, ELBO and joint density of a linear-Gaussian model, against linear algebra."""

import numpy as np
import pytest
import torch
from torch import Tensor

from separable_hvae import HVAE
from separable_hvae.functional import pack
from tests.helpers.linear_gaussian import ClosedForm, flat, linear_gaussian
from tests.helpers.zoo import ORTHONORMAL, Make, signal


def expected_elbo(model: HVAE, algebra: ClosedForm, x: Tensor) -> float:
    """The exact expectation of the model's own estimate, which is quadratic in its noise."""
    units = torch.eye(algebra.numel, dtype=torch.float64)
    noise = torch.cat([torch.zeros_like(units[:1]), units, -units])
    for layer, slot in zip(algebra.layers, algebra.slots, strict=True):
        layer.noise = noise[:, slot]
    elbo: Tensor = model(x.expand(len(noise), *x.shape[1:])).elbo.detach()
    middle, plus, minus = elbo[0], elbo[1 : len(units) + 1], elbo[len(units) + 1 :]
    return float(middle + 0.5 * (plus + minus - 2 * middle).sum())


@pytest.mark.parametrize("make", ORTHONORMAL.values(), ids=ORTHONORMAL)
def test_elbo(make: Make) -> None:
    model = linear_gaussian(make())
    algebra, x = ClosedForm(model), signal(model.decomp, 1)
    row = flat([pack(x)])[0]
    inexact = expected_elbo(model, algebra, x)
    assert inexact == pytest.approx(algebra.elbo(row), abs=1e-9)
    assert inexact < algebra.log_evidence(row) - 0.1

    algebra.make_posterior_exact()
    assert algebra.elbo(row) == pytest.approx(algebra.log_evidence(row), abs=1e-9)
    assert expected_elbo(model, algebra, x) == pytest.approx(algebra.log_evidence(row), abs=1e-8)


@pytest.mark.parametrize("make", ORTHONORMAL.values(), ids=ORTHONORMAL)
def test_joint_density_and_posterior_mean(make: Make) -> None:
    model = linear_gaussian(make())
    algebra, x = ClosedForm(model), signal(model.decomp, 2)
    rows = flat([pack(x)])
    result = model(x, torch.Generator().manual_seed(0))
    assert result.data is not None
    expected = [algebra.log_joint(a, z) for a, z in zip(rows, flat(result.latents), strict=True)]
    np.testing.assert_allclose(-(result.nll + result.data).detach().numpy(), expected, rtol=1e-12)

    # The means of an exact Gaussian posterior, one after the other, are its mode.
    algebra.make_posterior_exact()
    modes = [algebra.joint(a) for a in rows]
    np.testing.assert_allclose(flat(model.encode(x).latents), modes, atol=1e-10)
