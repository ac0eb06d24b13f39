import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from separable_hvae.distributions.gaussian import LOG_SIGMA_BOUND, Gaussian
from separable_hvae.nn.stochastic_layer import StochasticLayer
from tests.helpers.models import reach_every_parameter

SHAPE = (3, 2, 4, 5)


def gaussian(seed: int, dtype: torch.dtype = torch.float64) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, log_sigma = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    return Gaussian(mean.to(dtype), log_sigma.to(dtype))


def normal(g: Gaussian) -> Normal:
    return Normal(g.mean, g.log_sigma.exp())


def test_log_prob_and_kl_against_torch_distributions() -> None:
    q, p = gaussian(0), gaussian(1)
    z = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(z), normal(q).log_prob(z).sum((1, 2, 3)))
    torch.testing.assert_close(q.kl(p), kl_divergence(normal(q), normal(p)).sum((1, 2, 3)))
    torch.testing.assert_close(q.sigma, normal(q).stddev)
    torch.testing.assert_close(q.kl(q), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_kl_is_the_expected_log_ratio() -> None:
    q, p = gaussian(0), gaussian(1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([z for _ in range(4000) for z in [q.sample(generator=generator)]])
    ratio = (normal(q).log_prob(draws) - normal(p).log_prob(draws)).sum((2, 3, 4))
    error = ratio.std(0) / math.sqrt(len(draws))
    assert bool(((ratio.mean(0) - q.kl(p)).abs() < 5 * error).all())


def test_samples_have_the_right_moments() -> None:
    g = Gaussian(torch.full((20000, 1, 2), 3.0), torch.full((20000, 1, 2), math.log(0.5)))
    for temperature in (1.0, 0.25):
        z = g.sample(temperature, torch.Generator().manual_seed(1))
        assert float(z.mean()) == pytest.approx(3, abs=0.02)
        assert float(z.std()) == pytest.approx(0.5 * temperature, rel=0.02)


def test_generators_make_samples_repeat() -> None:
    g = gaussian(0)
    state = torch.get_rng_state()
    a, b, c = (g.sample(generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    assert g.sample(0.0, generator) is g.mean
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    a = g.sample()
    torch.manual_seed(3)
    assert torch.equal(a, g.sample())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_params_splits_bounds_and_widens(dtype: torch.dtype) -> None:
    raw = torch.cat([torch.tensor([[1.0, -2.0]]), torch.tensor([[0.01, -0.02]])], dim=1)[..., None].to(dtype)
    g = Gaussian.from_params(raw)
    assert g.mean.dtype == g.log_sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(g.mean, raw[:, :2].to(g.mean.dtype))
    torch.testing.assert_close(g.log_sigma, raw[:, 2:].to(g.mean.dtype), rtol=1e-4, atol=0)


def test_huge_raw_numbers_stay_finite() -> None:
    wild = torch.tensor([1e30, -1e30, 50.0, -50.0]).reshape(4, 1, 1)
    q = Gaussian.from_params(torch.cat([torch.zeros(4, 1, 1), wild], dim=1).requires_grad_())
    p = Gaussian.from_params(torch.cat([torch.ones(4, 1, 1), -wild], dim=1))
    assert float(q.log_sigma.detach().abs().max()) <= LOG_SIGMA_BOUND
    values = [q.kl(p), p.kl(q), q.log_prob(torch.full((4, 1, 1), 100.0)), q.sample()]
    assert all(bool(torch.isfinite(v).all()) for v in values)
    assert bool((q.kl(p) >= 0).all())


@pytest.mark.parametrize("grid", [(1,), (4,), (3, 4), (1, 1), (2, 3, 4)])
@pytest.mark.parametrize("came", ["same", "coarser"])
def test_layer_shapes_and_gradients(grid: tuple[int, ...], came: str) -> None:
    layer = StochasticLayer(grid, 6, 4, 2, gain=0.5, residual_channels=3)
    perturb(layer)
    context = torch.randn(3, 6, *(grid if came == "same" else (1,) * len(grid)))
    step = layer(
        layer.prior_features(context), None, layer.infer(context, torch.randn(3, 6, *grid), torch.randn(3, 3, *grid))
    )
    assert step.context.shape == (3, 6, *grid)
    assert step.posterior is not None
    assert step.z.shape == step.prior.mean.shape == step.posterior.log_sigma.shape == (3, 2, *grid)
    reach_every_parameter(layer, [step.context, step.posterior.kl(step.prior)])


def perturb(layer: torch.nn.Module) -> None:
    """Move parameters off their zero initialisation."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def test_the_prior_starts_as_a_standard_normal() -> None:
    layer = StochasticLayer((4, 4), 6, 4, 2, gain=0.5)
    step = layer(layer.prior_features(torch.randn(3, 6, 4, 4)))
    assert step.posterior is None
    assert not step.prior.mean.any()
    assert not step.prior.log_sigma.any()


def test_where_latents_come_from() -> None:
    layer = StochasticLayer((4,), 6, 4, 1, gain=0.5)
    perturb(layer)
    context = torch.randn(2, 6, 4)
    features, posterior = layer.prior_features(context), layer.infer(context, torch.randn(2, 6, 4))

    def run(z: Tensor | None = None, q: Gaussian | None = None, temperature: float = 0.0) -> Tensor:
        drawn: Tensor = layer(features, z, q, temperature=temperature, generator=torch.Generator().manual_seed(0)).z
        return drawn

    inferred = layer(features, None, posterior)
    assert inferred.posterior is posterior
    assert torch.equal(run(), inferred.prior.mean)
    assert run(q=posterior) is posterior.mean
    given = torch.randn(2, 1, 4)
    assert run(given, posterior) is given
    noise = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(temperature=0.5), inferred.prior.mean + 0.5 * inferred.prior.sigma * noise)


def test_what_is_missing_is_evidence_of_its_own() -> None:
    layer = StochasticLayer((4,), 6, 4, 1, gain=0.5, residual_channels=2)
    perturb(layer)
    assert layer.residual_conv is not None
    assert layer.residual_conv.bias is not None
    context, evidence, missing = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(2, 2, 4)
    unseen, seen = layer.infer(context, evidence), layer.infer(context, evidence, missing)
    assert not torch.equal(unseen.mean, seen.mean)
    assert not torch.equal(unseen.log_sigma, seen.log_sigma)
    padded = torch.nn.functional.pad(missing, (1, 1))
    kernel = layer.residual_conv.weight
    told = sum(torch.einsum("oi,big->bog", kernel[..., k], padded[..., k : k + 4]) for k in range(3))
    told = told + layer.residual_conv.bias[:, None]
    explained = layer.infer(context, evidence - told, missing)
    torch.testing.assert_close(explained.mean, unseen.mean)
    torch.testing.assert_close(explained.log_sigma, unseen.log_sigma)


def test_latents_change_the_context() -> None:
    layer = StochasticLayer((4,), 6, 4, 1, gain=0.5)
    context, z = torch.randn(2, 6, 4), torch.randn(2, 1, 4)
    features = layer.prior_features(context)
    assert not torch.equal(layer(features, z).context, layer(features, z + 1).context)
    assert layer(features, z.double()).z.dtype == torch.float64
