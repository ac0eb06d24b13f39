"""Wavelet bands against PyWavelets and ptwt."""

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from numpy.typing import NDArray
from ptwt.conv_transform_2 import wavedec2
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from separable_hvae import HVAE, MAPRefiner, Wavelet1, Wavelet2, Wavelet3
from separable_hvae.decompositions.wavelet import _Wavelet
from tests.helpers.models import seeded, tiny
from tests.helpers.zoo import error, random_bands, signal

KINDS = {1: Wavelet1, 2: Wavelet2, 3: Wavelet3}
ORTHOGONAL = [w for w in pywt.wavelist(kind="discrete") if pywt.Wavelet(w).orthogonal and w != "dmey"]
BIORTHOGONAL = [w for w in pywt.wavelist(kind="discrete") if not pywt.Wavelet(w).orthogonal]


def coefficients(x: Tensor, wavelet: str, level: int) -> list[NDArray[Any]]:
    """PyWavelets' bands, coarse to fine: averages ``(B, C, …)``, then details ``(B, blocks · C, …)``."""
    dims = x.ndim - 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Level value of")
        first, *details = pywt.wavedecn(x.numpy(), wavelet, mode="periodization", level=level, axes=range(2, x.ndim))
    names = ["".join(name) for name in itertools.product("ad", repeat=dims)][1:]
    return [first, *(np.concatenate([level[name] for name in names], axis=1) for level in details)]


def defect(wavelet: str) -> float:
    """How far the filters and their even shifts are from an orthonormal set."""
    low, high = (np.array(f) for f in pywt.Wavelet(wavelet).filter_bank[:2])
    products = [np.correlate(a, b, "full") for a, b in ((low, low), (high, high), (low, high))]
    for p in products[:2]:
        p[len(low) - 1] -= 1
    return max(float(np.abs(p[(len(low) - 1) % 2 :: 2]).max()) for p in products)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym4", "coif1", "db10"])
@pytest.mark.parametrize(
    ("size", "level"),
    [((2,), 1), ((16,), 4), ((28,), 2), ((8, 8), 3), ((12, 8), 2), ((2, 2), 1), ((4, 8, 4), 2), ((2, 2, 6), 1)],
)
def test_bands_against_pywavelets(wavelet: str, size: tuple[int, ...], level: int) -> None:
    decomp = KINDS[len(size)](size, wavelet, channels=2)
    x = signal(decomp)
    expected = coefficients(x, wavelet, level)
    bands = decomp.analysis(x)
    assert len(decomp.scales) == len(decomp.band_shapes) == level + 1
    for h, reference in zip(bands, expected, strict=True):
        np.testing.assert_allclose(h, reference, atol=1e-10)


def test_details_follow_wavedec2() -> None:
    decomp = Wavelet2(8, "db2", channels=1)
    x = signal(decomp)
    first, *levels = pywt.wavedec2(x[:, 0].numpy(), "db2", mode="periodization", level=1)
    horizontal, vertical, diagonal = levels[-1]
    bands = decomp.analysis(x)
    np.testing.assert_allclose(bands[-1], np.stack([vertical, horizontal, diagonal], axis=1), atol=1e-12)
    coarse = pywt.waverec2([first, (None, None, None)], "db2", mode="periodization")
    np.testing.assert_allclose(decomp.synthesis(bands[:-1])[:, 0], coarse, atol=1e-12)


@pytest.mark.parametrize("n", [514, 1018, 2048])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db3", "db4", "db38"])
def test_long_axes_against_pywavelets(wavelet: str, n: int) -> None:
    decomp = Wavelet1(n, wavelet)
    x = signal(decomp).requires_grad_()
    bands = decomp.analysis(x)
    for h, reference in zip(bands, coefficients(x.detach(), wavelet, len(decomp.scales) - 1), strict=True):
        np.testing.assert_allclose(h.detach(), reference, atol=1e-11)
    torch.stack([h.square().sum() for h in bands]).sum().backward()
    assert x.grad is not None
    assert error(x.grad, 2 * x.detach()) < 1e-11


def test_haar_against_ptwt() -> None:
    decomp = Wavelet2(16, channels=1)
    x = signal(decomp)
    first, *levels = wavedec2(x[:, 0], "haar", level=4)
    average, *details = decomp.analysis(x)
    torch.testing.assert_close(average[:, 0], first)
    for h, (horizontal, vertical, diagonal) in zip(details, levels, strict=True):
        torch.testing.assert_close(h, torch.stack([vertical, horizontal, diagonal], dim=1))


