import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import combinations, product
from threading import Barrier, Event
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from typing_extensions import override

from separable_hvae import HVAE, FFT1Real, FFT2Complex, Identity, MAPRefiner, Refiner
from separable_hvae._float32 import float32, float32_settings, full_precision
from separable_hvae.data_terms.signal import absolute_error
from separable_hvae.distributions import Prediction
from separable_hvae.functional import pack
from separable_hvae.nn.stochastic_layer import StochasticLayer
from separable_hvae.refine import (
    Adam,
    Chain,
    Eager,
    GradientDescent,
    History,
    InferenceState,
    Iterate,
    Latent,
    Parallel,
    Problem,
    Rule,
    Schedule,
    Solve,
)
from separable_hvae.refine.execution.base import Gradient, Point
from tests.helpers.linear_gaussian import Array, ClosedForm, flat, linear_gaussian
from tests.helpers.models import SIGMA, assert_equal, few, layer_passes, seeded, tiny
from tests.helpers.zoo import ORTHONORMAL, OWN, SMALL, Make, Pyramid, signal

SCHEDULES = ["latent", "scale", "parallel", "joint", "combined"]


def objective(
    model: HVAE, latents: Sequence[Tensor], x: Tensor, *, loss: str = "l2", beta: float | Mapping[int, float] = 1.0
) -> Tensor:
    """The full MAP objective, from what the latents decode to: ``(B,)``."""
    decoded = []
    passes = layer_passes(model, lambda: decoded.append(model.decode(latents)))
    assert len(passes) == model.depth
    nll = [
        -Normal(p.prior.mean, p.prior.sigma).log_prob(z).flatten(1).sum(1) for p, z in zip(passes, latents, strict=True)
    ]
    weights = beta if isinstance(beta, Mapping) else dict.fromkeys(model.scales, beta)
    if model.decomp.orthonormal:
        parts = list(zip(model.decomp.band_scales, decoded[0].bands, model.decomp.analysis(x), strict=True))
    else:
        parts = [(model.scales[-1], pack(decoded[0].reconstruction), pack(x))]
    sigma = float(model.sigma)
    for s, h_hat, h in parts:
        error = (h_hat - h).flatten(1)
        data = error.square().sum(1) / (2 * sigma**2) if loss == "l2" else math.sqrt(2) / sigma * error.abs().sum(1)
        nll.append(weights[s] * data)
    return torch.stack(nll).sum(0).detach()


# Where refinement lands.


class ConjugateGradient(Rule):
    """Exact on quadratic objectives after as many steps as a problem has dimensions."""

    default_step = default_joint_step = 1.0

    @override
    def step(
        self, problem: Problem, latents: list[Tensor], sizes: Sequence[float], state: Any
    ) -> tuple[list[Tensor], Any]:
        def rows(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([t.flatten(1) for t in tensors], dim=1)

        def move(direction: Tensor) -> list[Tensor]:
            parts = direction.split([z[0].numel() for z in latents], dim=1)
            return [z + part.reshape(z.shape) for z, part in zip(latents, parts, strict=True)]

        residual = -rows(problem.gradient(latents))
        norm = residual.square().sum(1, keepdim=True)
        direction = residual if state is None else residual + norm / state[1].clamp_min(1e-100) * state[0]
        unit = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-100)
        curvature = (unit * (rows(problem.gradient(move(unit))) + residual)).sum(1, keepdim=True)
        return move((unit * residual).sum(1, keepdim=True) / curvature.clamp_min(1e-30) * unit), (direction, norm)


@pytest.mark.parametrize("schedule", ["latent", "own prior", "scale", "joint"])
@pytest.mark.parametrize("make", [*ORTHONORMAL.values(), lambda: Pyramid((4,), 1)], ids=[*ORTHONORMAL, "pyramid"])
def test_lands_on_the_closed_form(make: Make, schedule: str) -> None:
    model = linear_gaussian(make())
    algebra, x = ClosedForm(model), 2 * signal(model.decomp)
    guidance = {s: 1 + 0.5 * i for i, s in enumerate(reversed(model.scales))}
    optima: dict[str, Callable[..., Array]] = {
        "latent": algebra.latent,
        "own prior": partial(algebra.latent, own_prior=True),
        "scale": algebra.scale,
        "joint": algebra.joint,
    }
    refiner = MAPRefiner(
        {"joint": algebra.numel, "scale": 60}.get(schedule, 24),
        guidance=guidance,
        schedule=Latent(own_prior=True) if schedule == "own prior" else schedule,
        rule=ConjugateGradient(),
    )
    result = refiner(model, x)
    assert result.refused is not None
    assert not result.refused.any()
    rows = flat([pack(x)])
    optimum = np.stack([optima[schedule](row, guidance) for row in rows])
    np.testing.assert_allclose(flat(result.latents), optimum, atol=1e-8)


def test_the_optima_differ() -> None:
    algebra, row = ClosedForm(linear_gaussian(FFT1Real(6))), np.linspace(-2, 3, 6)
    optima = [algebra.joint(row), algebra.scale(row), algebra.latent(row), algebra.latent(row, own_prior=True)]
    assert all(np.abs(a - b).max() > 0.01 for a, b in combinations(optima, 2))
    algebra, row = ClosedForm(linear_gaussian(Identity((4,)))), np.linspace(-2, 3, 12)
    np.testing.assert_allclose(algebra.joint(row), algebra.scale(row))
    assert np.abs(algebra.joint(row) - algebra.latent(row)).max() > 0.01


