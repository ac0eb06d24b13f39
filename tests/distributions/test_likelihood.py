"""Every likelihood against torch.distributions, and the contract that a user's own has to keep as well."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import logistic
from torch import Tensor, nn
from torch.distributions import Laplace, Normal, StudentT
from typing_extensions import override

from separable_hvae import (
    HVAE,
    DiscretizedLikelihood,
    FFT2Complex,
    FFT2Real,
    GaussianLikelihood,
    Identity,
    KnownBands,
    LaplaceLikelihood,
    Likelihood,
    MAPRefiner,
    Measurement,
    Signal,
    Wavelet1,
    evaluate,
    fit,
)
from separable_hvae.distributions import Prediction
from separable_hvae.functional import pack
from tests.helpers.models import reach_every_parameter, seeded, tiny
from tests.helpers.zoo import OWN, Pyramid


class StudentLikelihood(Likelihood):
    """Student's t around the mean: a likelihood of a user's own, with the three things that one has to give."""

    def __init__(self, freedom: float = 4.0) -> None:
        super().__init__()
        self.freedom = freedom
        self.log_scale = nn.Parameter(torch.tensor(math.log(0.2)))

    def _density(self, mean: Tensor) -> StudentT:
        return StudentT(self.freedom, mean, self.log_scale.exp())

    @override
    def nll(self, prediction: Prediction, x: Tensor) -> Tensor:
        found: Tensor = -self._density(prediction.mean).log_prob(x).flatten(1).sum(1)
        return found

    @override
    def sample(self, prediction: Prediction, generator: torch.Generator | None = None) -> Tensor:
        seed = torch.randint(2**31, (), generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            drawn: Tensor = self._density(prediction.mean).sample()
        return drawn

    @property
    @override
    def variance(self) -> Tensor:
        return (2 * self.log_scale).exp() * self.freedom / (self.freedom - 2)


MAKE: dict[str, Callable[[], Likelihood]] = {
    "gaussian": lambda: GaussianLikelihood(0.3),
    "gaussian-learned": lambda: GaussianLikelihood("learned"),
    "laplace": lambda: LaplaceLikelihood(0.3),
    "laplace-learned": lambda: LaplaceLikelihood("learned"),
    "discretized": lambda: DiscretizedLikelihood(0.3, levels=16),
    "discretized-learned": lambda: DiscretizedLikelihood("learned", levels=16, range=(-2, 2)),
    "own": StudentLikelihood,
}
likelihoods = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def levels(
    count: int, low: float = -1.0, high: float = 1.0, shape: tuple[int, ...] = (3, 1, 8), seed: int = 0
) -> Tensor:
    """Signals of random values out of ``count`` in [-1, 1]."""
    index = torch.randint(count, shape, generator=seeded(seed))
    return 2 / (count - 1) * index.float() - 1


# Densities.


@given(sigma=st.floats(1e-3, 50), seed=st.integers(0, 2**16))
def test_densities_of_torch(sigma: float, seed: int) -> None:
    mean, x = (3 * sigma * torch.randn(2, 2, 5, generator=seeded(seed + i), dtype=torch.float64) for i in range(2))
    pairs: list[tuple[Likelihood, Any]] = [
        (GaussianLikelihood(sigma), Normal(mean, sigma)),
        (LaplaceLikelihood(sigma), Laplace(mean, sigma / math.sqrt(2))),
    ]
    for likelihood, density in pairs:
        found = likelihood.double().nll(Prediction([], mean), x)
        # A logarithm of σ is kept in float32.
        torch.testing.assert_close(found, -density.log_prob(x).flatten(1).sum(1), rtol=1e-5, atol=1e-5)
        assert float(likelihood.variance) == pytest.approx(float(density.variance.mean()), rel=1e-5)
        assert float(likelihood.sigma.detach()) == pytest.approx(sigma, rel=1e-5)


def test_complex_numbers_are_two_real_ones() -> None:
    mean, x = (torch.randn(2, 1, 4, dtype=torch.complex128, generator=seeded(i)) for i in range(2))
    for likelihood, density in [
        (GaussianLikelihood(0.5), Normal(pack(mean), 0.5)),
        (LaplaceLikelihood(0.5), Laplace(pack(mean), 0.5 / math.sqrt(2))),
    ]:
        found = likelihood.nll(Prediction([], mean), x)
        torch.testing.assert_close(found, -density.log_prob(pack(x)).flatten(1).sum(1), rtol=1e-6, atol=1e-6)
        drawn = likelihood.sample(Prediction([], torch.zeros(1, 1, 20000, dtype=torch.complex64)), seeded())
        assert float(pack(drawn).std()) == pytest.approx(0.5, rel=0.03)


@given(
    sigma=st.floats(1e-3, 50),
    mean=st.floats(-4, 4),
    count=st.integers(2, 256),
    ends=st.tuples(st.floats(-3, 0), st.floats(0.5, 3)),
)
def test_probabilities_of_all_values_sum_to_one(
    sigma: float, mean: float, count: int, ends: tuple[float, float]
) -> None:
    likelihood = DiscretizedLikelihood(sigma, levels=count, range=ends).double()
    values = torch.linspace(*ends, count, dtype=torch.float64)[:, None, None]
    nll = likelihood.nll(Prediction([], torch.full_like(values, mean)), values)
    assert float(torch.exp(-nll).sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.7])
def test_probabilities_of_scipy(sigma: float) -> None:
    likelihood = DiscretizedLikelihood(sigma).double()
    values, mean = torch.linspace(-1, 1, 256, dtype=torch.float64), 0.123
    nll = likelihood.nll(Prediction([], torch.full((256, 1, 1), mean, dtype=torch.float64)), values[:, None, None])
    edges = (values[:-1] + values[1:]).numpy() / 2
    density = logistic(mean, math.exp(float(likelihood.log_sigma)) * math.sqrt(3) / math.pi)
    mass = np.diff(np.concatenate([[0], density.cdf(edges), [1]]))
    likely = mass > 1e-9  # Differences of cumulative numbers are lost to rounding below.
    np.testing.assert_allclose(np.exp(-nll.detach().numpy())[likely], mass[likely], rtol=1e-5)
    assert float(likelihood.variance) == pytest.approx(density.var(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_the_mean_nats_and_slopes_are_finite(dtype: torch.dtype) -> None:
    mean = torch.tensor([-1e4, -2, 0.3, 2, 1e4], dtype=dtype)[:, None, None].requires_grad_()
    nll = DiscretizedLikelihood(1e-4).to(dtype).nll(Prediction([], mean), torch.full_like(mean, 0.0))
    (slope,) = torch.autograd.grad(nll.sum(), mean)
    assert bool(nll.isfinite().all())
    # A logistic density falls with e^(−|x| / c) on either side.
    outside = math.pi / math.sqrt(3) / 1e-4
    np.testing.assert_allclose(slope.flatten().abs().numpy(), [outside] * 5, rtol=1e-4)


def test_values_between_and_outside_count_as_the_nearest() -> None:
    likelihood, prediction = DiscretizedLikelihood(0.1, levels=5), Prediction([], torch.full((2, 1, 2), 0.2))
    near = likelihood.nll(prediction, torch.tensor([[[0.05, 0.45]], [[-7.0, 7.0]]]))
    torch.testing.assert_close(near, likelihood.nll(prediction, torch.tensor([[[0.0, 0.5]], [[-1.0, 1.0]]])))


# The contract.


@likelihoods
def test_shapes_and_gradients(make: Callable[[], Likelihood]) -> None:
    for dtype in (torch.float32, torch.float64):
        likelihood = make().to(dtype)
        mean = (0.5 * torch.randn(3, 1, 8, generator=seeded(1))).to(dtype).requires_grad_()
        x, prediction = levels(16).to(dtype), Prediction([], mean)
        nll, energy = likelihood.nll(prediction, x), likelihood.energy(prediction, x)
        assert nll.shape == energy.shape == (3,)
        assert nll.dtype == dtype
        # What refinement minimises differs by a constant.
        torch.testing.assert_close(nll - energy, likelihood.log_partition(8).to(dtype).expand(3), rtol=1e-4, atol=1e-4)
        (slope,) = torch.autograd.grad(nll.sum(), mean, retain_graph=True)
        assert bool((slope.isfinite() & (slope != 0)).all())
        assert likelihood.variance.shape == likelihood.sigma.shape == ()
        least, most = likelihood.sigma_bounds
        assert least <= float(likelihood.sigma.detach()) <= most
        band = likelihood.band_energy(mean - x, likelihood.variance)
        torch.testing.assert_close(band, (mean - x).square().sum((1, 2)) / (2 * likelihood.variance))
        reach_every_parameter(likelihood, [nll])


@likelihoods
def test_draws_have_the_density(make: Callable[[], Likelihood]) -> None:
    likelihood = make().double()
    prediction = Prediction([], torch.full((1, 1, 40_000), 0.1, dtype=torch.float64))
    with torch.no_grad():
        drawn = likelihood.sample(prediction, seeded())
        assert torch.equal(drawn, likelihood.sample(prediction, seeded()))
        assert drawn.shape == prediction.mean.shape
        if likelihood.bin_width is None:
            assert float(drawn.mean()) == pytest.approx(0.1, abs=0.01)
            assert float(drawn.std()) == pytest.approx(float(likelihood.sigma.detach()), rel=0.05)
            assert float(likelihood.sample(prediction).std()) == pytest.approx(
                float(likelihood.sigma.detach()), rel=0.1
            )
            return
        values, counts = drawn.unique(return_counts=True)
        one = Prediction([], torch.full((len(values), 1, 1), 0.1, dtype=torch.float64))
        mass = torch.exp(-likelihood.nll(one, values[:, None, None]))
        np.testing.assert_allclose(counts.numpy() / drawn.numel(), mass.numpy(), atol=0.01)


@likelihoods
@pytest.mark.parametrize("decomp", [lambda: Wavelet1(8), lambda: Identity((8,), 1)], ids=["haar", "identity"])
def test_models_train_save_and_load(make: Callable[[], Likelihood], decomp: Callable[[], Any], tmp_path: Path) -> None:
    model, x = tiny(decomp(), likelihood=make()), levels(16, shape=(16, 1, 8))
    before = {name: value.clone() for name, value in model.likelihood.state_dict().items()}
    fit(model, x, steps=2, batch_size=8, seed=0)
    learned = dict(model.likelihood.named_parameters())
    for name, value in model.likelihood.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in learned)
    model.save_pretrained(tmp_path)
    loaded = HVAE.from_pretrained(tmp_path, classes=[StudentLikelihood])
    assert type(loaded.likelihood) is type(model.likelihood)
    assert loaded.likelihood.config() == model.likelihood.config()
    with torch.no_grad():
        torch.testing.assert_close(loaded.loss(x, seeded()), model.loss(x, seeded()), rtol=0, atol=0)
    assert loaded.sigma == model.sigma
    assert loaded.log_sigma == model.log_sigma
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


@likelihoods
@pytest.mark.parametrize(
    "decomp",
    [lambda: Wavelet1(8), lambda: Identity((8,), 1), lambda: Pyramid((8,), 1, [2, 8])],
    ids=["haar", "identity", "pyramid"],
)
@pytest.mark.parametrize("schedule", ["latent", "scale", "parallel", "joint", "combined"])
def test_refinement_is_never_worse(make: Callable[[], Likelihood], decomp: Callable[[], Any], schedule: str) -> None:
    model, x = tiny(decomp(), likelihood=make()).double(), levels(16).double()
    start, result = (MAPRefiner(steps, schedule=schedule)(model, x) for steps in (0, 6))
    assert start.objective is not None
    assert result.objective is not None
    assert result.refused is not None
    assert bool((result.objective <= start.objective + 1e-9).all())
    # Most samples do get better, and the objective is what the likelihood says.
    assert int(result.refused.sum()) <= 1
    nll = model.likelihood.nll(Prediction(result.bands, result.reconstruction), x)
    constant = model.likelihood.log_partition(8)
    torch.testing.assert_close(result.objective, (result.nll + nll - constant).detach(), rtol=1e-6, atol=1e-6)
    # One sample's result does not depend on the others.
    alone = MAPRefiner(6, schedule=schedule)(model, x[1:2])
    torch.testing.assert_close(alone.reconstruction, result.reconstruction[1:2], rtol=1e-6, atol=1e-6)


def test_the_names_of_losses_agree_under_a_gaussian() -> None:
    model, x = tiny(Wavelet1(8), sigma=0.3), torch.randn(2, 1, 8, generator=seeded())
    own, l2 = (MAPRefiner(5, loss=loss)(model, x).reconstruction for loss in ("likelihood", "l2"))
    torch.testing.assert_close(own, l2, rtol=0, atol=0)


def test_losses_by_name_have_the_variance_of_any_likelihood() -> None:
    x = torch.randn(2, 1, 8, generator=seeded())
    gaussian = tiny(Wavelet1(8), sigma=0.3)
    other = tiny(Wavelet1(8), likelihood=LaplaceLikelihood(0.3))
    for loss in ("l2", "l1"):
        one, two = (MAPRefiner(4, loss=loss)(model, x).objective for model in (gaussian, other))
        torch.testing.assert_close(one, two)


def test_the_last_band_sees_the_exact_density() -> None:
    model, x = tiny(Wavelet1(8), likelihood=StudentLikelihood()).double(), levels(16).double()
    bound = Signal(x).bind(model, model.observe(x))
    bands = [torch.randn(3, *shape, dtype=torch.float64) for shape in model.decomp.band_shapes.values()]
    last = len(bands) - 1
    local = bound.misfit.local(last, bands[last], bound.target(last, bands))
    exact = model.likelihood.nll(Prediction(bands, model.decomp.synthesis(bands)), x)
    torch.testing.assert_close(local, exact)
    ((scale, total),) = bound.misfit.total(bands, bound.data)
    assert scale == 8
    torch.testing.assert_close(total, exact)
    for i, (band, target) in enumerate(zip(bands[:last], model.decomp.analysis(x), strict=False)):
        found = bound.misfit.local(i, band, bound.target(i, bands))
        wanted = Normal(target, float(model.sigma.detach())).log_prob(target) - Normal(
            target, float(model.sigma.detach())
        ).log_prob(band)
        torch.testing.assert_close(found, wanted.flatten(1).sum(1))


@likelihoods
def test_measurements_and_known_bands_reckon_with_the_variance(make: Callable[[], Likelihood]) -> None:
    model, x = tiny(Wavelet1(8), likelihood=make()).double(), levels(16).double()
    plain = tiny(Wavelet1(8), sigma=float(model.sigma.detach())).double()
    plain.load_state_dict(
        plain.state_dict() | {k: v for k, v in model.state_dict().items() if not k.startswith("likelihood")}
    )
    for term in (Measurement(x[..., ::2], lambda x: x[..., ::2], 0.1), KnownBands.of(x, model.decomp, until=4)):
        found, wanted = (MAPRefiner(3)(m, term) for m in (model, plain))
        torch.testing.assert_close(found.reconstruction, wanted.reconstruction, rtol=1e-5, atol=1e-5)
        corrected = [term.correct(m, found.reconstruction) for m in (model, plain)]
        torch.testing.assert_close(*corrected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_for_networks_in_any_likelihood() -> None:
    model = tiny(Wavelet1(8), likelihood=StudentLikelihood())
    before = model.sigma.detach().clone()
    assert torch.equal(model.bfloat16().sigma, before)


# Bits.


def test_bits_of_a_discretized_likelihood() -> None:
    model = tiny(FFT2Real(4, channels=1), likelihood=DiscretizedLikelihood(0.2))
    x = levels(256, shape=(12, 1, 4, 4))
    found = evaluate(model, x, importance=3)
    assert found["bits"] == pytest.approx(found["loss"] / math.log(2))
    assert found["importance_bits"] == pytest.approx(found["importance"] / math.log(2))
    assert found["objective"] == found["loss"]
    with pytest.raises(ValueError, match="bin_width is for densities: DiscretizedLikelihood gives probabilities"):
        evaluate(model, x, bin_width=2 / 255)


def test_small_bins_have_the_mass_of_the_density_times_their_width() -> None:
    x, prediction = levels(4001), Prediction([], torch.zeros(3, 1, 8, dtype=torch.float64))
    nll = DiscretizedLikelihood(0.5, levels=4001).double().nll(prediction, x.double())
    density = logistic(0, 0.5 * math.sqrt(3) / math.pi)
    wanted = -np.log(density.pdf(x.double().numpy()) * 2 / 4000).sum((1, 2))
    np.testing.assert_allclose(nll.numpy(), wanted, rtol=1e-5)


# Errors.

FREE: Any = "free"
HALF: Any = 0.5
ABSTRACT: Any = Likelihood


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GaussianLikelihood(0.0), ValueError, "sigma must be positive and finite, got 0.0"),
        (lambda: LaplaceLikelihood(1e3), ValueError, "sigma must be between 0.0001 and 100, got 1000.0: rescale"),
        (lambda: LaplaceLikelihood(FREE), ValueError, "sigma must be a positive number or 'learned', got 'free'"),
        (lambda: DiscretizedLikelihood(levels=1), ValueError, "levels must be at least 2, got 1"),
        (lambda: DiscretizedLikelihood(range=(1, 1)), ValueError, "range must go from a finite number to a larger one"),
        (lambda: DiscretizedLikelihood(range=HALF), TypeError, "range must be two numbers, got 0.5"),
        (
            lambda: HVAE(FFT2Complex(8), likelihood=DiscretizedLikelihood()),
            ValueError,
            "DiscretizedLikelihood is for real signals, got a decomposition of complex ones",
        ),
        (ABSTRACT, TypeError, "abstract"),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


class Nameless(StudentLikelihood):
    """A likelihood that forgets its argument."""

    def __init__(self, degrees: float) -> None:
        super().__init__(degrees)


def test_a_likelihood_that_cannot_be_built_again_is_not_saved(tmp_path: Path) -> None:
    model = tiny(Wavelet1(8), likelihood=Nameless(5.0))
    with pytest.raises(TypeError, match="Nameless has no attribute 'degrees' for its argument"):
        model.save_pretrained(tmp_path)
    own = tiny(OWN["own-dct"](), likelihood=StudentLikelihood())
    own.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pass it as classes=\[StudentLikelihood\]|pass it as classes=\[RingDCT\]"):
        HVAE.from_pretrained(tmp_path)


@settings(max_examples=20)
@given(
    sigma=st.one_of(st.just("learned"), st.floats(1e-3, 10)),
    count=st.integers(2, 300),
    low=st.floats(-5, 0),
)
def test_configurations_build_the_same_again(sigma: Any, count: int, low: float) -> None:
    for likelihood in (
        GaussianLikelihood(sigma),
        LaplaceLikelihood(sigma),
        DiscretizedLikelihood(sigma, levels=count, range=(low, 1.0)),
    ):
        again = type(likelihood)(**likelihood.config())
        assert again.config() == likelihood.config()
        assert repr(again) == repr(likelihood)
        assert torch.equal(again.sigma, likelihood.sigma)
