"""The Gauss–Newton rule against linear algebra; the others are in test_refine.py."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian
from typing_extensions import override

from separable_hvae import HVAE, FFT1Real, Identity, MAPRefiner, Refiner
from separable_hvae.functional import pack
from separable_hvae.refine import Adam, GaussNewton, Iterate, Problem
from tests.helpers.linear_gaussian import ClosedForm, flat, linear_gaussian
from tests.helpers.models import tiny
from tests.helpers.zoo import OWN, Make, signal


@pytest.mark.parametrize("make", [lambda: FFT1Real(6), lambda: Identity((4,)), OWN["own-pyramid"]])
def test_exact_on_quadratic_objectives(make: Make) -> None:
    model = linear_gaussian(make(), layers=1)
    algebra, x = ClosedForm(model), 2 * signal(model.decomp)
    guidance = {s: 1 + 0.5 * i for i, s in enumerate(reversed(model.scales))}
    refiner = MAPRefiner(2 * algebra.numel, guidance=guidance, schedule="joint", rule="gauss-newton")
    result = refiner(model, x)
    optimum = np.stack([algebra.joint(row, guidance) for row in flat([pack(x)])])
    np.testing.assert_allclose(flat(result.latents), optimum, atol=1e-6)


class Curvature(Refiner):
    """Note the curvature along a direction at the start."""

    @override
    def step(self, problem: Problem, latents: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        problem.gradient(latents)
        self.direction = [torch.ones_like(z) for z in latents]
        self.curvature = problem.curvature(self.direction)
        self.latents = latents
        return latents, None


@pytest.mark.parametrize("schedule", ["scale", "joint"])
def test_curvature_of_a_quadratic_is_its_hessian(schedule: str) -> None:
    model = linear_gaussian(FFT1Real(4, scales=[4]), layers=2)
    algebra, x = ClosedForm(model), signal(model.decomp, 1)
    refiner = Curvature(1, schedule=schedule)
    refiner(model, x)
    whitened = algebra.whitened(flat([x])[0]).matrix
    ones = np.ones(whitened.shape[1])
    assert float(refiner.curvature) == pytest.approx(ones @ whitened.T @ whitened @ ones, rel=1e-6)


def test_curvature_of_a_network_is_that_of_its_gauss_newton_model() -> None:
    model = tiny(FFT1Real(4, scales=[1, 4]), sigma=0.3).double()
    x = signal(model.decomp, 1)
    refiner = Curvature(1, schedule="joint")
    refiner(model, x)
    shapes = [z.shape for z in refiner.latents]

    def residuals(row: Tensor) -> Tensor:
        parts = row.split([s.numel() for s in shapes])
        latents = [part.reshape(s) for part, s in zip(parts, shapes, strict=True)]
        passes = model.decoder(latents, 1)
        bands = torch.cat([step.band.flatten() for step in passes]) / 0.3
        pairs = [(z, p) for step in passes for z, p in zip(step.latents, step.priors, strict=True)]
        return torch.cat([bands, *[((z - p.mean) / p.sigma).flatten() for z, p in pairs]])

    row = torch.cat([z.flatten() for z in refiner.latents])
    jacobian = torch.autograd.functional.jacobian(residuals, row)
    along = jacobian @ torch.cat([d.flatten() for d in refiner.direction])
    torch.testing.assert_close(refiner.curvature, along.square().sum()[None], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_curvature_of_the_data_term_alone(sign: int) -> None:
    model = linear_gaussian(FFT1Real(4, scales=[4]), layers=1)
    x = signal(model.decomp, 1)

    def quartic(h_hat: Tensor, h: Tensor) -> Tensor:
        return sign * (h_hat - h).pow(4).flatten(1).sum(1)

    refiner, plain = Curvature(1, schedule="joint", loss=quartic), Curvature(1, schedule="joint", guidance=0.0)
    refiner(model, x)
    plain(model, x)
    (z,) = refiner.latents

    def along(t: Tensor) -> Tensor:
        (step,) = model.decoder([z + t], 1)
        return quartic(step.band, model.decomp.analysis(x)[0]).sum()

    expected = hessian(along, torch.zeros((), dtype=torch.float64)).abs()
    torch.testing.assert_close(refiner.curvature - plain.curvature, expected[None], rtol=1e-6, atol=0.0)


def test_a_rise_is_taken_back() -> None:
    """With twenty times the right step length the objective rises; the sample returns and tries less."""
    model = linear_gaussian(FFT1Real(4, scales=[1, 4]), layers=1)
    x, iterates = signal(model.decomp), list[Iterate]()
    MAPRefiner(40, 20.0, schedule="joint", rule="gauss-newton")(model, x, callback=iterates.append)
    values = torch.stack([i.objective for i in iterates])
    assert bool((values[1] > values[0]).all())
    assert bool((values[-1] < values[0]).all())
    best = values[0]
    for before, after, value in zip(iterates[1:-1], iterates[2:], values[1:-1], strict=True):
        rose = value > best
        moves = [(b - a).abs() for a, b in zip(iterates[0].latents, after.latents, strict=True)]
        far = [(b - a).abs() for a, b in zip(iterates[0].latents, before.latents, strict=True)]
        if bool(rose.all()) and bool((best == values[0]).all()):
            for near, wide in zip(moves, far, strict=True):
                torch.testing.assert_close(near, wide / 4)
        best = torch.minimum(best, value)


def test_losses_without_curvature_still_descend() -> None:
    model = trained_shape()
    x = signal(model.decomp, dtype=torch.float32)
    start = MAPRefiner(0, loss="l1")(model, x)
    result = MAPRefiner(12, loss="l1", schedule="joint", rule="gauss-newton")(model, x)
    assert start.objective is not None
    assert result.objective is not None
    assert bool((result.objective < start.objective).all())


def test_losses_that_are_not_convex_descend() -> None:
    """Geman and McClure's is flat far from the data, where its second derivative is negative."""

    def robust(h_hat: Tensor, h: Tensor) -> Tensor:
        error = (h_hat - h).square() / 0.3**2
        return (10 * error / (1 + error)).flatten(1).sum(1)

    model = trained_shape()
    x = 3 * signal(model.decomp, 8, dtype=torch.float32)
    start = MAPRefiner(0, loss=robust)(model, x)
    result = MAPRefiner(12, loss=robust, schedule="joint", rule="gauss-newton")(model, x)
    assert start.objective is not None
    assert result.objective is not None
    assert result.refused is not None
    assert not bool(result.refused.any())
    assert bool((result.objective < start.objective).all())


