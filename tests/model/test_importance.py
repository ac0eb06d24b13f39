"""The importance-weighted bound against evidence and ELBO in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from separable_hvae import HVAE, FFT1Real, Identity, evaluate
from separable_hvae.functional import pack
from separable_hvae.model import importance
from tests.helpers.linear_gaussian import ClosedForm, flat, linear_gaussian
from tests.helpers.models import few, layer_passes, seeded, tiny
from tests.helpers.zoo import OWN, Make, signal

KINDS: dict[str, Make] = {
    "fft": lambda: FFT1Real(4),
    "identity": lambda: Identity((3,), 1),
    "pyramid": lambda: OWN["own-pyramid"](),
}


def known(make: Make, layers: int = 1) -> tuple[HVAE, ClosedForm, Tensor]:
    model = linear_gaussian(make(), layers=layers)
    return model, ClosedForm(model), signal(model.decomp, 3)


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("make", [KINDS["fft"], KINDS["identity"]], ids=["fft", "identity"])
def test_an_exact_posterior_gives_the_evidence(make: Make, samples: int) -> None:
    model, algebra, x = known(make)
    algebra.make_posterior_exact()
    wanted = [algebra.log_evidence(row) for row in flat([pack(x)])]
    np.testing.assert_allclose(model.log_likelihood(x, samples, seeded()).numpy(), wanted, rtol=1e-9)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_one_sample_is_the_elbo_and_many_come_closer(make: Make) -> None:
    model, algebra, x = known(make)
    row = flat([pack(x)])[0]
    many = x[:1].expand(4000, *x.shape[1:])
    bounds, deviations = [], []
    for samples in (1, 4, 32):
        found = model.log_likelihood(many, samples, seeded(samples)).numpy()
        bounds.append(found.mean())
        deviations.append(found.std() / len(found) ** 0.5)
    evidence, elbo = algebra.log_evidence(row), algebra.elbo(row)
    assert abs(bounds[0] - elbo) < 5 * deviations[0]
    assert elbo < evidence
    assert bounds[0] < bounds[1] < bounds[2] < evidence + 5 * deviations[2]


def test_samples_of_a_signal_may_come_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = few(), torch.randn(3, 1, 4, dtype=torch.float64, generator=seeded())
    for rows, counts in {1: [1] * 7, 3: [1] * 7, 7: [2, 2, 2, 1], 10: [3, 3, 1], 100: [7]}.items():
        monkeypatch.setattr(importance, "_ROWS", rows)
        found, generator, weights = model.log_likelihood(x, 7, seeded()), seeded(), []
        for count in counts:
            copies = x.repeat(count, 1, 1)
            result = model(copies, generator)
            assert result.data is not None
            weights.append(-result.data - result.nll - model.log_posterior(copies, result.latents))
        wanted = torch.cat(weights).reshape(7, 3).logsumexp(0) - math.log(7)
        torch.testing.assert_close(found, wanted.detach())
        assert found.shape == (3,)
        assert not found.requires_grad
    assert model.float().log_likelihood(x.float(), 2).dtype == torch.float32


@pytest.mark.parametrize("make", [KINDS["fft"], KINDS["pyramid"]], ids=["fft", "pyramid"])
def test_the_posterior_of_given_latents(make: Make) -> None:
    model = tiny(make()).double()
    x = signal(model.decomp, 3)
    passes = layer_passes(model, lambda: model(x, seeded()))
    wanted = torch.zeros(3, dtype=torch.float64)
    for step in passes:
        assert step.posterior is not None
        wanted += Normal(step.posterior.mean, step.posterior.sigma).log_prob(step.z).flatten(1).sum(1)
    latents = [step.z.detach() for step in passes]
    torch.testing.assert_close(model.log_posterior(x, latents), wanted)
    # Another posterior of the same latents, and a slope of the latents themselves.
    assert not torch.allclose(model.log_posterior(x + 1, latents), wanted)
    moved = [z.requires_grad_() for z in latents]
    slopes = torch.autograd.grad(model.log_posterior(x, moved).sum(), moved)
    assert all(bool(slope.abs().max() > 0) for slope in slopes)


def test_evaluation_reports_the_bound() -> None:
    model, x = few(), torch.randn(6, 1, 4, dtype=torch.float64, generator=seeded())
    plain, found = evaluate(model, x, bin_width=0.1), evaluate(model, x, bin_width=0.1, importance=20)
    wanted = -model.log_likelihood(x, 20, seeded(0)).mean() / 4
    assert found["importance"] == pytest.approx(float(wanted))
    assert found["importance_bits"] == pytest.approx((float(wanted) - np.log(0.1)) / np.log(2))
    assert {name: found[name] for name in plain} == plain
    assert found["importance"] < found["loss"]


def test_errors() -> None:
    model, x = few(), torch.zeros(2, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        model.log_likelihood(x, 0)
    with pytest.raises(TypeError, match="generator must be"):
        model.log_likelihood(x, 1, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="importance must be at least 1, got 0"):
        evaluate(model, x, importance=0)
    with pytest.raises(ValueError, match="latents"):
        model.log_posterior(x, [])
