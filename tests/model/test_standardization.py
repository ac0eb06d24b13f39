import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from separable_hvae import HVAE, FFT1Real, FFT2Complex, Identity, Wavelet2
from separable_hvae.functional import pack
from separable_hvae.model.standardization import moments_of, warn_of_other_units
from tests.helpers.models import seeded, tiny


def waves(n: int = 64, channels: int = 2) -> Tensor:
    return torch.randn(n, channels, 8, 8, generator=seeded(3))


@pytest.mark.parametrize("far", [100.0, -300.0])
def test_a_constant_costs_nothing(far: float) -> None:
    """What the encoder sees, and what the model makes of signals, is that of the same signals around zero."""
    x = waves()
    near, away = (tiny(Wavelet2(8, channels=2)).double() for _ in range(2))
    x = x.double() - x.double().mean((0, 2, 3), keepdim=True)
    near.calibrate(x)
    away.calibrate(x + far)
    torch.testing.assert_close(away.standardization.offset, torch.full((2,), far).double())
    torch.testing.assert_close(away.standardization.magnitude, near.standardization.magnitude)
    with torch.no_grad():
        here, there = near.encode(x[:4]), away.encode(x[:4] + far)
    torch.testing.assert_close(there.reconstruction, here.reconstruction + far, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(there.kl, here.kl, rtol=1e-6, atol=1e-6)


def test_only_data_far_from_zero_are_centred_channel_by_channel() -> None:
    x = waves()
    model = tiny(Identity(8, channels=2))
    model.calibrate(x + 0.5)
    assert not model.standardization.offset.any()
    root = math.sqrt(float((x + 0.5).double().square().mean()))
    assert float(model.standardization.magnitude) == pytest.approx(root, rel=1e-6)
    shift = torch.tensor([50.0, -3.0])[:, None, None]
    model.calibrate(x + shift)
    torch.testing.assert_close(model.standardization.offset, (x + shift).mean((0, 2, 3)))
    centred = (x + shift).double() - (x + shift).double().mean((0, 2, 3), keepdim=True)
    assert float(model.standardization.magnitude) == pytest.approx(float(centred.square().mean().sqrt()), rel=1e-5)


def test_complex_signals_are_centred_in_both_parts() -> None:
    parts = waves()
    x = torch.complex(parts[:, :1] + 40, parts[:, 1:] - 20)
    model = tiny(FFT2Complex(8))
    model.calibrate(x)
    torch.testing.assert_close(model.standardization.offset, pack(x).mean((0, 2, 3)))


def test_units_are_compared_without_the_constant() -> None:
    x = waves()
    model = tiny(Identity(8, channels=2))
    model.calibrate(x + 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_units(model.standardization, moments_of(x + 100, model.decomp, model.device)[-1])
    with pytest.warns(UserWarning, match="root mean square is 1e"):
        warn_of_other_units(model.standardization, moments_of(x, model.decomp, model.device)[-1])


def test_checkpointed_batches_count_once() -> None:
    plain, repeated = (tiny(FFT1Real(8)).train() for _ in range(2))
    for k in range(3):
        x = (1 + k) * torch.randn(6, 1, 8, generator=seeded(k))
        plain.loss(x, seeded(k)).backward()
        loss: Any = checkpoint(repeated.loss, x, seeded(k), use_reentrant=False)
        loss.backward()
    assert int(plain.standardization.calibrated) == int(repeated.standardization.calibrated) == 3
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(repeated.get_buffer(name), buffer)


def test_a_default_dtype_of_less_precision_spoils_no_numbers() -> None:
    wanted = HVAE(FFT1Real(8), layers=1, width=4, bottleneck=2, sigma=0.123)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        model = HVAE(FFT1Real(8), layers=1, width=4, bottleneck=2, sigma=0.123)
    finally:
        torch.set_default_dtype(before)
    x = torch.randn(32, 1, 8, generator=seeded()) + 1 / 3
    for m in (wanted, model):
        m.calibrate(x)
    assert model.start.dtype == torch.bfloat16
    assert float(model.sigma) == float(wanted.sigma)
    for here, there in zip(model.subsets, wanted.subsets, strict=True):
        assert torch.equal(here.centre, there.centre)
        assert torch.equal(here.unit, there.unit)
    assert torch.equal(model.standardization.magnitude, wanted.standardization.magnitude)


class Image(Tensor):
    """A tensor of another class, as data loaders make them."""

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("train", [False, True])
def test_classes_of_the_callers_tensors_do_not_stay(train: bool) -> None:
    x = waves(16).as_subclass(Image)
    model = tiny(Wavelet2(8, channels=2)).train(train)
    if train:
        model.loss(x, seeded())
    else:
        model.calibrate(x)
    assert {type(b) for b in model.buffers()} == {Tensor}
