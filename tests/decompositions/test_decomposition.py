import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae import HVAE, Decomposition, FFT2Complex, FFT2Real, Identity, Wavelet2
from tests.helpers.zoo import (
    DEVICES,
    FOURIER,
    IDENTITIES,
    OWN,
    SMALL,
    WAVELETS,
    ZOO,
    Make,
    RingDCT,
    dct,
    error,
    inner,
    random_bands,
    signal,
)

EXACT_PICTURES = FOURIER | WAVELETS | IDENTITIES
# What is large takes seconds to check: its laws are measured directly.
CHECKED = {name: make for name, make in ZOO.items() if make().numel <= 1024 and name != "own-pyramid"}
ORTHONORMAL = {name: make for name, make in ZOO.items() if name != "own-pyramid"}


def tolerance(decomp: Decomposition, dtype: torch.dtype) -> float:
    """1e-5 in float32; in float64 1e-12 or the defect of the wavelet's published filters."""
    if dtype == torch.float32:
        return 1e-5
    wavelet = getattr(decomp, "wavelet", None)
    if wavelet is None:
        return 1e-12
    filters = np.array(pywt.Wavelet(wavelet).filter_bank[:2])
    length = filters.shape[1]
    shifted = [np.pad(f, (2 * k, length))[: 2 * length] for f in filters for k in range(length // 2)]
    gram = np.array(shifted) @ np.array(shifted).T
    return max(1e-12, 10 * float(np.abs(gram - np.eye(len(gram))).max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
def test_analysis_inverts_and_keeps_norms(make: Make, dtype: torch.dtype, device: str) -> None:
    decomp = make().to(device)
    x = signal(decomp, 3, dtype, device=device)
    bands = decomp.analysis(x)
    assert [b.shape for b in bands] == [(3, *shape) for shape in decomp.band_shapes.values()]
    assert all(b.dtype == dtype for b in bands)
    back = decomp.synthesis(bands)
    assert back.dtype == x.dtype
    assert error(back, x) < tolerance(decomp, dtype)
    if decomp.orthonormal:
        entries = sum(b[0].numel() for b in bands)
        assert entries == (torch.view_as_real(x[0]) if x.is_complex() else x[0]).numel() == decomp.numel
        energy = torch.stack([b.double().square().flatten(1).sum(1) for b in bands]).sum(0)
        torch.testing.assert_close(
            energy, x.abs().double().square().flatten(1).sum(1), rtol=tolerance(decomp, dtype), atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", CHECKED.values(), ids=CHECKED)
def test_check_passes(make: Make, dtype: torch.dtype) -> None:
    decomp = make()
    report = decomp.check(tolerance=tolerance(decomp, dtype), dtype=dtype)
    assert set(report.to_grid_condition) == set(report.from_grid_condition) == set(decomp.band_scales)


def test_check_of_a_frame_passes_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"from_grid is singular at scales \[2, 4, 8\]"):
        report = OWN["own-pyramid"]().check()
    assert "degrees of freedom" not in report.errors


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
def test_partial_sums(make: Make) -> None:
    decomp = make()
    bands = random_bands(decomp)
    alone = [decomp.synthesis([*[None] * i, h]) for i, h in enumerate(bands)]
    total = torch.zeros_like(alone[0])
    for i, part in enumerate(alone):
        total = total + part
        assert error(decomp.synthesis(bands[: i + 1]), total) < 1e-12
    zeros = [torch.zeros_like(h) for h in bands]
    zeros[-1] = bands[-1]
    torch.testing.assert_close(decomp.synthesis(zeros), alone[-1])


@pytest.mark.parametrize("make", ORTHONORMAL.values(), ids=ORTHONORMAL)
def test_gradients_are_those_of_an_orthonormal_map(make: Make) -> None:
    """The transpose of an orthonormal map is its inverse."""
    decomp = make()
    bound = tolerance(decomp, torch.float64)
    x, h = signal(decomp).requires_grad_(), [b.requires_grad_() for b in random_bands(decomp)]
    torch.autograd.backward(decomp.analysis(x), [b.detach() for b in h])
    synthesised = decomp.synthesis(h)
    assert x.grad is not None
    assert error(x.grad, synthesised.detach()) < bound
    synthesised.backward(x.detach())
    for b, expected in zip(h, decomp.analysis(x.detach()), strict=True):
        assert b.grad is not None
        torch.testing.assert_close(b.grad, expected, rtol=0, atol=100 * bound)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_gradcheck(make: Make) -> None:
    decomp = make()
    if decomp.numel > 256:
        decomp = RingDCT((3, 4), 1, [1, 4])
    x = signal(decomp, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: tuple(decomp.analysis(y)), x, fast_mode=True)
    h = [b.requires_grad_() for b in random_bands(decomp, 1)]
    assert torch.autograd.gradcheck(lambda *b: decomp.synthesis(b), h, fast_mode=True)


@pytest.mark.parametrize("make", EXACT_PICTURES.values(), ids=EXACT_PICTURES)
def test_pictures_are_isometries(make: Make) -> None:
    decomp = make()
    bound = tolerance(decomp, torch.float64)
    for s, h in zip(decomp.band_scales, random_bands(decomp), strict=True):
        picture = decomp.to_grid(s, h)
        assert picture.shape == (2, *decomp.picture_shape(s))
        assert error(picture.norm(), h.norm()) < bound
        assert error(decomp.from_grid(s, picture), h) < bound
        y = torch.randn(picture.shape, dtype=torch.float64)
        assert inner(picture, y) == pytest.approx(inner(h, decomp.from_grid(s, y)), rel=bound, abs=bound * 1e2)


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_default_pictures_show_the_whole_band(make: Make) -> None:
    decomp = make()
    for s, h in zip(decomp.band_scales, random_bands(decomp), strict=True):
        picture = decomp.to_grid(s, h)
        assert picture.shape == (2, *decomp.picture_shape(s)) == (2, 2, *(min(2 * s, n) for n in decomp.size))
        assert decomp.from_grid(s, picture).shape == h.shape
        eye = torch.eye(h[0].numel(), dtype=torch.float64)
        shown = decomp.to_grid(s, eye.reshape(-1, *h.shape[1:])).flatten(1)
        assert np.linalg.matrix_rank(shown.numpy()) == h[0].numel()


@pytest.mark.parametrize("make", ORTHONORMAL.values(), ids=ORTHONORMAL)
def test_project_of_the_residual_is_analysis(make: Make) -> None:
    decomp = make()
    x = signal(decomp)
    bands = decomp.analysis(x)
    for i, s in enumerate(decomp.band_scales):
        residual = x - decomp.synthesis(bands[:i]) if i else x
        torch.testing.assert_close(decomp.project(s, residual), bands[i], rtol=0, atol=1e-10)


def test_project_of_a_frame_is_greedy() -> None:
    decomp = OWN["own-pyramid"]()
    x = signal(decomp)
    coarse = decomp.project(1, x)
    torch.testing.assert_close(coarse, x.mean((2, 3), keepdim=True))
    torch.testing.assert_close(
        decomp.project(8, x - coarse),
        (x - coarse)
        - torch.nn.functional.interpolate(
            torch.nn.functional.avg_pool2d(x - coarse, 2), size=8, mode="bilinear", align_corners=False
        ),
    )


def test_bind_leaves_the_original_alone() -> None:
    for decomp, scales in [(FFT2Real(8), [2, 8]), (Wavelet2(8, "db2"), [4, 8]), (Identity(8), [1, 8])]:
        before, bound = decomp.scales, decomp.bind(scales)
        assert type(bound) is type(decomp)
        assert bound.scales == tuple(scales)
        assert decomp.scales == before == (1, 2, 4, 8)
        assert error(bound.synthesis(bound.analysis(signal(bound))), signal(bound)) < 1e-12
        with pytest.raises(ValueError, match="scales must end in"):
            decomp.bind([1, 2])
        assert decomp.scales == before


@pytest.mark.parametrize("make", (FOURIER | WAVELETS).values(), ids=FOURIER | WAVELETS)
def test_autocast_keeps_float32(make: Make) -> None:
    decomp = make()
    x = signal(decomp, dtype=torch.float32)
    exact = decomp.analysis(x)
    with torch.autocast("cpu", torch.bfloat16):
        for bands in (decomp.analysis(x), decomp.analysis(x=x)):
            for h, expected in zip(bands, exact, strict=True):
                torch.testing.assert_close(h, expected)
        assert error(decomp.synthesis(exact), x) < 1e-5
        assert error(decomp.synthesis(bands=exact), x) < 1e-5
        for s, h in zip(decomp.band_scales, exact, strict=True):
            assert error(decomp.from_grid(s, decomp.to_grid(s, h=h)), h) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", EXACT_PICTURES.values(), ids=EXACT_PICTURES)
def test_casting_the_module_keeps_accuracy(make: Make, dtype: torch.dtype) -> None:
    decomp = make().to(dtype)
    x = signal(decomp)
    assert error(decomp.synthesis(decomp.analysis(x)), x) < tolerance(decomp, torch.float64)
    bands = [h.to(dtype) for h in decomp.analysis(x)]
    wide = [h.to(torch.float64 if dtype == torch.float64 else torch.float32) for h in bands]
    torch.testing.assert_close(decomp.synthesis(bands), decomp.synthesis(wide), rtol=0, atol=0)
    for s, h, w in zip(decomp.band_scales, bands, wide, strict=True):
        torch.testing.assert_close(decomp.to_grid(s, h), decomp.to_grid(s, w), rtol=0, atol=0)


def test_narrow_signals_and_mixed_bands_are_widened() -> None:
    for decomp in (FFT2Real(8), Wavelet2(8, "db2"), Identity(8)):
        x = signal(decomp, dtype=torch.float32).bfloat16()
        bands = decomp.analysis(x)
        assert {h.dtype for h in bands} == {torch.float32}
        assert error(decomp.synthesis(bands), x.float()) < 1e-5
        mixed = [h.double() if i % 2 else h for i, h in enumerate(bands)]
        torch.testing.assert_close(decomp.synthesis(mixed).float(), decomp.synthesis(bands))


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
def test_state_dict_and_copies(make: Make) -> None:
    decomp, other = make(), make()
    other.load_state_dict(decomp.state_dict())
    x = signal(decomp)
    for same in (other, copy.deepcopy(decomp)):
        for a, b in zip(same.analysis(x), decomp.analysis(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not list(decomp.parameters())


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
def test_repr_names_what_it_is(make: Make) -> None:
    decomp = make()
    for part in (type(decomp).__name__, f"size={decomp.size}", f"scales={list(decomp.scales)}"):
        assert part in repr(decomp)
    assert "\n" not in repr(decomp)


@pytest.mark.parametrize("make", (FOURIER | WAVELETS).values(), ids=FOURIER | WAVELETS)
def test_inference_mode_leaves_nothing_behind(make: Make) -> None:
    """What is built or cached in inference mode must serve autograd later."""
    with torch.inference_mode():
        decomp = make()
        decomp.synthesis(decomp.analysis(signal(decomp, dtype=torch.float32)))
    x = signal(decomp, dtype=torch.float32).requires_grad_()
    bands = decomp.analysis(x)
    torch.stack([h.square().sum() for h in bands]).sum().backward()
    assert x.grad is not None
    assert error(x.grad, 2 * x.detach()) < 1e-5


def test_scales_and_grids() -> None:
    decomp = FFT2Real((45, 64), scales=[1, 5, 50, 64])
    assert [decomp.grid(s) for s in decomp.scales] == [(1, 1), (5, 5), (45, 50), (45, 64)]
    assert FFT2Real(28).scales == (1, 2, 4, 7, 14, 28)
    assert Identity((5, 3)).band_scales == (5,)
    assert (FFT2Complex(8, 2).real_channels, FFT2Complex(8, 2).numel) == (4, 256)
    assert FFT2Real(8, scales=[1, 2, 3, 8]).band_scales == (1, 2, 8)


# A user's own decomposition: analysis, synthesis and the shapes are enough.


def test_own_dct_against_its_matrix() -> None:
    decomp = RingDCT((8, 6), 1, [1, 2, 4, 8])
    x = signal(decomp, 1)
    full = dct(8) @ x[0, 0].numpy() @ dct(6).T
    u, v = np.mgrid[:8, :6]
    for (lo, hi), h in zip(itertools.pairwise([0, 1, 2, 4, 8]), decomp.analysis(x), strict=True):
        ring = (np.maximum(u, v) >= lo) & (np.maximum(u, v) < hi)
        np.testing.assert_allclose(h[0, 0], full[ring], atol=1e-12)


def test_own_sizes_and_shapes_are_read_as_the_librarys_are() -> None:
    class Listed(RingDCT):
        @override
        def band_shape(self, scale: int) -> list[int]:  # type: ignore[override]
            return list(super().band_shape(scale) or [])

    decomp = Listed(8, 1)
    assert decomp.size == (8, 8)
    assert decomp.band_shapes == RingDCT((8, 8), 1).band_shapes
    decomp.check()
    assert decomp.config() == {"size": [8, 8], "channels": 1, "scales": [1, 2, 4, 8], "is_complex": False}
    with pytest.raises(TypeError, match=r"size must be an int or a sequence of ints, got 8\.0"):
        RingDCT(8.0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("head", ["grid", "coefficient"])
@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_own_decomposition_trains(make: Make, head: str) -> None:
    torch.manual_seed(0)
    model = HVAE(make(), head=head, layers=1, width=8, bottleneck=4, blocks=1)
    x = signal(model.decomp, 8, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert math.isfinite(losses[-1])
    assert losses[-1] < 0.95 * losses[0]
    assert model.sample(2).shape == (2, 2, *model.decomp.size)


# Laws that are broken.


class Scaled(Identity):
    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        return 0.9 * super().synthesis(bands)


class Stretched(Identity):
    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [2 * h for h in super().analysis(x)]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        return 0.5 * super().synthesis(bands)


class Cubed(Identity):
    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [x**3]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        h = super().synthesis(bands)
        return h.sign() * h.abs() ** (1 / 3)


class Shifted(Identity):
    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [x + 1]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        return super().synthesis(bands) - 1


class Thinned(Identity):
    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [x[..., ::2]]


class ComplexBands(Identity):
    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [torch.complex(x, x)]


class TooManyBands(Identity):
    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [x, x]


class Doubled(Identity):
    """An isometry onto twice as many coefficients."""

    @override
    def band_shape(self, scale: int) -> tuple[int, ...] | None:
        return (2 * self.channels, *self.size) if scale == self.scales[-1] else None

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [torch.cat([x, x], dim=1) / math.sqrt(2)]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        a, b = self.check_bands(bands)[0].chunk(2, dim=1)
        return (a + b) / math.sqrt(2)


class NeedsAllBands(RingDCT):
    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        x = super().synthesis(bands)
        return x if len(bands) == len(self.band_shapes) else 0 * x


class WrongSize(Identity):
    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        return super().synthesis(bands)[..., :-1]


BROKEN: list[tuple[Callable[[], Decomposition], set[str]]] = [
    (lambda: Scaled(4), {"reconstruction", "orthonormality of synthesis"}),
    (lambda: Stretched(4), {"orthonormality of analysis", "orthonormality of synthesis"}),
    (
        lambda: Cubed(4),
        {f"linearity of {f}" for f in ("analysis", "synthesis")}
        | {f"orthonormality of {f}" for f in ("analysis", "synthesis")},
    ),
    (
        lambda: Shifted(4),
        {f"linearity of {f}" for f in ("analysis", "synthesis")}
        | {f"orthonormality of {f}" for f in ("analysis", "synthesis")},
    ),
    (lambda: Thinned(4), {"band shapes"}),
    (lambda: ComplexBands(4), {"band shapes"}),
    (lambda: TooManyBands(4), {"band shapes"}),
    (lambda: Doubled(4), {"degrees of freedom", "orthonormality of synthesis"}),
    (lambda: NeedsAllBands((4, 4), 1, [1, 2, 4]), {"partial sums"}),
    (lambda: WrongSize(4), {"reconstruction", "orthonormality of synthesis"}),
]


@pytest.mark.parametrize(("make", "laws"), BROKEN, ids=[type(make()).__name__ for make, _ in BROKEN])
def test_check_names_each_broken_law(make: Callable[[], Decomposition], laws: set[str]) -> None:
    with pytest.raises(ValueError, match="the decomposition breaks") as caught, warnings.catch_warnings():
        make().check()
    named = dict(re.findall(r"([a-z][a-z ]+) \(error ([^)]+)\)", str(caught.value)))
    assert set(named) == laws
    assert all(float(e) > 1e-10 for e in named.values())


class Optimist(RingDCT):
    @override
    def band_shape(self, scale: int) -> tuple[int, ...] | None:
        return (self.channels, scale)


def test_check_says_which_shapes_differ() -> None:
    shapes = r"analysis gives \[\(1, 1\), \(1, 3\), \(1, 12\)\], band_shape says \[\(1, 1\), \(1, 2\), \(1, 4\)\]"
    with pytest.raises(ValueError, match=rf"breaks 1 law.*band shapes \(error 2\); band shapes: {shapes}"):
        Optimist((4, 4), 1, [1, 2, 4]).check()


def test_a_report_reads_as_a_table() -> None:
    lines = str(RingDCT((4, 4), 1, [1, 2, 4]).check()).splitlines()
    assert [line[:30].strip() for line in lines[:2]] == ["band shapes", "reconstruction"]
    assert lines[-2].startswith("condition of to_grid")
    assert lines[-1][31:].startswith("1: 1.0, 2: ")


def test_check_measures_by_how_much() -> None:
    with pytest.raises(ValueError, match=r"reconstruction \(error 0\.1\)"):
        Scaled(4).check()
    with pytest.raises(ValueError, match=r"degrees of freedom \(error 1\)"):
        Doubled(4).check()


# Bad input.

CONSTRUCTIONS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: FFT2Real("8"), TypeError, r"size must be an int or a sequence of ints, got '8'"),  # type: ignore[arg-type]
    (lambda: FFT2Real(8.0), TypeError, r"size must be an int or a sequence of ints, got 8\.0"),  # type: ignore[arg-type]
    (lambda: FFT2Real((8, 4.5)), TypeError, r"size must be integers, got 4\.5"),  # type: ignore[arg-type]
    (lambda: FFT2Real((8, 8, 8)), ValueError, r"size must have 2 axes, got \(8, 8, 8\)"),
    (lambda: FFT2Real(0), ValueError, r"size must be positive, got 0"),
    (lambda: Identity((2, 2, 2, 2)), ValueError, r"size must have one to three axes, got \(2, 2, 2, 2\)"),
    (lambda: FFT2Real(8, channels=0), ValueError, r"channels must be positive, got 0"),
    (lambda: FFT2Real(8, channels=True), TypeError, r"channels must be integers, got True"),
    (lambda: FFT2Real(8, scales=[1, 2.0, 8]), TypeError, r"scales must be integers, got 2\.0"),  # type: ignore[list-item]
    (lambda: FFT2Real(8, scales="18"), TypeError, r"scales must be a sequence of integers, got '18'"),  # type: ignore[arg-type]
    (lambda: FFT2Real(8, scales=8), TypeError, r"scales must be a sequence of integers, got 8"),  # type: ignore[arg-type]
    (lambda: FFT2Real(8, scales=[]), ValueError, r"scales must increase, coarse to fine, got \[\]"),
    (lambda: FFT2Real(8, scales=[2, 1, 8]), ValueError, r"scales must increase, coarse to fine, got \[2, 1, 8\]"),
    (lambda: FFT2Real(8, scales=[0, 8]), ValueError, r"scales must be positive, got 0"),
    (
        lambda: FFT2Real((4, 8), scales=[1, 4]),
        ValueError,
        r"scales must end in the signal's largest size, 8, got \[1, 4\]",
    ),
    (
        lambda: FFT2Real(9, scales=[1, 2, 4, 8, 9]),
        ValueError,
        r"\[1, 2, 4, 8, 9\] leave the last band empty.*\(9, 9\).*8 and scale 9",
    ),
]


@pytest.mark.parametrize(("build", "kind", "message"), CONSTRUCTIONS)
def test_bad_constructions(build: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


def test_the_base_refuses_to_be_built() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Decomposition((8,), 1)  # type: ignore[abstract]


X = torch.zeros(2, 3, 8, 8)
CALLS: list[tuple[Callable[[Decomposition], object], type[Exception], str]] = [
    (lambda d: d.analysis(X.numpy()), TypeError, r"x must be a torch\.Tensor, got ndarray"),  # type: ignore[arg-type]
    (lambda d: d.analysis(X.long()), TypeError, r"x must be real floating-point for \w+, got torch\.int64"),
    (
        lambda d: d.analysis(X.to(torch.complex64)),
        TypeError,
        r"x must be real floating-point for \w+, got torch\.complex64",
    ),
    (lambda d: d.analysis(X[:, :1]), ValueError, r"x must have shape \(B, 3, 8, 8\), got \(2, 1, 8, 8\)"),
    (lambda d: d.analysis(X[..., 1:]), ValueError, r"x must have shape \(B, 3, 8, 8\), got \(2, 3, 8, 7\)"),
    (lambda d: d.analysis(X[0]), ValueError, r"x must have shape \(B, 3, 8, 8\), got \(3, 8, 8\)"),
    (lambda d: d.analysis(X[:0]), ValueError, r"x must hold at least one signal, got shape \(0, 3, 8, 8\)"),
    (lambda d: d.project(5, X), ValueError, r"scale 5 emits no band; the scales that do are \[.*8\]"),
    (lambda d: d.to_grid(5, X), ValueError, r"scale 5 emits no band"),
    (lambda d: d.to_grid(8, X[0, 0]), ValueError, r"the band at scale 8 must have shape \(B, .*\), got \(8, 8\)"),
    (
        lambda d: d.from_grid(8, X[..., 1:]),
        ValueError,
        r"the picture at scale 8 must have shape \(B, 3, 8, 8\), got \(2, 3, 8, 7\)",
    ),
    (
        lambda d: d.from_grid(8, X.to(torch.complex64)),
        TypeError,
        r"the picture at scale 8 must be a real tensor, got torch\.complex64",
    ),
    (lambda d: d.synthesis([]), ValueError, r"bands must hold at least one tensor"),
    (lambda d: d.synthesis([None]), ValueError, r"bands must hold at least one tensor"),
    (lambda d: d.synthesis(X), TypeError, r"bands must be a sequence of tensors and None, got Tensor"),  # type: ignore[arg-type]
    (lambda d: d.synthesis([*d.analysis(X), None]), ValueError, r"bands must have at most \d entries .* got \d"),
    (lambda d: d.synthesis([X[0, 0, 0, 0]]), ValueError, r"the band at scale \d must have shape \(B, .*\), got \(\)"),
    (
        lambda d: d.synthesis([h.to(torch.complex64) for h in d.analysis(X)]),
        TypeError,
        r"the band at scale \d must be a real tensor, got torch\.complex64",
    ),
    (
        lambda d: d.synthesis([*[None] * (len(d.band_shapes) - 1), X.numpy()]),  # type: ignore[list-item]
        TypeError,
        r"at scale 8 must be a real tensor, got ndarray",
    ),
]


@pytest.mark.parametrize(
    "decomp", [FFT2Real(8), Wavelet2(8, "db2"), Identity(8)], ids=["fourier", "wavelet", "identity"]
)
@pytest.mark.parametrize(("call", "kind", "message"), CALLS)
def test_bad_calls(
    decomp: Decomposition, call: Callable[[Decomposition], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(decomp)


def test_bad_batches_and_real_signals() -> None:
    decomp = FFT2Real(8)
    coarse, fine = decomp.analysis(X)[0], decomp.analysis(X[:1])[1]
    with pytest.raises(ValueError, match=r"the band at scale 2 must have shape \(2, 3, 8\), got \(1, 3, 8\)"):
        decomp.synthesis([coarse, fine])
    for own in (FFT2Complex(8, 3), Wavelet2(8, is_complex=True), Identity(8, is_complex=True)):
        with pytest.raises(TypeError, match=rf"x must be complex for {type(own).__name__}, got torch.float32"):
            own.analysis(X)
