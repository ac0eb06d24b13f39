"""Draws by a sampler of a user's own, against closed forms, and of data terms; the others are in test_inverse.py."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae import HVAE, FFT1Real, MAPRefiner, Measurement, Refiner, posterior_draws
from separable_hvae.data_terms.base import BoundTerm, DataTerm
from separable_hvae.data_terms.signal import Signal
from separable_hvae.nn.decoder import Observation
from tests.helpers.linear_gaussian import ClosedForm, flat, linear_gaussian, stacked
from tests.helpers.models import seeded
from tests.helpers.pages import ROOT, blocks, run
from tests.helpers.zoo import signal


def langevin(*args: Any, **options: Any) -> Refiner:
    """The sampler of the page on refinement."""
    page = ROOT / "docs" / "refinement.md"
    (source,) = (source for _, source in blocks(page) if "class Langevin" in source)
    made: Refiner = run(page, source)["Langevin"](*args, **options)
    return made


def test_langevin_draws_latents_of_the_posterior() -> None:
    model = linear_gaussian(FFT1Real(2, channels=1, scales=[2]), layers=1)
    algebra, x = ClosedForm(model), signal(model.decomp, 1).expand(2000, -1, -1)
    result = langevin()(model, x, torch.Generator().manual_seed(0))
    assert result.refused is not None
    assert not result.refused.any()
    zs, row = flat(result.latents), flat([x[:1]])[0]
    precision = algebra.whitened(row).matrix.T @ algebra.whitened(row).matrix
    np.testing.assert_allclose(zs.mean(0), algebra.joint(row), atol=0.1)
    np.testing.assert_allclose(np.cov(zs.T), np.linalg.inv(precision), atol=0.1)


def test_samplers_draw_from_the_generator() -> None:
    model = linear_gaussian(FFT1Real(2, channels=1, scales=[2]), layers=1)
    one, same, other = (langevin(2)(model, signal(model.decomp, 3), seeded(n)).latents[0] for n in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("sample", [True, False])
def test_langevin_draws_signals_of_the_posterior(sample: bool) -> None:
    model, noise = linear_gaussian(FFT1Real(2, channels=1, scales=[2]), layers=1), 0.8
    algebra, y = ClosedForm(model), signal(model.decomp, 1)
    torch.manual_seed(0)
    known = Measurement(y, lambda x: x, noise)
    drawn = posterior_draws(model, known, langevin(sample=sample), 2000, torch.Generator().manual_seed(0))
    # x is Gaussian before it is measured: z ~ N, x = B h(z) + σ ε.
    prior, basis, bands = stacked(algebra.priors), np.concatenate(algebra.synthesis, 1), stacked(algebra.bands)
    spread = np.linalg.inv(prior.matrix)
    root = basis @ bands.matrix @ spread
    before = np.linalg.inv(root @ root.T + algebra.sigma**2 * np.eye(2))
    after = np.linalg.inv(before + np.eye(2) / noise**2)
    mean = after @ (before @ basis @ bands(-spread @ prior.offset) + flat([y])[0] / noise**2)
    xs = flat([drawn[:, 0]])
    np.testing.assert_allclose(xs.mean(0), mean, atol=0.1)
    np.testing.assert_allclose(np.cov(xs.T), after, atol=0.1)


class Wrapped(DataTerm):
    """A data term of a user's own around another."""

    def __init__(self, term: Measurement) -> None:
        self.term = term

    @override
    def __len__(self) -> int:
        return len(self.term)

    @override
    def rows(self, rows: slice | Tensor) -> "Wrapped":
        return type(self)(self.term.rows(rows))

    @override
    def guess(self, model: HVAE) -> Tensor:
        return self.term.guess(model)

    @override
    def bind(self, model: HVAE, seen: Observation) -> BoundTerm:
        return self.term.bind(model, seen)


class Corrected(Wrapped):
    """The same, which knows what signals are given their latents."""

    def correct(self, model: HVAE, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.term.correct(model, x, generator)


def test_draws_take_any_data_term_that_corrects() -> None:
    model = linear_gaussian(FFT1Real(4), layers=1)
    y, refiner = signal(model.decomp, 2), MAPRefiner(1, sample=True)
    term = Measurement(y, lambda x: x, 0.3)
    drawn, wanted = (
        posterior_draws(model, known, refiner, 3, torch.Generator().manual_seed(0)) for known in (Corrected(term), term)
    )
    assert torch.equal(drawn, wanted)
    for lacking in (Wrapped(term), Signal(y)):
        with pytest.raises(TypeError, match=rf"method correct\(model, x, generator\), .* got {type(lacking).__name__}"):
            posterior_draws(model, lacking, refiner, 3)