@pytest.mark.parametrize("make", [lambda: FFT1Real(3, scales=[1, 3]), lambda: Identity((2,), channels=1)])
def test_parallel_subsets_land_where_single_ones_do(make: Make) -> None:
    model = linear_gaussian(make(), layers=1)
    algebra, x = ClosedForm(model), signal(model.decomp)
    result = MAPRefiner(600, 0.05, schedule=Parallel(), rule="gd")(model, x)
    np.testing.assert_allclose(flat(result.latents), [algebra.scale(row) for row in flat([x])], atol=1e-6)


@pytest.mark.parametrize("rule", ["gd", "adam"])
def test_the_rules_converge(rule: str) -> None:
    model = linear_gaussian(FFT1Real(3, scales=[1, 3]), layers=1)
    algebra, x = ClosedForm(model), signal(model.decomp)
    result = MAPRefiner(500, 0.05, schedule="scale", rule=rule)(model, x)
    np.testing.assert_allclose(flat(result.latents), [algebra.scale(row) for row in flat([x])], atol=1e-4)


@pytest.mark.parametrize("rule", ["gd", "adam"])
def test_the_rules_are_those_of_torch(rule: str) -> None:
    model = few()
    x = signal(model.decomp)
    iterates: list[Iterate] = []
    MAPRefiner(4, 0.01, schedule="joint", rule=rule)(model, x, callback=iterates.append)
    moving = [z.clone().requires_grad_() for z in iterates[0].latents]
    optimizer = (torch.optim.SGD if rule == "gd" else torch.optim.Adam)(moving, lr=0.01)
    for iterate in iterates:
        assert_equal([z.detach() for z in moving], iterate.latents, exactly=False)
        optimizer.zero_grad()
        result = model.decode(moving)
        (result.nll + model.likelihood.nll(Prediction(result.bands, result.reconstruction), x)).sum().backward()
        optimizer.step()


def test_prior_means_complete_a_subset_without_the_encoder() -> None:
    model = linear_gaussian(FFT1Real(4, scales=[1, 4]), layers=3)
    algebra, x = ClosedForm(model), signal(model.decomp)
    result = MAPRefiner(16, schedule="latent", rule=ConjugateGradient(), init="prior")(model, x)
    expected = [algebra.latent(row, init="prior") for row in flat([x])]
    np.testing.assert_allclose(flat(result.latents), expected, atol=1e-8)


def test_given_latents_complete_a_subset_as_they_are() -> None:
    model = linear_gaussian(Identity((3,), channels=1), layers=2)
    algebra, x = ClosedForm(model), signal(model.decomp)
    given = [
        torch.randn(2, *shape, dtype=torch.float64, generator=seeded(i)) for i, shape in enumerate(model.latent_shapes)
    ]
    result = MAPRefiner(16, schedule="latent", rule=ConjugateGradient(), init=given)(model, x)
    for row, start, found in zip(flat([x]), flat(given), flat(result.latents), strict=True):
        z = start
        for m in range(model.depth):
            z = algebra.solve(algebra.whitened(row), z, [m])
        np.testing.assert_allclose(found, z, atol=1e-8)


def test_the_papers_setting_literally() -> None:
    """Each iterate of Algorithm 1, in numpy: own prior, L1, λ = 0.001, β = 1, from a posterior sample."""
    refiner = MAPRefiner.paper()
    assert (refiner.steps, refiner.step_size, refiner.guidance, refiner.init, refiner.sample) == (
        25,
        1e-3,
        1.0,
        "posterior",
        True,
    )
    assert isinstance(refiner.rule, GradientDescent)
    assert isinstance(refiner.schedule, Latent)
    assert refiner.schedule.own_prior
    assert refiner.loss is absolute_error

    model = linear_gaussian(FFT1Real(4, channels=1, scales=[1, 4]))
    algebra, x = ClosedForm(model), signal(model.decomp)
    iterates: list[Iterate] = []
    result = refiner(model, x, seeded(), iterates.append)
    generator = seeded()
    noise = [
        torch.randn(2, *s, dtype=torch.float64, generator=generator).flatten(1).numpy() for s in model.latent_shapes
    ]
    moves, final = iter(iterates), np.zeros((2, algebra.numel))
    for index, layers in enumerate(algebra.subsets):
        for k, m in enumerate(layers):
            slot, layer = algebra.slots[m], algebra.layers[m]
            for row, z, epsilon in zip(flat([x]), final, noise[m], strict=True):
                z[slot] = algebra.mean(m, z, row) + np.exp(layer.posterior_log_sigma.detach().numpy()) * epsilon
                for later in layers[k + 1 :]:
                    z[algebra.slots[later]] = algebra.mean(later, z, row)
            for _ in range(25):
                iterate = next(moves)
                np.testing.assert_allclose(flat(iterate.latents), final[:, slot], atol=1e-12)
                for b, (row, z) in enumerate(zip(flat([x]), final, strict=True)):
                    prior, band = algebra.priors[m], algebra.bands[index]
                    error = band(z) - algebra.target(index, row, z)
                    assert float(iterate.data[b]) == pytest.approx(np.abs(error).sum())
                    gradient = prior.matrix[:, slot].T @ prior(z) + band.matrix[:, slot].T @ np.sign(error)
                    z[slot] -= 1e-3 * gradient
    assert next(moves, None) is None
    assert result.refused is not None
    np.testing.assert_allclose(flat(result.latents)[~result.refused], final[~result.refused.numpy()], atol=1e-12)


# Gradients and cost.


