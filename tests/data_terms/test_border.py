"""What callers give stays as it is, and is read as it is meant."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from separable_hvae import FFT1Real, FFT2Complex, FFT2Real, KnownBands, MAPRefiner, Measurement
from tests.helpers.models import seeded, tiny
from tests.helpers.zoo import signal


@pytest.mark.parametrize("schedule", ["joint", "scale"])
def test_operators_may_work_in_place(schedule: str) -> None:
    model = tiny(FFT1Real(8))
    model.calibrate(3 + signal(model.decomp, 20, torch.float32))
    mask = (torch.arange(8) % 3 > 0).float()
    y = mask * signal(model.decomp, 2, torch.float32)
    before = y.clone()

    def in_place(x: Tensor) -> Tensor:
        return x.mul_(mask)

    def apart(x: Tensor) -> Tensor:
        return x * mask

    terms = [Measurement(y, operator, 0.1, adjoint=operator) for operator in (in_place, apart)]
    torch.testing.assert_close(terms[0].guess(model), terms[1].guess(model), rtol=0, atol=0)
    found = [MAPRefiner(4, schedule=schedule)(model, term) for term in terms]
    torch.testing.assert_close(found[0].reconstruction, found[1].reconstruction, rtol=0, atol=0)
    corrected = [term.correct(model, found[1].reconstruction) for term in terms]
    torch.testing.assert_close(corrected[0], corrected[1], rtol=0, atol=0)
    assert torch.equal(y, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_measurement_without_its_batch_axis_is_named(channels: int) -> None:
    model = tiny(FFT2Real(4, channels=channels))
    y = torch.randn(channels, 4, 4, generator=seeded())
    with pytest.raises(ValueError, match=r"y\[None\] adds the batch axis that it lacks"):
        MAPRefiner(1)(model, Measurement(y, lambda x: x, 0.1))


def test_signals_of_the_other_kind_are_told_where_they_belong() -> None:
    real, complex_ = tiny(FFT2Real(4, channels=1)), tiny(FFT2Complex(4))
    kspace = torch.fft.fft2(torch.randn(1, 1, 4, 4, generator=seeded()))
    with pytest.raises(TypeError, match=r"got torch.complex64; k-space, like any measurement, goes into Measurement"):
        real.encode(kspace)
    with pytest.raises(TypeError, match=r"must be complex .* got torch.float32; torch.complex makes signals"):
        complex_.encode(kspace.real)


def test_arrays_by_scale_are_sequences() -> None:
    model = tiny(FFT1Real(8))
    x = signal(model.decomp, 2, torch.float32)
    lists = MAPRefiner([1, 2, 3, 4], [0.01, 0.02, 0.03, 0.04], [1.0, 1.0, 0.5, 0.5])
    arrays = MAPRefiner(
        np.array([1, 2, 3, 4]),  # type: ignore[arg-type]
        np.array([0.01, 0.02, 0.03, 0.04]),  # type: ignore[arg-type]
        np.array([1.0, 1.0, 0.5, 0.5]),  # type: ignore[arg-type]
    )
    torch.testing.assert_close(arrays(model, x).latents, lists(model, x).latents, rtol=0, atol=0)
    with pytest.raises(TypeError, match="steps must be integers"):
        MAPRefiner(np.array([1.5, 2, 3, 4]))  # type: ignore[arg-type]


class Tagged(Tensor):
    """A tensor of another library."""


@pytest.mark.parametrize("schedule", ["joint", "scale"])
def test_tensors_of_callers_are_read_as_plain_ones(schedule: str) -> None:
    model = tiny(FFT1Real(8))
    x = signal(model.decomp, 2, torch.float32)
    mask = (torch.arange(8) % 3 > 0).float().expand(2, 1, 8)
    refiner = MAPRefiner(2, schedule=schedule)

    def measured(y: Tensor, mask: Tensor) -> Tensor:
        return refiner(model, Measurement(y, lambda x, m: x * m, 0.1, given=[mask])).reconstruction

    def known(band: Tensor) -> Tensor:
        return refiner(model, KnownBands([None, band])).reconstruction

    band = model.decomp.analysis(x)[1]
    leaves = [t.clone().requires_grad_() for t in (x * mask, mask, band)]
    own = [t.clone().as_subclass(Tagged) for t in (x * mask, mask, band)]
    plain = measured(x * mask, mask), known(band)
    for y, given, part in (leaves, own):
        for found, wanted in zip((measured(y, given), known(part)), plain, strict=True):
            assert type(found) is Tensor
            assert not found.requires_grad
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert all(leaf.grad is None for leaf in leaves)


def test_other_places_where_tensors_come_in() -> None:
    model = tiny(FFT1Real(8))
    x = signal(model.decomp, 2, torch.float32)
    latents, mask = model.encode(x).latents, torch.rand(2, 1, 2, generator=seeded()) < 0.5
    band, sigma = model.decomp.analysis(x)[1], torch.full((2, 1, 8), 0.2)

    def found(tag: Callable[[Tensor], Tensor]) -> list[Tensor]:
        refined = MAPRefiner(2, schedule="joint", init=[tag(z) for z in latents])(model, tag(x))
        measured = Measurement(x, lambda signals: signals, tag(sigma))
        known = KnownBands([None, tag(band)], [None, tag(mask)])
        restored = [MAPRefiner(2, schedule="joint")(model, term).reconstruction for term in (measured, known)]
        corrected = [measured.correct(model, tag(x)), known.correct(model, tag(x))]
        return [refined.reconstruction, *refined.latents, *restored, *corrected, model.encode(tag(x)).reconstruction]

    for own, plain in zip(found(lambda t: t.clone().as_subclass(Tagged)), found(lambda t: t), strict=True):
        assert type(own) is Tensor
        torch.testing.assert_close(own, plain, rtol=0, atol=0)


def test_operators_may_change_what_is_given_in_place() -> None:
    model = tiny(FFT1Real(8))
    y, mask = signal(model.decomp, 2, torch.float32), torch.rand(2, 1, 8, generator=seeded())
    before = mask.clone()
    in_place = Measurement(y, lambda x, m: x * m.mul_(0.5), 0.1, given=[mask])
    apart = Measurement(y, lambda x, m: x * (0.5 * m), 0.1, given=[mask])
    found = [MAPRefiner(3, schedule="joint")(model, term).reconstruction for term in (in_place, apart)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert torch.equal(mask, before)
