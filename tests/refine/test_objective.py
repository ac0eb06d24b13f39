import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Laplace, Normal

from separable_hvae import HVAE, FFT1Real, Identity
from separable_hvae.data_terms.base import BoundTerm
from separable_hvae.data_terms.signal import Loss, Signal, absolute_error
from separable_hvae.distributions.gaussian import gaussian_energy
from separable_hvae.functional import pack
from separable_hvae.nn.subset import SubsetPass
from separable_hvae.refine.by_scale import ByScale, by_scale
from separable_hvae.refine.objective import FullInputs, FullObjective, ObjectiveValue, SubsetInputs, SubsetObjective
from tests.helpers.linear_gaussian import ClosedForm, flat, linear_gaussian
from tests.helpers.models import tiny
from tests.helpers.zoo import OWN, SMALL, Make, signal

SIGMA = 0.3


def drawn_pass(model: HVAE, x: Tensor) -> list[SubsetPass]:
    """A pass with posterior samples."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        passes: list[SubsetPass] = model.decoder([None] * model.depth, len(x), model.observe(x), generator=generator)
    return passes


class Known:
    """The objective of known signals."""

    def __init__(self, model: HVAE, x: Tensor, loss: Loss = "l2", guidance: ByScale = 1.0) -> None:
        with torch.no_grad():
            self.term: BoundTerm = Signal(x, loss).bind(model, model.observe(x))
        self.model, self.guidance = model, by_scale("guidance", guidance, model.scales)

    def total(self, passes: list[SubsetPass]) -> ObjectiveValue:
        objective = FullObjective(self.model, self.term.misfit, self.guidance, FullInputs(self.term.data))
        value = objective([z for step in passes for z in step.latents])
        for one, other in zip(value[:2], objective.of_passes(passes)[:2], strict=True):
            torch.testing.assert_close(one, other)
        return value

    def subset(self, index: int, step: SubsetPass, target: Tensor) -> ObjectiveValue:
        inputs = SubsetInputs(step.contexts[0], [target, self.term.data[-1]])
        return SubsetObjective(self.model, self.term.misfit, self.guidance, inputs, index)(step.latents)


def negative_log_ratio(loss: str, h_hat: Tensor, h: Tensor) -> Tensor:
    """``−log p(h_hat; h) + log p(h; h)`` of a Normal or a Laplace of standard deviation SIGMA: ``(B,)``."""
    density: Distribution = Normal(h, SIGMA) if loss == "l2" else Laplace(h, SIGMA / math.sqrt(2))
    assert float(density.stddev.mean()) == pytest.approx(SIGMA)
    ratio: Tensor = density.log_prob(h) - density.log_prob(h_hat)
    return ratio.flatten(1).sum(1)


def negative_log_prior(step: SubsetPass) -> Tensor:
    pairs = zip(step.priors, step.latents, strict=True)
    return -torch.stack([Normal(p.mean, p.log_sigma.exp()).log_prob(z).flatten(1).sum(1) for p, z in pairs]).sum(0)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_terms_against_torch_distributions(make: Make, loss: Any) -> None:
    model = tiny(make(), sigma=SIGMA).double()
    x, decomp = signal(model.decomp), model.decomp
    passes, objective = drawn_pass(model, x), Known(model, x, loss)
    total = objective.total(passes)
    assert total.nll.shape == total.data.shape == total.objective.shape == (2,)
    torch.testing.assert_close(total.nll, sum(map(negative_log_prior, passes), torch.zeros(2, dtype=torch.float64)))
    torch.testing.assert_close(total.objective, total.nll + total.data)
    if not decomp.orthonormal:
        # One data term, on the signal.
        reconstruction = decomp.synthesis([step.band for step in passes])
        torch.testing.assert_close(total.data, negative_log_ratio(loss, pack(reconstruction), pack(x)))
        return
    targets = decomp.analysis(x)
    parts = [objective.subset(i, step, targets[i]) for i, step in enumerate(passes)]
    for part, step, h in zip(parts, passes, targets, strict=True):
        torch.testing.assert_close(part.data, negative_log_ratio(loss, step.band, h))
        torch.testing.assert_close(part.nll, negative_log_prior(step))
    torch.testing.assert_close(total.data, torch.stack([p.data for p in parts]).sum(0))
    if loss == "l2":
        result = model.result(passes, x.dtype, x)
        assert result.data is not None
        constant = decomp.numel * (math.log(SIGMA) + 0.5 * math.log(2 * math.pi))
        torch.testing.assert_close(total.objective + constant, result.nll + result.data)


@pytest.mark.parametrize(
    "make", [lambda: FFT1Real(6), lambda: Identity((4,)), OWN["own-pyramid"]], ids=["fft", "identity", "pyramid"]
)
def test_total_against_linear_algebra(make: Make) -> None:
    model = linear_gaussian(make(), layers=1)
    algebra, x = ClosedForm(model), signal(model.decomp)
    guidance = {s: 0.5 + 0.25 * i for i, s in enumerate(model.scales)}
    passes = drawn_pass(model, x)
    total = Known(model, x, guidance=guidance).total(passes).objective.detach()
    rows, zs = flat([pack(x)]), flat([z for step in passes for z in step.latents])
    squares = [np.square(algebra.whitened(a, guidance)(z)).sum() for a, z in zip(rows, zs, strict=True)]
    norm = sum(float(algebra.log_sigmas(i).sum()) for i in range(model.depth)) + zs.shape[1] * math.log(2 * math.pi) / 2
    np.testing.assert_allclose(total.numpy(), 0.5 * np.array(squares) + norm, rtol=1e-12)


def test_guidance_by_scale() -> None:
    model = tiny(FFT1Real(8), sigma=SIGMA).double()
    x = signal(model.decomp)
    passes, scales = drawn_pass(model, x), model.scales
    targets = model.decomp.analysis(x)
    plain = [Known(model, x).subset(i, step, targets[i]) for i, step in enumerate(passes)]
    weights = [0.0, 0.5, 2.0, 1e6]
    forms: list[ByScale] = [weights, dict(reversed(list(zip(scales, weights, strict=True)))), 3, 0]
    for guidance, expected in zip(forms, [weights, weights, [3.0] * 4, [0.0] * 4], strict=True):
        total = Known(model, x, guidance=guidance).total(passes)
        torch.testing.assert_close(
            total.data, torch.stack([w * p.data for w, p in zip(expected, plain, strict=True)]).sum(0)
        )
        torch.testing.assert_close(total.nll, torch.stack([p.nll for p in plain]).sum(0))

    frame = tiny(OWN["own-pyramid"](), sigma=SIGMA).double()
    x = signal(frame.decomp)
    passes = drawn_pass(frame, x)
    on_signal = Known(frame, x, guidance=weights).total(passes).data
    torch.testing.assert_close(on_signal, weights[-1] * Known(frame, x).total(passes).data)


def test_frames_aim_at_what_coarser_bands_leave() -> None:
    model = tiny(OWN["own-pyramid"](), sigma=SIGMA).double()
    x = signal(model.decomp)
    passes, known = drawn_pass(model, x), Known(model, x)
    bands = [step.band for step in passes]
    for i, scale in enumerate(model.scales):
        residual = x - model.decomp.synthesis(bands[:i]) if i else x
        # Whatever is known of this band and of finer ones does not matter.
        target, _ = known.term.target(i, [*bands[:i], *[None] * (len(bands) - i)])
        band = model.decomp.analysis(residual)[i]
        torch.testing.assert_close(target, pack(model.decomp.synthesis([*[None] * i, band])))
        torch.testing.assert_close(known.term.target(i, bands)[0], target)
        assert known.subset(i, passes[i], target).data.shape == (2,)
        assert model.decomp.band_index(scale) == i


def test_custom_loss_gets_real_bands_and_is_weighted() -> None:
    model = tiny(SMALL["haar-3-complex"](), sigma=SIGMA).double()
    x, seen = signal(model.decomp), []

    def loss(h_hat: Tensor, h: Tensor) -> Tensor:
        seen.append((h_hat, h))
        return (h_hat - h).abs().flatten(1).amax(1)

    passes = drawn_pass(model, x)
    total = Known(model, x, loss, 2.0).total(passes)
    assert not any(t.is_complex() for pair in seen for t in pair)
    expected = [
        2 * (p.band - h).abs().flatten(1).amax(1) for p, h in zip(passes, model.decomp.analysis(x), strict=True)
    ]
    torch.testing.assert_close(total.data, torch.stack(expected).sum(0))


def test_errors_are_summed_over_elements() -> None:
    h_hat, h = torch.tensor([[[1.0, -2.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]]]), torch.zeros(2, 2, 2)
    torch.testing.assert_close(gaussian_energy(h_hat - h), torch.tensor([10.5, 0.5]))
    torch.testing.assert_close(absolute_error(h_hat, h), torch.tensor([7.0, 1.0]))
    torch.testing.assert_close(ObjectiveValue(torch.ones(2), h[:, 0, 0] + 2).objective, torch.full((2,), 3.0))


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda h_hat, h: (h_hat - h).square().mean(), "()"),
        (lambda h_hat, h: (h_hat - h).square().flatten(1), "(2, 1)"),
        (lambda h_hat, h: 1.0, "float"),
    ],
    ids=["scalar", "elements", "number"],
)
def test_loss_of_a_wrong_shape(loss: Callable[[Tensor, Tensor], Tensor], got: str) -> None:
    model = tiny(FFT1Real(4))
    x = signal(model.decomp, dtype=torch.float32)
    message = f"loss must return one number for each sample, shape (2,), got {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Known(model, x, loss).total(drawn_pass(model, x))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({1: 1.0, 2: 1.0}, ValueError, "guidance must have one entry for each scale [1, 2, 4], got [1, 2]"),
        ({1: 1.0, 2: 1.0, 8: 1.0}, ValueError, "guidance must have one entry for each scale [1, 2, 4], got [1, 2, 8]"),
        ({1: 1.0, "2": 1.0}, ValueError, "guidance must have one entry for each scale [1, 2, 4], got [1, '2']"),
        ([1.0, 2.0], ValueError, "guidance must have one entry for each of the 3 scales, got 2"),
        ([1.0, 2.0, -1.0], ValueError, "guidance must be at least 0 and finite, got -1.0"),
        (math.inf, ValueError, "guidance must be at least 0 and finite, got inf"),
        (math.nan, ValueError, "guidance must be at least 0 and finite, got nan"),
        ("1", TypeError, "guidance must be a number, got '1'"),
        ([1.0, None, 2.0], TypeError, "guidance must be a number, got None"),
        (True, TypeError, "guidance must be a number, got True"),
    ],
)
def test_settings_by_scale(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        by_scale("guidance", value, [1, 2, 4])
