"""Constant tensors of decompositions survive whatever happens to their module."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae import HVAE, Decomposition, FFT1Complex, FFT2Real, FFT3Real, Identity, Wavelet1, Wavelet2
from tests.helpers.models import tiny
from tests.helpers.zoo import FOURIER, WAVELETS, Make, error, signal

SOME = {name: (FOURIER | WAVELETS)[name] for name in ("fft2-28", "fft2-complex", "db4-1", "db2-sparse", "db2-complex")}


def emptied(decomp: Decomposition) -> nn.Module:
    """Memory that held other numbers before."""
    filled = [torch.full((n,), -7, dtype=torch.int64) for n in (64, 256, 1024, 4096) for _ in range(20)]
    del filled
    return decomp.to_empty(device="cpu")


MOVES: dict[str, Callable[[Decomposition], nn.Module]] = {
    "to_empty": emptied,
    "half": lambda d: d.half().float(),
    "there and back": lambda d: d.to("meta").to_empty(device="cpu"),
    "bfloat16 and double": lambda d: d.bfloat16().double(),
    "shared": lambda d: d.share_memory(),
    "copied": copy.deepcopy,
    "pickled": lambda d: pickle.loads(pickle.dumps(d)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("make", SOME.values(), ids=SOME)
def test_moves_leave_transforms_as_they_were(make: Make, move: Callable[[Decomposition], Decomposition]) -> None:
    decomp, moved = make(), move(make())
    for dtype in (torch.float32, torch.float64):
        x = signal(decomp, dtype=dtype)
        for a, b in zip(moved.analysis(x), decomp.analysis(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(
            moved.synthesis(moved.analysis(x)), decomp.synthesis(decomp.analysis(x)), rtol=0, atol=0
        )
    assert moved.bind(decomp.scales).check().errors


@pytest.mark.parametrize("make", SOME.values(), ids=SOME)
def test_decompositions_built_on_the_meta_device_work_once_they_are_moved(make: Make) -> None:
    with torch.device("meta"):
        decomp = make()
    assert {t.device.type for t in decomp.buffers()} == {"meta"}
    decomp.to_empty(device="cpu")
    assert {t.device.type for t in decomp.buffers()} == {"cpu"}
    x = signal(decomp)
    assert error(decomp.synthesis(decomp.analysis(x)), x) < 1e-10
    for a, b in zip(decomp.analysis(x), make().analysis(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda: FFT2Real(8, 1), lambda: Wavelet2(8, "db2", 1), lambda: Identity(8, 1)])
def test_a_model_built_on_the_meta_device_takes_the_weights_of_another(make: Make) -> None:
    model = tiny(make())
    x = signal(model.decomp, dtype=torch.float32)
    model.calibrate(x)
    with torch.device("meta"):
        other = HVAE(make(), layers=2, width=6, bottleneck=4, blocks=1)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    found = other.eval().encode(x)
    torch.testing.assert_close(found.reconstruction, model.encode(x).reconstruction, rtol=0, atol=0)


def test_tables_are_not_saved() -> None:
    assert not Wavelet2(8).state_dict()
    assert not FFT2Real(8).state_dict()


def test_constructors_tell_their_defaults() -> None:
    """For ``help`` and the reference, and because ``config`` reads them."""
    fourier = "(size: int | collections.abc.Sequence[int], channels: int = {}, scales: {} = None) -> None"
    scales = "collections.abc.Sequence[int] | None"
    for kind, channels in ((FFT1Complex, 1), (FFT2Real, 3), (FFT3Real, 1)):
        assert str(inspect.signature(kind)) == fourier.format(channels, scales)
    for wavelet, channels in ((Wavelet1, 1), (Wavelet2, 3)):
        defaults = {name: p.default for name, p in inspect.signature(wavelet).parameters.items()}
        assert list(defaults) == ["size", "wavelet", "channels", "scales", "is_complex"]
        assert defaults["channels"] == channels
    assert FFT3Real(4).config() == {"size": [4, 4, 4], "channels": 1, "scales": [1, 2, 4]}


class Rows(Decomposition):
    """Two halves of a signal, by a product."""

    orthonormal = True
    seen: list[torch.dtype]

    def _split(self, x: Tensor) -> Tensor:
        eye = torch.eye(self.size[0], dtype=x.dtype)
        return eye @ x.flatten(1).T

    @override
    def band_shape(self, scale: int) -> tuple[int, ...]:
        return (self.size[0] // 2,)

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [h.T for h in self._split(x).chunk(2)]

    @override
    def synthesis(self, bands: Any) -> Tensor:
        return self._split(torch.cat(self.check_bands(bands), 1)).T.unsqueeze(1)


class Mixin:
    """What gives a map need not be a decomposition itself."""

    def project(self, scale: int, r: Tensor) -> Tensor:
        return r[:, 0, :4] @ torch.eye(4)


class Mixed(Mixin, Rows):
    pass


def test_maps_of_users_run_in_full_precision_too() -> None:
    decomp = Mixed([8], 1, [4, 8])
    x = torch.full((2, 1, 8), 1 + 2**-12)
    with torch.autocast("cpu", torch.bfloat16):
        bands = decomp.analysis(x)
        maps = [*bands, decomp.synthesis(bands), decomp.to_grid(4, bands[0]), decomp.project(4, x)]
    for found in maps:
        assert found.dtype == torch.float32
    assert torch.equal(maps[2], x)
    assert torch.equal(maps[-1], x[:, 0, :4])
    assert decomp.project(4, x).shape == (2, 4)
