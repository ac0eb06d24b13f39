"""Parts of one's own, written as the checklists of CONTRIBUTING say, in one model: trained, refined, saved, loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae import HVAE, Condition, Decomposition, Likelihood, MAPRefiner, ScaleHead, fit
from separable_hvae.distributions import Prediction
from separable_hvae.functional import pack
from separable_hvae.nn.blocks import conv
from separable_hvae.refine import Schedule
from separable_hvae.refine.schedules import SCHEDULES, Solve
from separable_hvae.refine.state import InferenceState
from tests.helpers.models import seeded


class SumsAndDifferences(Decomposition):
    """Half sums of neighbouring pairs, and their half differences."""

    orthonormal = True

    def __init__(self, points: int) -> None:
        self.points = points
        super().__init__((points,), 1, [points // 2, points])

    @override
    def band_shape(self, scale: int) -> tuple[int, ...]:
        return (1, self.points // 2)

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        x = self.check_signal(x)
        even, odd = x[..., ::2], x[..., 1::2]
        return [(even + odd) / 2**0.5, (even - odd) / 2**0.5]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        sums, differences = self.check_bands(bands)
        return torch.stack([sums + differences, sums - differences], dim=-1).flatten(2) / 2**0.5


class PlainHead(ScaleHead):
    """One convolution, resampled to the band."""

    def __init__(self, decomp: Decomposition, scale: int, **sizes: Any) -> None:
        super().__init__(decomp, scale, **sizes)
        self.emit = conv(sizes["width"], self.shape[0], self.grid)

    @override
    def forward(self, context: Tensor) -> Tensor:
        return nn.functional.interpolate(self.emit(self.blocks(context)), size=self.shape[1:])


class Cauchy(Likelihood):
    """Cauchy density of a learned width around the decoded signal; others reckon with the square of the width."""

    def __init__(self, width: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.log_width = nn.Parameter(torch.tensor(width).log())

    @override
    def nll(self, prediction: Prediction, x: Tensor) -> Tensor:
        error = (pack(prediction.mean) - pack(x)) * torch.exp(-self.log_width)
        density = torch.log1p(error.square()) + self.log_width + torch.tensor(torch.pi).log()
        return density.flatten(1).sum(1)

    @override
    def sample(self, prediction: Prediction, generator: torch.Generator | None = None) -> Tensor:
        uniform = torch.rand(prediction.mean.shape, generator=generator)
        return prediction.mean + self.log_width.exp() * torch.tan(torch.pi * (uniform - 0.5))

    @property
    @override
    def variance(self) -> Tensor:
        return (2 * self.log_width).exp()


class Height(Condition):
    """A number of each sample."""

    @override
    def build(self, decomp: Decomposition, *, width: int, bottleneck: int, blocks: int, gain: float) -> None:
        self.maps = nn.ModuleList(nn.Linear(1, width) for _ in decomp.scales)

    @override
    def check(self, condition: Any, batch: int) -> Tensor:
        if not isinstance(condition, Tensor) or condition.shape != (batch,):
            raise ValueError(f"condition must be {batch} numbers, got {condition!r}")
        return condition[:, None]

    @override
    def forward(self, condition: Tensor) -> list[Tensor]:
        return [layer(condition)[..., None] for layer in self.maps]


class Backwards(Schedule):
    """One joint problem, then the finest subset alone."""

    @override
    def __call__(self, state: InferenceState, solve: Solve) -> list[Tensor]:
        steps = max(state.steps.values())
        latents = solve(state.problem(state.latents, [state.full_objective()], steps), until=0.5)
        passes = state.passes(latents)
        last, context = len(passes) - 1, passes[-1].contexts[0]
        count = len(passes[-1].latents)
        objective = state.subset_objective(last, context, state.targets(last, [step.band for step in passes]))
        found = solve(state.problem(latents[-count:], [objective], steps))
        return [*latents[:-count], *found]


def parts() -> tuple[Tensor, Tensor]:
    heights = torch.randn(64, generator=seeded())
    noise = 0.1 * torch.randn(64, 1, 8, generator=seeded(1))
    return heights[:, None, None] * torch.tensor([1.0, 1, 0, 0, -1, -1, 2, 2]) + noise, heights


def test_everything_of_ones_own_in_one_model(tmp_path: Path) -> None:
    SumsAndDifferences(8).check()
    torch.manual_seed(0)
    model = HVAE(
        SumsAndDifferences(8),
        layers=2,
        width=8,
        bottleneck=4,
        blocks=1,
        head=PlainHead,
        likelihood=Cauchy(0.2),
        condition=Height(dropout=0.1),
    )
    x, heights = parts()
    with torch.no_grad():
        before = float(model.eval().loss(x, seeded(), condition=heights))
    report = fit(model, (x, heights), steps=60, batch_size=16, learning_rate=5e-3, progress=False)
    assert report.steps == 60
    with torch.no_grad():
        assert float(model.loss(x, seeded(), condition=heights)) < before - 0.1
    refined = {}
    schedules: list[str | Schedule] = [Backwards(), *SCHEDULES]
    for schedule in schedules:
        start = MAPRefiner(0)(model, x, condition=heights)
        refined[str(schedule)] = found = MAPRefiner(5, schedule=schedule)(model, x, condition=heights)
        assert found.objective is not None
        assert start.objective is not None
        assert bool((found.objective <= start.objective + 1e-4 * (1 + start.objective.abs())).all())
        assert bool((found.objective < start.objective - 1e-3).any())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no class of this library: pass it as classes="):
        HVAE.from_pretrained(tmp_path)
    again = HVAE.from_pretrained(tmp_path, classes=[SumsAndDifferences, PlainHead, Cauchy, Height])
    for name in ("scale", "joint"):
        same = MAPRefiner(5, schedule=name)(again, x, condition=heights)
        torch.testing.assert_close(same.reconstruction, refined[name].reconstruction)
    assert torch.equal(again.sample(3, generator=seeded()), model.sample(3, generator=seeded()))