class Probe(Refiner):
    """Compare each problem's gradient with central differences along a random direction, latent by latent."""

    checked = 0

    @override
    def step(self, problem: Problem, latents: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        def value(moved: list[Tensor]) -> Tensor:
            problem.gradient(moved)
            assert problem.value is not None
            return problem.value.objective

        gradient, h = problem.gradient(latents), 1e-6
        for k, (z, g) in enumerate(zip(latents, gradient, strict=True)):
            direction = torch.randn(z.shape, dtype=z.dtype, generator=seeded(self.checked))
            up, down = ([*latents[:k], z + s * h * direction, *latents[k + 1 :]] for s in (1, -1))
            torch.testing.assert_close(
                (value(up) - value(down)) / (2 * h), (g * direction).flatten(1).sum(1), rtol=1e-5, atol=1e-5
            )
            self.checked += 1
        return [z - 1e-3 * g for z, g in zip(latents, gradient, strict=True)], None


def fourth_power(h_hat: Tensor, h: Tensor) -> Tensor:
    return (h_hat - h).pow(4).flatten(1).sum(1)


@pytest.mark.parametrize("schedule", [*SCHEDULES, Latent(own_prior=True)], ids=[*SCHEDULES, "own prior"])
@pytest.mark.parametrize(
    ("name", "loss"), [("few", "l1"), ("few", "l2"), ("few", fourth_power), ("own-pyramid", "l2"), ("identity-1", "l1")]
)
def test_gradients_against_finite_differences(name: str, schedule: Any, loss: Any) -> None:
    model = few() if name == "few" else tiny(SMALL[name](), sigma=SIGMA, layers=1).double()
    x = signal(model.decomp)
    probe = Probe(2, loss=loss, schedule=schedule, guidance=0.7)
    probe(model, x)
    assert probe.checked == 2 * model.depth


class Spy(MAPRefiner):
    """Note which leaf modules each step runs."""

    def __init__(self, model: HVAE, **options: Any) -> None:
        super().__init__(1, **options)
        self.ran: list[str] = []
        self.steps_ran: list[tuple[int, list[str]]] = []
        for name, module in model.named_modules():
            if not list(module.children()) or isinstance(module, StochasticLayer):
                module.register_forward_hook(lambda *_, name=name: self.ran.append(name))

    @override
    def step(self, problem: Problem, latents: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        self.ran.clear()
        moved = super().step(problem, latents, state)
        self.steps_ran.append((max(problem.scales), list(self.ran)))
        return moved

    def layers(self) -> list[int]:
        """Stochastic layers that each step ran."""
        return [
            sum(bool(re.fullmatch(r"decoder\.subsets\.\d+\.layers\.\d+", n)) for n in ran) for _, ran in self.steps_ran
        ]


@pytest.mark.parametrize("schedule", ["latent", "scale"])
@pytest.mark.parametrize("make", [SMALL["fft2-no-band-at-3"], SMALL["haar-skips"], OWN["own-pyramid"]])
def test_a_step_runs_its_own_subset_and_no_other(make: Make, schedule: str) -> None:
    model = tiny(make())
    spy = Spy(model, schedule=schedule)
    spy(model, signal(model.decomp, dtype=torch.float32))
    indices = [i for i, s in enumerate(model.subsets) for _ in range(len(s.scales) if schedule == "latent" else 1)]
    for index, (scale, ran) in zip(indices, spy.steps_ran, strict=True):
        assert scale in model.subsets[index].scales
        assert any(".head." in name for name in ran)
        assert all(name.startswith((f"decoder.subsets.{index}.", "decomp.")) for name in ran)
        # The amortized part is not run again.
        assert not any(part in name for name in ran for part in ("posterior", "residual_conv"))
    sizes = [len(s.scales) for s in model.subsets]
    expected = [m for size in sizes for m in range(size, 0, -1)] if schedule == "latent" else sizes
    assert spy.layers() == expected


def test_vanilla_steps_run_all_later_layers() -> None:
    model = tiny(SMALL["identity-1"]())
    x = signal(model.decomp, dtype=torch.float32)
    spy = Spy(model, schedule="latent")
    spy(model, x)
    assert spy.layers() == list(range(model.depth, 0, -1))
    for m, (_, ran) in enumerate(spy.steps_ran):
        assert {int(n.split(".")[4]) for n in ran if ".layers." in n} == set(range(m, model.depth))
        assert any(".head." in name for name in ran)
    for schedule, name in product(("parallel", "joint"), ("fft1-real", "identity-1")):
        model = tiny(SMALL[name]())
        spy = Spy(model, schedule=schedule)
        spy(model, signal(model.decomp, dtype=torch.float32))
        assert spy.layers() == [model.depth]


# Never worse than the start.


class Sabotage(Rule):
    """Improve every sample but the first, which goes astray."""

    default_step = default_joint_step = 1e-4

    def __init__(self, wrong: float) -> None:
        self.wrong = wrong

    @override
    def step(
        self, problem: Problem, latents: list[Tensor], sizes: Sequence[float], state: Any
    ) -> tuple[list[Tensor], Any]:
        moved = [z - s * g for z, g, s in zip(latents, problem.gradient(latents), sizes, strict=True)]
        for z in moved:
            z[0] = self.wrong
        return moved, None


WILD = [(1e-6, 1.0), (1e-3, 1e6), (0.5, 0.0), (10.0, 1.0), (1e3, 1e6)]


STARTS: dict[str, Callable[[], HVAE]] = {
    "fft": few,
    "float32": lambda: few().float(),
    "frame": lambda: tiny(Pyramid((4,), 1, [1, 4]), sigma=SIGMA).double(),
}


@pytest.mark.parametrize(
    ("name", "schedule"), [*product(("fft", "frame"), SCHEDULES), ("float32", "scale"), ("float32", "joint")]
)
def test_never_worse_than_the_start(name: str, schedule: str) -> None:
    model = STARTS[name]()
    dtype = model.start.dtype
    # In single precision the objectives measured here carry rounding of their own.
    slack = 1e-5 if dtype == torch.float64 else 2e-5
    x = signal(model.decomp, 3, dtype) * torch.tensor([1.0, 0.1, 50.0], dtype=dtype)[:, None, None]
    given = model.encode(x, temperature=2.0, generator=seeded()).latents
    inits: list[Any] = ["posterior", "prior", given]
    refused = 0
    for n, (size, beta) in enumerate(WILD * 2):
        loss = ("l1", "l2")[n % 2]
        options: dict[str, Any] = {"guidance": beta, "loss": loss, "init": inits[n % 3], "sample": n // 2 % 2 == 0}
        start = MAPRefiner(0, **options)(model, x, seeded(1))
        before = objective(model, start.latents, x, loss=loss, beta=beta)
        for rule in ("gd", "adam"):
            result = MAPRefiner(2, size, schedule=schedule, rule=rule, **options)(model, x, seeded(1))
            after = objective(model, result.latents, x, loss=loss, beta=beta)
            assert bool((after <= before + slack * (1 + before.abs())).all()), (rule, size, options)
            assert result.refused is not None
            for old, new in zip(start.latents, result.latents, strict=True):
                assert torch.equal(old[result.refused], new[result.refused])
            assert_equal([model.decode(result.latents).reconstruction], [result.reconstruction])
            refused += int(result.refused.sum())
    assert refused > 0


@pytest.mark.parametrize("wrong", [1e6, math.nan, math.inf])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_refused_sample_returns_its_start_and_the_others_stay(schedule: str, wrong: float) -> None:
    model = few()
    x = signal(model.decomp, 3)
    start, result = MAPRefiner(0)(model, x), MAPRefiner(3, schedule=schedule, rule=Sabotage(wrong))(model, x)
    alone = MAPRefiner(3, 1e-4, schedule=schedule, rule="gd")(model, x[1:])
    assert result.refused is not None
    assert result.refused.tolist() == [True, False, False]
    assert_equal([z[0] for z in result.latents], [z[0] for z in start.latents])
    assert_equal([z[1:] for z in result.latents], alone.latents, exactly=False)
    assert_equal([result.reconstruction[0]], [start.reconstruction[0]], exactly=False)
    assert start.refused is not None
    assert not start.refused.any()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_start_without_a_finite_objective_is_an_error(steps: int, wrong: float) -> None:
    model = few()
    x = signal(model.decomp, 5)
    x[3:] = 7.0

    def loss(h_hat: Tensor, h: Tensor) -> Tensor:
        return torch.where(h.flatten(1).amax(1) > 6, wrong, 1.0) * (h_hat - h).square().flatten(1).sum(1)

    with pytest.raises(FloatingPointError, match=r"^samples 3, 4 have no objective .* finite at the start: their data"):
        MAPRefiner(steps, loss=loss, batch_size=3)(model, x)
    given = [1e300 * z for z in model.encode(x).latents]
    with pytest.raises(FloatingPointError, match=r"^samples 0, 1, 2, 3, 4 .*: their prior .* given as init"):
        MAPRefiner(steps, init=given)(model, x)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SMALL)
def test_refinement_improves_every_decomposition(name: str, schedule: str) -> None:
    model = tiny(SMALL[name](), sigma=SIGMA, layers=1, perturbed=name != "fft3-real").double()
    x = signal(model.decomp)
    start, result = MAPRefiner(0)(model, x), MAPRefiner(4, 3e-3, schedule=schedule)(model, x)
    assert result.refused is not None
    assert not result.refused.any()
    assert bool((objective(model, result.latents, x) < objective(model, start.latents, x)).all())
    assert_equal([model.decode(result.latents).reconstruction], [result.reconstruction])
    assert result.reconstruction.dtype == x.dtype
    assert [z.shape for z in result.latents] == [(2, *shape) for shape in model.latent_shapes]


# Starts.


def test_no_steps_are_amortized_inference() -> None:
    model = few()
    x = signal(model.decomp)
    for sample, amortized in ((False, model.encode(x)), (True, model(x, seeded()))):
        result = MAPRefiner(0, sample=sample)(model, x, seeded())
        assert_equal(result.latents, amortized.latents)
        for name in ("reconstruction", "nll", "kl", "data"):
            assert_equal([getattr(result, name)], [getattr(amortized, name).detach()])
        assert result.history == History()
        assert result.refused is not None
        assert not result.refused.any()
    means = MAPRefiner({1: 0, 4: 0}, schedule="joint", init="prior")(model, x)
    assert means.kl is None
    prior = layer_passes(model, lambda: model.decode(means.latents))
    assert_equal(means.latents, [p.prior.mean for p in prior], exactly=False)
    given = model.encode(x, temperature=1.0, generator=seeded()).latents
    assert_equal(MAPRefiner(0, init=given)(model, x).latents, given)


def test_fully_iterative_inference_ignores_the_encoder() -> None:
    model, other = few(), few()
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.add_(1.0)
    x = signal(model.decomp)
    for schedule, sample in product(SCHEDULES, [True, False]):
        refiner = MAPRefiner(3, schedule=schedule, init="prior", sample=sample)
        result = refiner(model, x, seeded())
        assert_equal(result.latents, refiner(other, x, seeded()).latents)
        start = MAPRefiner(0, init="prior", sample=sample)(model, x, seeded())
        assert bool((objective(model, result.latents, x) < objective(model, start.latents, x)).all())
        assert result.kl is None


def test_refinement_goes_on_from_given_latents() -> None:
    model = few()
    x = signal(model.decomp)
    once = MAPRefiner(6, 1e-3, schedule="joint", rule="gd")(model, x)
    half = MAPRefiner(3, 1e-3, schedule="joint", rule="gd")(model, x)
    again = MAPRefiner(3, 1e-3, schedule="joint", rule="gd", init=half.latents)(model, x)
    assert_equal(again.latents, once.latents, exactly=False)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_drawn_start_follows_its_generator(schedule: str) -> None:
    model = few()
    x = signal(model.decomp)
    refiner = MAPRefiner(2, schedule=schedule, sample=True)
    first, same, other = (refiner(model, x, seeded(seed)).latents for seed in (0, 0, 1))
    assert_equal(first, same)
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    refiner(model, x, seeded())
    MAPRefiner(2, schedule=schedule)(model, x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("init", ["posterior", "prior"])
@pytest.mark.parametrize("schedule", ["latent", "scale"])
def test_a_drawn_start_moves_along_with_its_distribution(schedule: str, init: Any) -> None:
    model = linear_gaussian(FFT1Real(4, scales=[1, 4]))
    algebra, x = ClosedForm(model), signal(model.decomp)
    iterates: list[Iterate] = []
    refiner = MAPRefiner(1, schedule=schedule, rule=Sabotage(0.25), init=init, sample=True)
    refiner(model, x, seeded(), iterates.append)
    generator, row, z = seeded(), flat([x])[0], np.full(algebra.numel, 0.25)
    noise = [
        torch.randn(2, *s, dtype=torch.float64, generator=generator)[0].flatten().numpy() for s in model.latent_shapes
    ]
    first = len(model.subsets[0].layers)
    for m in range(first, model.depth):
        layer, slot = algebra.layers[m], algebra.slots[m]
        if init == "posterior":
            mean, log_sigma = algebra.mean(m, z, row), layer.posterior_log_sigma
        else:
            mean, log_sigma = algebra.prior_mean(m, z), layer.log_sigma
        found = iterates[m].latents[0] if schedule == "latent" else iterates[1].latents[m - first]
        expected = mean + np.exp(log_sigma.detach().numpy()) * noise[m]
        np.testing.assert_allclose(found[0].flatten().numpy(), expected, atol=1e-12)
        # Latent by latent, the next one sees where this one went.
        z[slot] = 0.25 if schedule == "latent" else expected


# What surrounds it.


@pytest.mark.parametrize("rule", ["gd", "adam", "gauss-newton"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samples_are_independent(schedule: str, rule: str) -> None:
    model = few()
    x = signal(model.decomp, 3) * torch.tensor([1.0, 0.1, 20.0], dtype=torch.float64)[:, None, None]
    refiner = MAPRefiner(5, 1e-3, schedule=schedule, rule=rule)
    together = refiner(model, x)
    assert together.refused is not None
    for i in range(3):
        alone = refiner(model, x[i : i + 1])
        assert_equal(alone.latents, [z[i : i + 1] for z in together.latents], exactly=False)
        assert alone.refused is not None
        assert bool(alone.refused) == bool(together.refused[i])


def fail(_: Iterate) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_works_in_any_mode_and_leaves_everything_as_it_was(
    training: bool, around: Callable[[], AbstractContextManager[Any]]
) -> None:
    model = few()
    x = signal(model.decomp)
    expected = {s: MAPRefiner(2, schedule=s)(model, x) for s in SCHEDULES}
    given = MAPRefiner(2, init=model.encode(x).latents)(model, x)
    model.train(training)
    model.subsets[1].eval()
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, 3.0) if i % 3 == 1 else None
    x.requires_grad_()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with around():
        signals = [x, x.clone()] if around is torch.inference_mode else [x]
        modes_outside = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        for y, schedule in product(signals, SCHEDULES):
            result = MAPRefiner(2, schedule=schedule)(model, y)
            assert_equal(result.latents, expected[schedule].latents)
            assert_equal([result.reconstruction], [expected[schedule].reconstruction])
            tensors = [result.reconstruction, result.nll, *result.bands, *result.latents]
            assert not any(t.requires_grad or t.is_inference() for t in tensors)
        with pytest.raises(ZeroDivisionError):
            MAPRefiner(2)(model, x, callback=fail)
        start = model.eval().encode(x).latents
        model.train(training)
        model.subsets[1].eval()
        copies = [z.clone() for z in start]
        assert_equal(MAPRefiner(2, init=start)(model, x).latents, given.latents)
        assert_equal(start, copies)
        assert modes_outside == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert modes == [m.training for m in model.modules()]
    assert_equal([x.detach()], [signal(model.decomp)])
    assert x.grad is None
    assert x.requires_grad
    assert_equal(list(model.state_dict().values()), list(state.values()))
    for i, parameter in enumerate(parameters):
        assert parameter.requires_grad == (i % 3 > 0)
        assert (parameter.grad is not None) == (i % 3 == 1)
        assert parameter.grad is None or bool((parameter.grad == 3).all())


def test_results_share_no_memory_with_what_came_in() -> None:
    model = few()
    x = signal(model.decomp)
    given = model.encode(x).latents
    for steps in (0, 2):
        result = MAPRefiner(steps, init=given)(model, x)
        for z in [*result.latents, result.reconstruction]:
            z.detach().fill_(7.0)
    assert_equal(given, model.encode(x).latents)
    assert_equal([x], [signal(model.decomp)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    model = tiny(FFT1Real(4, scales=[1, 4]), sigma=SIGMA)
    x = signal(model.decomp, dtype=torch.float32).to(dtype)
    result = MAPRefiner(2)(model, x)
    assert result.reconstruction.dtype == dtype
    assert all(z.dtype == torch.float32 for z in result.latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_complex_signals(schedule: str, dtype: torch.dtype) -> None:
    model = tiny(FFT2Complex(4, scales=[1, 4]), sigma=SIGMA).to(dtype)
    x = signal(model.decomp, dtype=dtype)
    result = MAPRefiner(3, schedule=schedule)(model, x)
    assert result.reconstruction.dtype == x.dtype
    error, before = ((r.reconstruction - x).abs().square().sum() for r in (result, MAPRefiner(0)(model, x)))
    assert float(error.detach()) < float(before.detach())
    assert not any(z.is_complex() for z in result.latents)


# Callback and history.


@pytest.mark.parametrize(
    ("schedule", "steps", "problems"),
    [
        ("latent", 2, [(1, 2), (1, 2), (4, 2), (4, 2)]),
        ("scale", [3, 1], [(1, 3), (4, 1)]),
        ("scale", {4: 2, 1: 0}, [(1, 0), (4, 2)]),
        ("parallel", 2, [(4, 2)]),
        ("joint", {1: 3, 4: 3}, [(4, 3)]),
    ],
)
def test_callback_and_history(schedule: str, steps: Any, problems: list[tuple[int, int]]) -> None:
    model, iterates = few(), list[Iterate]()
    x = signal(model.decomp, 3)
    result = MAPRefiner(steps, schedule=schedule)(model, x, callback=iterates.append)
    expected = [(number, step, scale) for number, (scale, n) in enumerate(problems) for step in range(n)]
    assert [(i.problem, i.step, max(i.scales)) for i in iterates] == expected
    for i in iterates:
        shapes = [(3, 1, s) for s in i.scales]
        assert [tuple(z.shape) for z in i.latents] == shapes
        assert i.nll.shape == i.data.shape == i.objective.shape == (3,)
        assert not any(t.requires_grad for t in (*i.latents, i.nll, i.data))
        torch.testing.assert_close(i.objective, i.nll + i.data)
    history = result.history
    assert isinstance(history, History)
    assert history.problem == [i.problem for i in iterates]
    assert history.scale == [max(i.scales) for i in iterates]
    assert history.seconds == [i.seconds for i in iterates] == sorted(history.seconds)
    for name in ("objective", "data", "nll"):
        assert getattr(history, name) == pytest.approx([float(getattr(i, name).mean()) for i in iterates])
    if schedule in ("parallel", "joint"):
        before = objective(model, iterates[0].latents, x)
        torch.testing.assert_close(iterates[0].objective, before)
        assert_equal(iterates[0].latents, model.encode(x).latents)


def test_settings_by_scale_reach_their_scale() -> None:
    model = few()
    x = signal(model.decomp)
    frozen = MAPRefiner(3, {1: 0.0, 4: 1e-2}, guidance=[2.0, 0.5], schedule="joint")(model, x)
    start = model.encode(x)
    assert_equal(frozen.latents[:2], start.latents[:2])
    assert not torch.equal(frozen.latents[2], start.latents[2])
    beta = {1: 2.0, 4: 0.5}
    iterates: list[Iterate] = []
    MAPRefiner(1, guidance=beta, schedule="joint")(model, x, callback=iterates.append)
    torch.testing.assert_close(iterates[0].objective, objective(model, start.latents, x, beta=beta))


# A user's own parts.


class Coarsest(Schedule):
    """The coarsest subset alone, against the objective of the whole."""

    @override
    def __call__(self, state: InferenceState, solve: Solve) -> list[Tensor]:
        scales = state.model.subsets[0].scales
        first, rest = state.latents[: len(scales)], state.latents[len(scales) :]
        return solve(state.problem(first, [state.full_objective(rest)], state.steps[scales[-1]])) + rest


def test_own_rule_and_schedule() -> None:
    model = few()
    x = signal(model.decomp)
    iterates: list[Iterate] = []
    result = MAPRefiner([4, 0], rule=Sabotage(0.25), schedule=Coarsest())(model, x, callback=iterates.append)
    assert len(iterates) == 4
    assert all(bool((z[0] == 0.25).all()) for z in iterates[-1].latents)
    assert_equal(result.latents[2:], model.encode(x).latents[2:])
    adam = MAPRefiner(3, schedule=Coarsest(), rule=Adam(betas=(0.5, 0.9), eps=1e-6))(model, x)
    assert bool((objective(model, adam.latents, x) < objective(model, model.encode(x).latents, x)).all())


class Counting(Eager):
    """Count the gradients that are asked for."""

    count = 0

    @override
    def gradients(self, points: Sequence[Point]) -> list[Gradient]:
        self.count += 1
        return super().gradients(points)


@pytest.mark.parametrize(
    ("schedule", "steps"), [(Coarsest(), 4), (Chain((Coarsest(), 1), ("joint", 1)), 4), ("scale", 8), ("latent", 16)]
)
def test_every_schedule_runs_as_the_execution_says(schedule: Any, steps: int) -> None:
    execution, model = Counting(threads=1), few()
    MAPRefiner(4, schedule=schedule, execution=execution)(model, signal(model.decomp))
    assert execution.count == steps


class Returning(Coarsest):
    """Take the steps, and return something else."""

    def __init__(self, what: Callable[[list[Tensor]], Any]) -> None:
        self.what = what

    @override
    def __call__(self, state: InferenceState, solve: Solve) -> list[Tensor]:
        return cast(list[Tensor], self.what(super().__call__(state, solve)))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (lambda _: None, TypeError, "Returning must return a list of latents, got NoneType"),
        (lambda latents: latents[:2], ValueError, "Returning must return latents of shapes"),
        (lambda latents: latents[::-1], ValueError, "Returning must return latents of shapes"),
    ],
)
def test_a_schedule_must_return_latents(what: Any, error: type[Exception], message: str) -> None:
    model = few()
    x = signal(model.decomp)
    for schedule in (
        Returning(what),
        Chain(("joint", 1), (Returning(what), 1)),
        Chain((Returning(what), 1), ("joint", 1)),
    ):
        with pytest.raises(error, match=f"^{message}"):
            MAPRefiner(4, schedule=schedule)(model, x)
        assert_equal(MAPRefiner(0, schedule=schedule)(model, x).latents, model.encode(x).latents)


class Still(Coarsest):
    """Take the steps, and stay at the start on purpose."""

    @override
    def __call__(self, state: InferenceState, solve: Solve) -> list[Tensor]:
        super().__call__(state, solve)
        return state.latents


def test_a_schedule_may_stay_where_it_was() -> None:
    model = few()
    x = signal(model.decomp)
    assert_equal(MAPRefiner(4, schedule=Still())(model, x).latents, model.encode(x).latents)


class Adrift(Refiner):
    """Go uphill, one sample to where nothing is finite."""

    never_worse = False

    @override
    def step(self, problem: Problem, latents: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        moved = [z + 0.01 * g for z, g in zip(latents, problem.gradient(latents), strict=True)]
        moved[-1][0] = math.inf
        return moved, None


def test_samplers_may_end_higher_but_not_nowhere() -> None:
    model = few()
    x = signal(model.decomp, 3)
    result, start = Adrift(2, schedule="joint")(model, x), MAPRefiner(0)(model, x)
    assert result.refused is not None
    assert result.objective is not None
    assert start.objective is not None
    assert result.refused.tolist() == [True, False, False]
    assert_equal([z[:1] for z in result.latents], [z[:1] for z in start.latents])
    assert bool((result.objective[1:] > start.objective[1:] + 1e-3).all())
    torch.testing.assert_close(result.objective, objective(model, result.latents, x))


def test_a_step_must_look_at_its_problem() -> None:
    class Lazy(Refiner):
        @override
        def step(self, problem: Problem, latents: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
            return latents, None

    model = few()
    with pytest.raises(RuntimeError, match=re.escape("must call problem.gradient at least once")):
        Lazy(1)(model, signal(model.decomp))
    with pytest.raises(TypeError, match="abstract"):
        Refiner(1)  # type: ignore[abstract]


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be at least 0 and finite, got -1"),
        ({"steps": 2.5}, TypeError, "steps must be integers, got 2.5"),
        ({"steps": [3, 2.0]}, TypeError, "steps must be integers, got [3, 2.0]"),
        ({"steps": {1: 2, 4: -3}}, ValueError, "steps must be at least 0 and finite, got -3"),
        ({"steps": "many"}, TypeError, "steps must be a number"),
        ({"steps": True}, TypeError, "steps must be a number, got True"),
        ({"step_size": -0.1}, ValueError, "step_size must be at least 0 and finite, got -0.1"),
        ({"step_size": math.nan}, ValueError, "step_size must be at least 0 and finite, got nan"),
        ({"guidance": math.inf}, ValueError, "guidance must be at least 0 and finite, got inf"),
        ({"guidance": None}, TypeError, "guidance must be a number, got None"),
        ({"loss": "l3"}, ValueError, "loss must be 'likelihood', 'l2', 'l1' or a callable, got 'l3'"),
        ({"loss": 2}, TypeError, "loss must be 'likelihood', 'l2', 'l1' or a callable, got 2"),
        ({"schedule": "all"}, ValueError, "schedule must be one of"),
        ({"schedule": Latent}, TypeError, "schedule must be a name or a Schedule"),
        ({"rule": "sgd"}, ValueError, "rule must be one of"),
        ({"rule": 0.1}, TypeError, "rule must be a name or a Rule, got 0.1"),
        ({"init": "encoder"}, ValueError, "init must be 'posterior', 'prior' or a list of latents, got 'encoder'"),
        ({"init": torch.zeros(3)}, TypeError, "init must be 'posterior', 'prior' or a list of latents, got Tensor"),
        ({"speed": 1}, TypeError, "speed"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        MAPRefiner(**options)


def test_unknown_names_come_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'joint'.*'latent'.*'scale'.*got 'all'"):
        MAPRefiner(schedule="all")
    with pytest.raises(ValueError, match=r"'adam'.*'gd'.*got 'sgd'"):
        MAPRefiner(rule="sgd")


def same(x: Tensor) -> Tensor:
    return x


BAD_CALLS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Any], type[Exception], str]] = {
    "steps for other scales": (
        {"steps": {1: 2}},
        same,
        ValueError,
        "steps must have one entry for each scale [1, 4], got [1]",
    ),
    "guidance for too many": (
        {"guidance": [1, 1, 1]},
        same,
        ValueError,
        "guidance must have one entry for each of the 2 scales, got 3",
    ),
    "sizes for other scales": (
        {"step_size": {2: 0.1, 4: 1}},
        same,
        ValueError,
        "step_size must have one entry for each scale [1, 4], got [2, 4]",
    ),
    "steps for joint": (
        {"steps": [2, 3], "schedule": "joint"},
        same,
        ValueError,
        "steps must be one number, got {1: 2, 4: 3}",
    ),
    "NaN": ({}, lambda x: x * math.nan, ValueError, "x must be finite, got NaN or infinity"),
    "infinity": ({}, lambda x: x / 0, ValueError, "x must be finite, got NaN or infinity"),
    "shape": ({}, lambda x: x[..., :3], ValueError, "x must have shape (B, 1, 4), got (2, 1, 3)"),
    "complex": ({}, lambda x: x + 1j, TypeError, "x must be real floating-point for FFT1Real"),
    "integers": ({}, lambda x: x.long(), TypeError, "x must be real floating-point for FFT1Real"),
    "no tensor": ({}, lambda x: x.numpy(), TypeError, "x must be a torch.Tensor, got ndarray"),
    "no samples": ({}, lambda x: x[:0], ValueError, "x must hold at least one signal"),
    "no latents": ({"init": []}, same, ValueError, "init must hold 4 tensors"),
    "too few latents": ({"init": [torch.zeros(2, 1, 1)]}, same, ValueError, "init must hold 4 tensors"),
    "latents of another shape": (
        {"init": [torch.zeros(2, 1, 3)] * 4},
        same,
        ValueError,
        "init[0] must have shape (2, 1, 1), got (2, 1, 3)",
    ),
    "latents of another batch": (
        {"init": [torch.zeros(3, 1, n) for n in (1, 1, 4, 4)]},
        same,
        ValueError,
        "for 2 signals, got 4 for 3 signals",
    ),
    "latents of no kind": ({"init": ["z"] * 4}, same, TypeError, "init[0] must be a real tensor or None, got str"),
    "NaN latents": (
        {"init": [torch.full((2, 1, n), math.nan) for n in (1, 1, 4, 4)]},
        same,
        ValueError,
        "init must be finite",
    ),
    "loss of a wrong shape": (
        {"loss": lambda a, b: (a - b).mean()},
        same,
        ValueError,
        "loss must return one number for each sample, shape (2,), got ()",
    ),
}


@pytest.mark.parametrize(("options", "data", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(
    options: dict[str, Any], data: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    model = few()
    model.train()
    with pytest.raises(error, match=re.escape(message)):
        MAPRefiner(**options)(model, data(signal(model.decomp)))
    assert all(m.training for m in model.modules())


def test_the_model_must_be_one() -> None:
    with pytest.raises(TypeError, match="model must be an HVAE, got Linear"):
        MAPRefiner()(torch.nn.Linear(1, 1), torch.zeros(1, 1))  # type: ignore[arg-type]


def test_models_of_inference_mode_are_refused_at_the_start() -> None:
    with torch.inference_mode():
        model = few()
    for use in (partial(MAPRefiner(1), model), model.calibrate):
        with pytest.raises(ValueError, match=r"model must be built outside torch\.inference_mode to be .* refined"):
            use(signal(model.decomp))


def test_threads_that_refine_one_model_leave_its_modes() -> None:
    """The first to come finds the model training, and leaves while the second is still at work."""
    model = few().train()
    x = signal(model.decomp).double()
    inside, left = Barrier(2), Event()

    def first(_: Iterate) -> None:
        inside.wait(10)

    def second(_: Iterate) -> None:
        inside.wait(10)
        assert left.wait(10)
        assert not any(p.requires_grad for p in model.parameters())

    with ThreadPoolExecutor(2) as pool:
        refiner = MAPRefiner({1: 0, 4: 1}, schedule="scale")
        early, late = (pool.submit(refiner, model, x, callback=callback) for callback in (first, second))
        early.result()
        left.set()
        late.result()
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_precision_of_the_steps_is_none_of_starts_and_results() -> None:
    """The caller's autocast is left out of them then, and concerns everything where no precision is given."""
    model = tiny(FFT1Real(4, scales=[1, 4]), seed=0, sigma=SIGMA)
    x = signal(model.decomp)
    full = MAPRefiner(0)(model, x).reconstruction
    with torch.autocast("cpu", torch.bfloat16):
        own = MAPRefiner(0, precision="bfloat16")(model, x).reconstruction
        callers = MAPRefiner(0)(model, x).reconstruction
    assert torch.equal(own, full)
    assert not torch.equal(callers, full)


def test_tf32_is_for_steps_alone() -> None:
    """What is set for CUDA while something runs, on a device that pretends."""
    given, cuda = float32_settings(), torch.device("cuda")
    seen: dict[str, Any] = {}
    refiner, model = MAPRefiner(1, precision="tf32"), SimpleNamespace(device=cuda)
    with refiner._full(cast(HVAE, model)):
        seen["start"] = float32_settings()
        with refiner._lowered(cast(HVAE, model)):
            seen["step"] = float32_settings()
        seen["result"] = float32_settings()
    assert float32_settings() == given
    with full_precision(cuda), float32(cuda, "conv"):
        exact = float32_settings()
        with float32(cuda, "conv", tf32=True):
            fast = float32_settings()
    assert seen == {"start": exact, "step": fast, "result": exact}
    assert exact != fast