@pytest.mark.parametrize("wavelet", ORTHOGONAL)
def test_every_orthogonal_family_inverts_to_its_own_defect(wavelet: str) -> None:
    decomp = Wavelet1(16, wavelet)
    x = signal(decomp)
    bands = decomp.analysis(x)
    bound = max(1e-12, 100 * defect(wavelet))
    assert bound < 1e-7
    assert error(decomp.synthesis(bands), x) < bound
    for h, reference in zip(bands, coefficients(x, wavelet, 4), strict=True):
        np.testing.assert_allclose(h, reference, atol=1e-9)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "db8", "coif1"])
def test_common_families_are_exact(wavelet: str) -> None:
    decomp = Wavelet2(16, wavelet)
    assert error(decomp.synthesis(decomp.analysis(signal(decomp))), signal(decomp)) < 1e-12


@pytest.mark.parametrize("wavelet", ["dmey", *BIORTHOGONAL])
def test_families_that_are_not_orthogonal_are_refused(wavelet: str) -> None:
    if wavelet in ("bior1.1", "rbio1.1"):
        # Haar under another name.
        torch.testing.assert_close(
            Wavelet1(8, wavelet).analysis(torch.ones(1, 1, 8)), Wavelet1(8).analysis(torch.ones(1, 1, 8))
        )
        return
    with pytest.raises(
        ValueError, match=rf"wavelet '{wavelet}' is not orthogonal: its filters' defect is \S+, allowed is 1e-06"
    ):
        Wavelet1(8, wavelet)


def test_the_refusal_tells_the_defect() -> None:
    with pytest.raises(ValueError, match=f"defect is {defect('dmey'):.1g}"):
        Wavelet2(8, "dmey")


@pytest.mark.parametrize("wavelet", ["morl", "db99", "", 4, None])
def test_unknown_wavelets(wavelet: Any) -> None:
    with pytest.raises(ValueError, match=r"wavelet must be a name from pywt\.wavelist\(kind='discrete'\), got "):
        Wavelet2(8, wavelet)


@pytest.mark.parametrize(("kind", "size"), [(Wavelet1, 7), (Wavelet2, (8, 5)), (Wavelet2, 1), (Wavelet3, (2, 4, 3))])
def test_sizes_that_cannot_be_halved(
    kind: type[Wavelet1] | type[Wavelet2] | type[Wavelet3], size: int | tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"size \(.*\) cannot be halved: .* every axis longer than 1 to be even"):
        kind(size)


def test_a_transform_that_is_traced_first_leaves_real_numbers_to_others() -> None:
    """Traces run on tensors without numbers, and matrices serve everybody."""
    decomp = Wavelet1(26, "sym5")
    with FakeTensorMode(allow_non_fake_inputs=True):
        decomp.analysis(torch.zeros(1, 1, 26))
    x = signal(decomp, dtype=torch.float32)
    torch.testing.assert_close(decomp.synthesis(decomp.analysis(x)), x)


def test_long_axes_have_gradients_of_their_own() -> None:
    """Beyond 512 points matrices come in blocks: the gradient is the transpose's product, to any order."""
    decomp = Wavelet1(1024, "db2", scales=[512, 1024])
    x, h = (signal(decomp, 1).double().requires_grad_() for _ in range(2))
    given = torch.randn(1, 1, 512, generator=seeded(), dtype=torch.float64)

    def energy(x: Tensor) -> Tensor:
        return (decomp.analysis(x)[-1] * given).square().sum() / 2

    (first,) = torch.autograd.grad(energy(x), x, create_graph=True)
    wanted = decomp.synthesis([None, decomp.analysis(x)[-1] * given.square()])
    torch.testing.assert_close(first, wanted)
    (second,) = torch.autograd.grad(first, x, h.detach())
    torch.testing.assert_close(second, decomp.synthesis([None, decomp.analysis(h)[-1] * given.square()]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")  # Of torch.func.jvp's own.
@pytest.mark.parametrize("first", [torch.func.grad, torch.func.hessian, lambda f: torch.func.vmap(f, out_dims=None)])
def test_transforms_of_functions_on_long_axes(first: Callable[[Callable[[Tensor], Tensor]], Any]) -> None:
    """``torch.func`` against PyWavelets' matrix, also where it is the first to ask for ours."""
    decomp = Wavelet1(1024, "db2", scales=[512, 1024])
    eye = torch.eye(1024, dtype=torch.float64)
    matrix = torch.from_numpy(np.concatenate(coefficients(eye[:, None], "db2", 10), axis=2)[:, 0])

    def analysis(x: Tensor) -> Tensor:
        return torch.cat([h.flatten() for h in decomp.analysis(x[None, None])])

    def synthesis(h: Tensor) -> Tensor:
        coarse, fine = h.split(512)
        return decomp.synthesis([coarse[None], fine[None, None]])[0, 0]

    def energy(f: Callable[[Tensor], Tensor], _: Tensor) -> Tensor:
        return f(x[0, 0]).square().sum()

    jvp, vmap = torch.func.jvp, torch.func.vmap
    x, v = torch.randn(2, 2, 3, 1024, generator=seeded(), dtype=torch.float64)
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-11)
    maps: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [(analysis, matrix), (synthesis, matrix.T)]
    for f, by in maps:
        first(partial(energy, f))(x[0, :, :4])
        close(vmap(vmap(f))(x), x @ by)
        close(vmap(vmap(f, in_dims=1), in_dims=1)(x.movedim(2, 0)), x @ by)
        close(jvp(f, (x[0, 0],), (v[0, 0],))[1], v[0, 0] @ by)
        close(vmap(vmap(lambda x, v, f=f: jvp(f, (x,), (v,))[1]))(x, v), v @ by)
        close(vmap(vmap(torch.func.grad(lambda x, f=f: (f(x) ** 3).sum())))(x), 3 * (x @ by) ** 2 @ by.T)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            close(jacobian(lambda h, f=f: f(torch.cat([h, x[0, 0, 4:]])))(x[0, 0, :4]), by.T[:, :4])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x[0, 0], v[0, 0])
            close(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, v[0, 0] @ by)


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_refinement_over_long_axes_is_that_of_dense_matrices(wavelet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def long(wavelet: str) -> HVAE:
        return tiny(Wavelet1(1024, wavelet, scales=[256, 512, 1024]), layers=1, blocks=0).double()

    model = long(wavelet)
    x = signal(model.decomp)
    refiner = MAPRefiner(2, schedule="joint", rule="gauss-newton")
    found = refiner(model, x)
    assert found.refused is not None
    assert not found.refused.any()
    monkeypatch.setattr("separable_hvae.decompositions.wavelet._DENSE", 1024)
    expected = refiner(long(wavelet), x)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.objective, expected.objective)