def test_local_problems_go_to_the_local_rule() -> None:
    model = trained_shape()
    x = signal(model.decomp, dtype=torch.float32)
    rule = GaussNewton(local=Adam(betas=(0.5, 0.9)))
    expected = MAPRefiner(4, rule=Adam(betas=(0.5, 0.9)))(model, x)
    for a, b in zip(MAPRefiner(4, rule=rule)(model, x).latents, expected.latents, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def trained_shape() -> HVAE:
    return tiny(FFT1Real(4, scales=[1, 4]), sigma=0.3)


class Decaying(Refiner):
    """Adam's rule with step sizes that halve, beside torch's own Adam on the same gradients."""

    rule = Adam()

    @override
    def step(self, problem: Problem, latents: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        mine, other, optimizer, count = state or (None, [z.clone() for z in latents], None, 0)
        optimizer = optimizer or torch.optim.Adam([z.requires_grad_() for z in other])
        size = 0.1 * 0.5**count
        moved, mine = self.rule.step(problem, latents, [size] * len(latents), mine)
        optimizer.param_groups[0]["lr"] = size
        for z, g in zip(other, problem.gradient(latents), strict=True):
            z.grad = g
        optimizer.step()
        for z, wanted in zip(moved, other, strict=True):
            torch.testing.assert_close(z, wanted.detach())
        return moved, (mine, other, optimizer, count + 1)


def test_adams_step_sizes_may_change_from_step_to_step() -> None:
    model = tiny(FFT1Real(4, scales=[1, 4]), sigma=0.3).double()
    Decaying(4, schedule="joint")(model, signal(model.decomp, 3))
