"""Measurements by operators that are not linear, and of users' classes; the rest is in test_data_terms.py."""

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae import HVAE, FFT1Real, KnownBands, MAPRefiner, Measurement, Wavelet2, posterior_draws
from separable_hvae.data_terms.operator import Map
from tests.helpers.models import tiny
from tests.helpers.zoo import signal


def left(model: HVAE, term: Measurement) -> Tensor:
    """Variance that the decoder's own σ adds to measurements."""
    return term.bind(model, model.observe(term.guess(model))).data[1]


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_operator_that_is_not_said_to_be_leaves_the_same_variance(dtype: torch.dtype, scale: float) -> None:
    model = tiny(FFT1Real(6), sigma=0.3).to(dtype)
    x = scale * signal(model.decomp, 3, dtype)
    operators: list[tuple[Map, float]] = [(lambda x: x, 1.0), (lambda x: 3 * x[..., ::2] - 1, 9.0)]
    for operator, gain in operators:
        one, other = (Measurement(operator(x), operator, 0.1, linear=flag, start=x) for flag in (True, False))
        torch.testing.assert_close(left(model, one).flatten(), torch.full((3,), 0.09 * gain, dtype=dtype))
        torch.testing.assert_close(left(model, other), left(model, one), rtol=1e-2, atol=0)


def test_an_operator_that_is_not_linear_counts_by_its_derivative() -> None:
    model = tiny(FFT1Real(6), sigma=0.3).double()
    level = torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)[:, None, None].expand(3, 1, 6)
    term = Measurement(level.square(), torch.square, 0.1, linear=False, start=level)
    # The derivative of x² is 2x, so that J J* = 4x².
    torch.testing.assert_close(left(model, term).flatten(), 0.09 * 4 * level[:, 0, 0].square(), rtol=1e-6, atol=0)


class Seen(Measurement):
    """Show the encoder nothing but ones."""

    @override
    def guess(self, model: HVAE) -> Tensor:
        return torch.ones_like(super().guess(model))


class SeenBands(KnownBands):
    """Show the encoder nothing but ones."""

    @override
    def guess(self, model: HVAE) -> Tensor:
        return torch.ones_like(super().guess(model))


@pytest.mark.parametrize("kind", ["measurement", "bands"])
def test_some_rows_of_a_users_class_are_of_that_class(kind: str) -> None:
    model = tiny(Wavelet2(4, "haar", 1)).eval()
    x = signal(model.decomp, 3, torch.float32)
    term, plain = (
        (Seen(x, lambda x: x, 0.1), Measurement(x, lambda x: x, 0.1))
        if kind == "measurement"
        else (SeenBands.of(x, model.decomp, until=2), KnownBands.of(x, model.decomp, until=2))
    )
    assert type(term.rows(slice(1))) is type(term)
    whole, chunks = (MAPRefiner(1, batch_size=n)(model, term).reconstruction for n in (None, 2))
    torch.testing.assert_close(chunks, whole)
    assert not torch.allclose(MAPRefiner(1)(model, plain).reconstruction, whole)
    refiner, seed = MAPRefiner(0, sample=True), 3
    drawn, other = (posterior_draws(model, t, refiner, 2, torch.Generator().manual_seed(seed)) for t in (term, plain))
    assert not torch.allclose(drawn, other)


def test_rows_keep_what_is_measured_together() -> None:
    y, mask = torch.arange(3.0)[:, None], torch.tensor([[True], [False], [True]])
    sigma = torch.tensor([[0.1], [0.2], [0.3]])
    term = Measurement(y, lambda x, m: x * m, sigma, given=[mask], start=y + 1, fill="mean")
    part = term.rows(torch.tensor([2, 2, 0]))
    assert part.y.flatten().tolist() == [2, 2, 0]
    assert part.given[0].flatten().tolist() == [True, True, True]
    assert part.start is not None
    assert part.start.flatten().tolist() == [3, 3, 1]
    torch.testing.assert_close(part.noise.variance(part.y).sqrt(), torch.tensor([[0.3], [0.3], [0.1]]))
    assert (part.fill, len(part), len(term)) == ("mean", 3, 3)
