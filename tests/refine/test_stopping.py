"""When refinement stops: tolerance, budget; and what it does to a batch that is cut into chunks."""

import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from separable_hvae import FFT1Real, MAPRefiner
from separable_hvae.refine import Chain, Iterate, Scale
from tests.helpers.linear_gaussian import linear_gaussian
from tests.helpers.models import assert_equal, few
from tests.helpers.zoo import signal


def scaled(factors: list[float]) -> Tensor:
    return signal(few().decomp, len(factors)) * torch.tensor(factors, dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("schedule", ["scale", "parallel", "joint"])
def test_samples_stop_one_by_one(schedule: str) -> None:
    model = few()
    x, iterates = scaled([0.1, 1.0, 20.0]), list[Iterate]()
    refiner = MAPRefiner(200, 0.02, schedule=schedule, tolerance=1e-3)
    result = refiner(model, x, callback=iterates.append)
    moving = torch.stack([i.moving for i in iterates])
    assert bool(moving[0].all())
    assert bool((~moving).any())
    for earlier, later in pairwise(iterates):
        if earlier.problem == later.problem:
            assert bool((earlier.moving | ~later.moving).all())
            # Who has stopped stays where he is.
            still = ~later.moving
            assert_equal([z[still] for z in earlier.latents], [z[still] for z in later.latents])
    for i in range(3):
        assert_equal(refiner(model, x[i : i + 1]).latents, [z[i : i + 1] for z in result.latents], exactly=False)
    assert result.history.moving == [float(i.moving.double().mean()) for i in iterates]


def test_a_stopped_sample_has_not_fallen_for_three_steps() -> None:
    model, iterates = few(), list[Iterate]()
    MAPRefiner(400, 0.01, schedule="joint", tolerance=1e-3)(model, scaled([1.0]), callback=iterates.append)
    values = [float(i.objective) for i in iterates]
    assert len(values) < 400
    falls = [b < min(values[: n + 1]) - 1e-3 * (1 + abs(min(values[: n + 1]))) for n, b in enumerate(values[1:])]
    assert falls[-3:] == [False] * 3
    runs = [falls[n : n + 3] for n in range(len(falls) - 3)]
    assert [False] * 3 not in runs


class Seconds:
    """A clock on which each look takes a given time."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@pytest.mark.parametrize("schedule", ["latent", "scale", "parallel", "joint", "combined", Scale(sweeps=2)])
def test_a_budget_is_shared_and_kept(schedule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = few(), scaled([1.0, 2.0])

    def run(budget: float) -> tuple[list[int], float]:
        clock = Seconds(0.1)
        monkeypatch.setattr(time, "perf_counter", clock)
        problems = MAPRefiner(50, schedule=schedule, budget=budget)(model, x).history.problem
        return [problems.count(p) for p in sorted(set(problems))], clock.now

    every = MAPRefiner(50, schedule=schedule)(model, x).history.problem
    unhurried, needed = run(1e9)
    assert unhurried == [every.count(p) for p in sorted(set(every))]
    assert run(0.0)[0] == []
    steps = [0]
    for share in (0.3, 0.6, 0.9):
        done, taken = run(share * needed)
        assert taken <= share * needed + 1
        assert len(done) == len(unhurried)
        assert steps[-1] < sum(done) < sum(unhurried)
        # Each problem gets its part.
        for n, most in zip(done, unhurried, strict=True):
            assert n == pytest.approx(share * most, rel=0.35, abs=3)
        steps.append(sum(done))


def test_no_budget_at_all_returns_the_start() -> None:
    model, x = few(), scaled([1.0, 2.0])
    result = MAPRefiner(50, budget=0)(model, x)
    assert_equal(result.latents, model.encode(x).latents, exactly=False)
    assert result.history.seconds == []


@pytest.mark.parametrize("schedule", ["scale", "parallel", "joint"])
def test_chunks_change_nothing(schedule: str) -> None:
    model, x = few(), scaled([0.1, 1.0, 2.0, 3.0, 20.0])
    # Steps that are too large for the last sample.
    options: dict[str, Any] = {"steps": 4, "step_size": 0.02, "schedule": schedule, "rule": "gd"}
    whole, cut = MAPRefiner(**options)(model, x), MAPRefiner(**options, batch_size=2)(model, x)
    assert_equal(cut.latents, whole.latents, exactly=False)
    assert_equal(cut.bands, whole.bands, exactly=False)
    for name in ("reconstruction", "nll", "data", "objective", "refused"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name))
    for name in ("problem", "step", "scale", "objective", "nll", "data", "moving"):
        assert getattr(cut.history, name) == pytest.approx(getattr(whole.history, name))
    firsts: list[int] = []
    MAPRefiner(1, schedule="joint", batch_size=2)(model, x, callback=lambda i: firsts.append(i.first))
    assert firsts == [0, 2, 4]
    start = MAPRefiner(2)(model, x).latents
    warm = MAPRefiner(2, init=start)(model, x)
    assert_equal(MAPRefiner(2, init=start, batch_size=3)(model, x).latents, warm.latents, exactly=False)


def test_a_chain_is_its_parts_in_turn() -> None:
    model, x = few(), scaled([1.0, 2.0])
    chained = MAPRefiner(10, schedule=Chain(("parallel", 0.8), ("joint", 0.2)))(model, x)
    first = MAPRefiner(8, schedule="parallel")(model, x)
    assert_equal(chained.latents, MAPRefiner(2, schedule="joint", init=first.latents)(model, x).latents, exactly=False)
    assert_equal(chained.latents, MAPRefiner(10, schedule="combined")(model, x).latents)
    assert chained.history.problem == [0] * 8 + [1] * 2
    only = MAPRefiner(10, schedule=Chain(("scale", 3)))(model, x)
    assert_equal(only.latents, MAPRefiner(10)(model, x).latents)
    with pytest.raises(ValueError, match="share of the steps must be positive and finite"):
        Chain(("scale", 0.0))
    with pytest.raises(ValueError, match="schedule must be one of"):
        Chain(("scales", 1.0))


def test_sweeps_share_the_steps() -> None:
    model, x = few(), scaled([1.0, 2.0])
    result = MAPRefiner(5, schedule=Scale(sweeps=2))(model, x)
    counts = [result.history.problem.count(p) for p in range(4)]
    assert counts == [2, 2, 3, 3]
    first = MAPRefiner(2)(model, x)
    assert_equal(result.latents, MAPRefiner(3, init=first.latents)(model, x).latents, exactly=False)
    with pytest.raises(ValueError, match="sweeps must be at least 1, got 0"):
        Scale(0)


def test_sweeps_reach_the_optimum_of_linear_models() -> None:
    """Refined again from its own optimum, a subset stays."""
    model = linear_gaussian(FFT1Real(3, scales=[1, 3]), layers=1)
    x = signal(model.decomp)
    once = MAPRefiner(300, 0.05, schedule=Scale(), rule="gd")(model, x)
    twice = MAPRefiner(600, 0.05, schedule=Scale(sweeps=2), rule="gd")(model, x)
    for a, b in zip(once.latents, twice.latents, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": -1.0}, ValueError, "tolerance must be at least 0 and finite, got -1.0"),
        ({"tolerance": "small"}, TypeError, "tolerance must be a number, got 'small'"),
        ({"budget": -0.1}, ValueError, "budget must be at least 0 and finite, got -0.1"),
        ({"budget": float("nan")}, ValueError, "budget must be at least 0 and finite, got nan"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer, got 2.0"),
        ({"precision": "float16"}, ValueError, "precision must be 'bfloat16', 'tf32' or None, got 'float16'"),
        ({"execution": "jit"}, ValueError, "execution must be one of"),
        ({"execution": 3}, TypeError, "execution must be a name or an Execution, got 3"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MAPRefiner(5, **options)