def test_scales_that_skip_levels_gather_them() -> None:
    fine, coarse = Wavelet2(16, "db2", channels=2), Wavelet2(16, "db2", channels=2, scales=[1, 4, 16])
    assert coarse.band_shapes == {1: (2, 1, 1), 4: (2 * 15,), 16: (2 * (256 - 16),)}
    x = signal(fine)
    levels = fine.analysis(x)
    average, middle, last = coarse.analysis(x)
    torch.testing.assert_close(average, levels[0])
    torch.testing.assert_close(middle, torch.cat([h.flatten(1) for h in levels[1:3]], dim=1))
    torch.testing.assert_close(last, torch.cat([h.flatten(1) for h in levels[3:]], dim=1))


def test_scales_below_the_last_halving_emit_no_band() -> None:
    decomp = Wavelet2(28, scales=[1, 2, 4, 7, 14, 28], channels=1)
    assert decomp.band_shapes == {7: (1, 7, 7), 14: (3, 7, 7), 28: (3, 14, 14)}
    model = HVAE(decomp, layers=1, width=2, bottleneck=2, blocks=0)
    assert [subset.scales for subset in model.subsets] == [(1, 2, 4, 7), (14,), (28,)]


def test_scales_of_which_one_alone_emits_a_band_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"scales \[1, 2, 4\] emit no band.*down to \(75,\).*among \[75, 150, 300\]"):
        assert Wavelet1(300, scales=[1, 2, 4, 300]).band_shapes == {300: (300,)}


def test_a_picture_is_the_next_average_without_the_coarser_part() -> None:
    decomp: _Wavelet = Wavelet1(16, "db2")
    x = signal(decomp)
    averages = pywt.dwt(x.numpy(), "db2", mode="periodization")[0]
    coarser, _ = pywt.dwt(averages, "db2", mode="periodization")
    expected = averages - pywt.idwt(coarser, None, "db2", mode="periodization")
    np.testing.assert_allclose(decomp.to_grid(8, decomp.project(8, x)), expected, atol=1e-12)
    assert decomp.picture_shape(8) == (1, 8)


@pytest.mark.parametrize("is_complex", [False, True])
def test_complex_signals_are_two_real_ones(is_complex: bool) -> None:
    decomp, real = Wavelet2(8, "db2", channels=2, is_complex=True), Wavelet2(8, "db2", channels=4)
    x = signal(decomp)
    parts = torch.view_as_real(x).movedim(-1, 2).flatten(1, 2)
    for a, b in zip(decomp.analysis(x), real.analysis(parts), strict=True):
        torch.testing.assert_close(a, b)
    norm = math.sqrt(sum(float(h.square().sum()) for h in random_bands(decomp)))
    assert float(decomp.synthesis(random_bands(decomp)).norm()) == pytest.approx(norm, rel=1e-12)
