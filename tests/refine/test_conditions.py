"""Refinement of models with conditions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae import (
    HVAE,
    ClassCondition,
    Condition,
    FFT1Real,
    KnownBands,
    MAPRefiner,
    Measurement,
    SignalCondition,
    VectorCondition,
    evaluate,
    fit,
    posterior_draws,
)
from separable_hvae.refine import Compiled, Problem
from separable_hvae.refine.schedules import SCHEDULES
from tests.helpers.models import seeded, tiny
from tests.helpers.zoo import signal

KINDS: dict[str, tuple[Callable[[], Condition], Callable[[], Any]]] = {
    "class": (lambda: ClassCondition(3, dropout=0.2), lambda: torch.tensor([0, 2, 1])),
    "vector": (lambda: VectorCondition(4), lambda: torch.randn(3, 4, generator=seeded(1))),
    "signal": (lambda: SignalCondition(2), lambda: torch.randn(3, 2, 8, generator=seeded(2))),
    "around": (lambda: SignalCondition(1, around=True), lambda: torch.randn(3, 1, 8, generator=seeded(3))),
}


def conditional(kind: str, **options: Any) -> HVAE:
    return tiny(FFT1Real(8, scales=[1, 3, 8]), condition=KINDS[kind][0](), sigma=0.3, **options).double()


def given(kind: str) -> Any:
    c: Tensor = KINDS[kind][1]()
    return c.double() if c.is_floating_point() else c


def objective(model: HVAE, latents: list[Tensor], x: Tensor, condition: Any) -> Tensor:
    """The full MAP objective, from what the latents decode to: ``(B,)``."""
    decoded = model.decode(latents, condition=condition)
    return decoded.nll + (decoded.reconstruction - x).square().flatten(1).sum(1) / (2 * 0.3**2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_objectives_are_those_of_decoded_latents(kind: str, schedule: str) -> None:
    model, c = conditional(kind), given(kind)
    x = signal(model.decomp, 3)
    result = MAPRefiner(4, schedule=schedule)(model, x, condition=c)
    assert result.objective is not None
    torch.testing.assert_close(result.objective, objective(model, result.latents, x, c))
    start = objective(model, model.encode(x, condition=c).latents, x, c)
    assert bool((result.objective <= start + 1e-5 * (1 + start.abs())).all())
    assert bool((result.objective < start - 1e-3).any())
    decoded = model.decode(result.latents, condition=c)
    torch.testing.assert_close(result.reconstruction, decoded.reconstruction)
    # The condition is heard.
    other = MAPRefiner(4, schedule=schedule)(model, x, condition=c.flip(0))
    assert not torch.allclose(other.latents[0], result.latents[0])


class Probe(MAPRefiner):
    """Compare the gradients of joint steps with finite differences of what latents decode to."""

    def __init__(self, model: HVAE, x: Tensor, condition: Any) -> None:
        super().__init__(1, schedule="joint")
        self.check: Callable[[list[Tensor]], Tensor] = lambda latents: objective(model, latents, x, condition).sum()
        self.checked = False

    @override
    def step(self, problem: Problem, latents: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        gradients, step = problem.gradient(latents), 1e-6
        direction = [torch.randn(z.shape, generator=seeded(i), dtype=z.dtype) for i, z in enumerate(latents)]
        ends = [self.check([z + s * step * d for z, d in zip(latents, direction, strict=True)]) for s in (1, -1)]
        slope = torch.stack([(g * d).sum() for g, d in zip(gradients, direction, strict=True)]).sum()
        torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5)
        self.checked = True
        return super().step(problem, latents, state)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_finite_differences(kind: str) -> None:
    model, c = conditional(kind), given(kind)
    x = signal(model.decomp, 3)
    probe = Probe(model, x, c)
    probe(model, x, condition=c)
    assert probe.checked


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_have_their_own_conditions(kind: str) -> None:
    model, c = conditional(kind), given(kind)
    x = signal(model.decomp, 3)
    for init in ("posterior", "prior"):
        whole = MAPRefiner(3, init=init)(model, x, condition=c)
        for size in (1, 2):
            parts = MAPRefiner(3, init=init, batch_size=size)(model, x, condition=c)
            torch.testing.assert_close(parts.latents, whole.latents)


def test_conditions_that_do_not_fit_are_refused_early() -> None:
    model = conditional("vector")
    x, c = signal(model.decomp, 3), given("vector")
    for size in (None, 2):
        refiner = MAPRefiner(3, batch_size=size)
        for wrong in (torch.cat([c, c]), c[:2]):
            with pytest.raises(ValueError, match=r"condition must have shape \(3, 4\), one for each sample"):
                refiner(model, x, condition=wrong)
        with pytest.raises(ValueError, match="condition must be given, got None"):
            refiner(model, x)
    known, sampling = KnownBands.of(x, model.decomp, until=3), MAPRefiner(1, sample=True)
    for wrong in (torch.cat([c, c]), c[:2]):
        with pytest.raises(ValueError, match=r"condition must have shape \(3, 4\), one for each sample"):
            posterior_draws(model, known, sampling, 2, condition=wrong)
    with pytest.raises(ValueError, match="condition must be None for a model without one"):
        MAPRefiner(1)(tiny(FFT1Real(8)), x.float(), condition=c)


def test_unknown_classes() -> None:
    model = conditional("class")
    x = signal(model.decomp, 3)
    assert model.condition is not None
    with torch.no_grad():
        for parameter in model.condition.unknown.parameters():
            parameter.fill_(0.7)
    unknown = MAPRefiner(3)(model, x)
    assert unknown.objective is not None
    torch.testing.assert_close(unknown.objective, objective(model, unknown.latents, x, None))
    assert not torch.allclose(unknown.latents[0], MAPRefiner(3)(model, x, condition=given("class")).latents[0])


@pytest.mark.parametrize("schedule", ["latent", "joint", "parallel"])
def test_compiled_steps_take_conditions_as_they_come(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_: graph)
    model, execution = conditional("class"), Compiled()
    x = signal(model.decomp, 3)
    for c in (given("class"), given("class").flip(0)):
        eager = MAPRefiner(2, schedule=schedule)(model, x, condition=c)
        compiled = MAPRefiner(2, schedule=schedule, execution=execution)(model, x, condition=c)
        torch.testing.assert_close(compiled.latents, eager.latents, rtol=1e-6, atol=1e-6)


def test_data_terms_and_draws() -> None:
    model, c = conditional("class"), given("class")
    x = signal(model.decomp, 3)
    for term in (KnownBands.of(x, model.decomp, until=3), Measurement(x, lambda signals: signals, 0.2)):
        found = MAPRefiner(3, schedule="joint")(model, term, condition=c)
        other = MAPRefiner(3, schedule="joint")(model, term, condition=c.flip(0))
        assert found.objective is not None
        assert not torch.allclose(found.reconstruction, other.reconstruction)
        draws = posterior_draws(model, term, MAPRefiner(1, sample=True), 4, seeded(), condition=c)
        assert draws.shape == (4, *x.shape)


def test_training_and_evaluation_on_pairs() -> None:
    waves = torch.stack([torch.ones(8), torch.tensor([1.0, -1.0]).repeat(4)])[:, None]
    classes = torch.arange(48) % 2
    x = waves[classes] + 0.05 * torch.randn(48, 1, 8, generator=seeded())
    torch.manual_seed(0)
    options: dict[str, Any] = {"layers": 1, "width": 8, "bottleneck": 4, "blocks": 1, "sigma": 0.1}
    model = HVAE(FFT1Real(8), condition=ClassCondition(2), **options)
    training: dict[str, Any] = {"steps": 150, "batch_size": 16, "learning_rate": 1e-2, "progress": False}
    report = fit(model, (x, classes), heldout=(x, classes), **training)
    assert "heldout_loss" in report.records[-1]
    right, wrong = (evaluate(model, (x, labels), importance=4) for labels in (classes, 1 - classes))
    # A wrong class costs KL: its prior expects the other wave.
    assert right["loss"] < wrong["loss"] - 0.1
    assert right["importance"] < wrong["importance"] - 0.1
    assert sum(right["kl"]) < sum(wrong["kl"])
