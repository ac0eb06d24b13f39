"""Refinement with what is known of a signal, against closed forms; the example's problems and baselines."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

from separable_hvae import (
    HVAE,
    FFT1Real,
    FFT2Complex,
    GaussianNoise,
    Identity,
    KnownBands,
    LaplaceNoise,
    MAPRefiner,
    Measurement,
    Wavelet1,
    Wavelet2,
    posterior_draws,
)
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import pack
from separable_hvae.refine import Scale
from tests.helpers.images import write_cifar
from tests.helpers.linear_gaussian import Affine, Array, ClosedForm, flat, linear_gaussian, stacked
from tests.helpers.scripts import EXAMPLES, script
from tests.helpers.terms import fourier, small, terms
from tests.helpers.zoo import Make, Pyramid, inner, signal

DECOMPOSITIONS: dict[str, Make] = {
    "fourier": lambda: FFT1Real(6),
    "haar": lambda: Wavelet1(4, "haar", 1),
    "identity": lambda: Identity((4,), 1),
    "pyramid": lambda: Pyramid((4,), 1),
}


def optimum(model: HVAE, a: Array, y: Array, variance: float | Array) -> Array:
    """The MAP latents given ``y = A x + noise`` of this variance, one or that of each entry, for each row of y."""
    algebra = ClosedForm(model)
    parts = [Affine(b @ h.matrix, b @ h.offset) for b, h in zip(algebra.synthesis, algebra.bands, strict=True)]
    x = Affine(np.sum([p.matrix for p in parts], 0), np.sum([p.offset for p in parts], 0))
    measured = Affine(a @ x.matrix, a @ x.offset)
    found = []
    for row, scale in zip(y, np.broadcast_to(variance, y.shape) ** -0.5, strict=True):
        misfit = measured.minus(row)
        rows = stacked([*algebra.priors, Affine(scale[:, None] * misfit.matrix, scale * misfit.offset)])
        found.append(algebra.solve(rows, np.zeros(algebra.numel), range(len(algebra.layers))))
    return np.stack(found)


def orthonormal_rows(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    q: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))[0]
    return q.T


def sweeps(steps: int) -> MAPRefiner:
    return MAPRefiner(steps, 0.05, schedule=Scale(sweeps=4))


@pytest.mark.parametrize("make", DECOMPOSITIONS.values(), ids=DECOMPOSITIONS)
def test_measurements_lead_to_the_closed_form(make: Make) -> None:
    model = linear_gaussian(make())
    a = orthonormal_rows(3, model.decomp.numel)
    y = 2 * signal(model.decomp).flatten(1) @ a.T
    term = Measurement(y, lambda x: x.flatten(1) @ a.T, 0.2)
    result = MAPRefiner(80, schedule="joint", rule="gauss-newton")(model, term)
    assert result.refused is not None
    assert not result.refused.any()
    wanted = optimum(model, a.numpy(), y.numpy(), 0.2**2 + float(model.sigma) ** 2)
    np.testing.assert_allclose(flat(result.latents), wanted, atol=1e-4)


@pytest.mark.parametrize("axes", [(0, 1), (1,)], ids=["of samples and entries", "of entries"])
def test_levels_of_noise_lead_to_the_closed_form(axes: tuple[int, ...]) -> None:
    model = linear_gaussian(FFT1Real(6))
    a = orthonormal_rows(3, 6)
    y = 2 * signal(model.decomp).flatten(1) @ a.T
    sigma = 0.05 + torch.rand([n if d in axes else 1 for d, n in enumerate(y.shape)], dtype=torch.float64)
    term = Measurement(y, lambda x: x.flatten(1) @ a.T, sigma)
    found = MAPRefiner(80, schedule="joint", rule="gauss-newton", batch_size=2)(model, term)
    wanted = optimum(model, a.numpy(), y.numpy(), sigma.square().numpy() + float(model.sigma) ** 2)
    np.testing.assert_allclose(flat(found.latents), wanted, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 1, 1, 4), (1, 1, 4, 1)], ids=str)
def test_equal_levels_of_noise_are_one_level(shape: tuple[int, ...]) -> None:
    model = small(FFT2Complex(4))
    y = signal(model.decomp, 3, torch.float32)
    terms = [
        Measurement(y, lambda x: x, kind(s))
        for kind in (GaussianNoise, LaplaceNoise)
        for s in (0.3, torch.full(shape, 0.3))
    ]
    refiner = MAPRefiner(1, schedule="joint", sample=True)
    for one, map_ in zip(terms[::2], terms[1::2], strict=True):
        torch.testing.assert_close(one.guess(model), map_.guess(model))
        drawn = [posterior_draws(model, t, refiner, 2, torch.Generator().manual_seed(0)) for t in (one, map_)]
        torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)


def test_levels_of_noise_are_checked() -> None:
    y = torch.ones(2, 3)
    assert Measurement(y, torch.square, torch.tensor(0.5)).noise == GaussianNoise(0.5)
    wrong: list[tuple[Tensor, type[Exception], str]] = [
        (torch.ones(3), ValueError, r"as many axes as y, \(2, 3\), each of y's length or 1, got \(3,\)"),
        (torch.ones(2, 2), ValueError, r"got \(2, 2\)"),
        (torch.tensor([[1.0], [-1.0]]), ValueError, "at least 0 and finite, got values from -1 to 1"),
        (torch.tensor([[1.0], [torch.inf]]), ValueError, "at least 0 and finite, got values from 1 to inf"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "real floating-point tensor, got torch.int64"),
    ]
    for sigma, error, message in wrong:
        with pytest.raises(error, match=message):
            Measurement(y, torch.square, sigma)
    with pytest.raises(ValueError, match="positive standard deviation where the operator is not linear"):
        Measurement(y, torch.square, torch.tensor([[1.0], [0.0]]), linear=False, start=y)


def test_known_bands_lead_to_the_closed_form() -> None:
    model = linear_gaussian(FFT1Real(6))
    x = 2 * signal(model.decomp)
    result = MAPRefiner(80, schedule="joint", rule="gauss-newton")(model, KnownBands.of(x, model.decomp, until=2))
    a = np.concatenate(ClosedForm(model).analysis[:2])
    wanted = optimum(model, a, x.flatten(1).numpy() @ a.T, float(model.sigma) ** 2)
    np.testing.assert_allclose(flat(result.latents), wanted, atol=1e-4)


def test_sweeps_over_subsets_lower_the_objective_of_measurements() -> None:
    model = linear_gaussian(FFT1Real(6))
    a = orthonormal_rows(4, 6)
    term = Measurement(2 * signal(model.decomp).flatten(1) @ a.T, lambda x: x.flatten(1) @ a.T, 0.2)
    start, end = (refiner(model, term) for refiner in (MAPRefiner(0), sweeps(100)))
    best = MAPRefiner(80, schedule="joint", rule="gauss-newton")(model, term)
    objectives = [r.objective for r in (best, end, start)]
    assert all(o is not None for o in objectives)
    low, middle, high = (float(o.mean()) for o in objectives if o is not None)
    assert low - 1e-6 <= middle < low + 0.25 * (high - low)


@pytest.mark.parametrize("name", terms())
@pytest.mark.parametrize(
    "refiner",
    [MAPRefiner(3, schedule="joint"), MAPRefiner(4, schedule=Scale(sweeps=2)), MAPRefiner(3, init="prior")],
    ids=["joint", "sweeps", "prior"],
)
def test_refinement_is_never_worse_and_ignores_neighbours(name: str, refiner: MAPRefiner) -> None:
    model, term = terms()[name]
    with torch.inference_mode():
        start, found = MAPRefiner(0, init=refiner.init)(model, term), refiner(model, term)
        alone = refiner(model, term.rows(slice(1, 2)))
    assert start.objective is not None
    assert found.objective is not None
    assert (found.objective <= start.objective + 1e-4 * (1 + start.objective.abs())).all()
    assert found.reconstruction.shape == (3, 1, 4, 4)
    assert found.reconstruction.is_complex() == model.decomp.is_complex
    torch.testing.assert_close(alone.reconstruction[0], found.reconstruction[1], rtol=1e-3, atol=1e-3)


def test_draws_meet_exact_bands_and_differ_elsewhere() -> None:
    model = small(Wavelet2(4, "haar", 1))
    x = signal(model.decomp, 2, torch.float32)
    known = KnownBands.of(x, model.decomp, until=2)
    refiner = MAPRefiner(2, schedule="joint", sample=True)
    drawn = posterior_draws(model, known, refiner, 3, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 2, 1, 4, 4)
    again = posterior_draws(model, known, refiner, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, again)
    for one in drawn:
        torch.testing.assert_close(model.decomp.analysis(one)[:2], model.decomp.analysis(x)[:2])
    # No draw is surer of what was not measured than the likelihood is.
    assert float(drawn.std(0).mean()) > 0.1


def test_draws_are_asked_for_as_draws() -> None:
    model = small(Wavelet2(4, "haar", 1))
    known = KnownBands.of(signal(model.decomp, 2, torch.float32), model.decomp, until=2)
    with pytest.raises(ValueError, match="sample=True"):
        posterior_draws(model, known, MAPRefiner(1), 3)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        posterior_draws(model, known, MAPRefiner(1, sample=True), 0)
    assert posterior_draws(model, known, MAPRefiner(1, sample=True), 1).shape == (1, 2, 1, 4, 4)


# The example.

sys.path.append(str(EXAMPLES / "inverse"))
problems, baselines, report, solve = (script(name) for name in ("problems", "baselines", "report", "run"))
setups = script("setups")


def test_every_problem_has_a_linear_operator_of_norm_one_at_most() -> None:
    for decomp, count in ((Wavelet2(8, "haar", 1), 6), (FFT2Complex(8), 9)):
        x = signal(decomp, 2, torch.float32)
        cases = problems.cases(x, decomp)
        assert len(cases) == count
        for case in cases:
            term = case.measurement
            term.operator.require_laws(x, term.y, term.given)
            through = term.operator.predict(x, term.y, term.given)
            assert through.abs().square().sum() <= x.abs().square().sum() * 1.0001
            assert case.adjoint(x).shape == x.shape


@pytest.mark.parametrize(("side", "known"), [(8, 4), (16, 8), (32, 8)])
def test_known_bands_are_a_small_image(side: int, known: int) -> None:
    decomp = Wavelet2(side, "haar", 3)
    x = signal(decomp, 2, torch.float32)
    (case,) = (c for c in problems.cases(x, decomp) if c.known is not None)
    assert case.name == f"deblur, bands to {known} known"
    assert sum(band[0].numel() for band in case.known.bands) == 3 * known**2
    block = side // known
    small = x.unflatten(-2, (known, block)).unflatten(-1, (known, block)).mean((-3, -1))
    expected = small.repeat_interleave(block, -2).repeat_interleave(block, -1)
    torch.testing.assert_close(case.measurement.y, expected)
    with pytest.raises(ValueError, match=rf"coarse bands that can be known, got \({side},\) for {side} pixels"):
        problems.cases(x, Identity(side, 3))


@pytest.mark.parametrize("decomp", [Wavelet2(16, "haar", 3), FFT2Complex(16)], ids=["real", "complex"])
def test_standardised_images_get_noise_of_deviation_one(decomp: Decomposition) -> None:
    x = 3 * signal(decomp, 20, torch.float32) + 1
    case = problems.cases(x, decomp)[-1]
    assert case.name == "denoise, σ = 1 of standardised images"
    parts, noise = pack(x).numpy(), pack(case.measurement.y - x).numpy()
    assert case.measurement.noise.sigma == pytest.approx(np.std(parts), rel=1e-3)
    assert np.std(noise) == pytest.approx(np.std(parts), rel=0.02)
    assert np.std(noise, axis=(0, 2, 3)) == pytest.approx(np.std(parts), rel=0.05)


def test_masks_keep_the_centre_and_the_share_asked_for() -> None:
    mask = problems.cartesian_mask(50, 64, 4, torch.Generator().manual_seed(0))[:, 0, 0]
    assert (mask.sum(1) == 16).all()
    assert (mask[:, 30:35] == 1).all()
    assert 0 < mask[:, 0].mean() < 0.5


def test_coils_sum_to_one() -> None:
    maps = problems.sensitivities(8)
    torch.testing.assert_close(maps.abs().square().sum(1), torch.ones(1, 8, 8))


@pytest.mark.parametrize("penalty", ["tv", "wavelets"])
def test_penalties_have_adjoints_within_their_bound(penalty: str) -> None:
    k: Any = baselines.TotalVariation() if penalty == "tv" else baselines.WaveletSparsity(8, 2)
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    u = torch.randn(k.forward(x).shape, generator=torch.Generator().manual_seed(1))
    assert inner(k.forward(x), u) == pytest.approx(inner(x, k.adjoint(u)), rel=1e-4)
    assert float(k.forward(x).square().sum()) <= k.bound * float(x.square().sum()) * 1.0001


def test_total_variation_denoises_as_scikit_image_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 1, 12, 12)
    x[..., 3:9, 4:10] = 1
    y = x + 0.2 * torch.randn(x.shape, generator=generator)
    found = baselines.sparse(Measurement(y, lambda x: x, 0.2), x, baselines.TotalVariation(), 0.3, steps=500)
    chambolle: Any = denoise_tv_chambolle
    wanted = chambolle(y[0, 0].numpy(), weight=0.3, eps=1e-9, max_num_iter=3000)
    np.testing.assert_allclose(found[0, 0].numpy(), wanted, atol=5e-3)


def test_wavelets_denoise_by_soft_thresholds() -> None:
    y = signal(Wavelet2(8, "db2", 1), 2, torch.float32)
    k = baselines.WaveletSparsity(8, 1)
    found = baselines.sparse(Measurement(y, lambda x: x, 0.2), y, k, 0.4)
    first, *details = k.transform.analysis(y)
    shrunk = [h.sign() * (h.abs() - 0.4).clamp_min(0) for h in details]
    torch.testing.assert_close(found, k.transform.synthesis([first, *shrunk]), rtol=1e-3, atol=1e-3)


def test_the_alternation_meets_exact_measurements() -> None:
    model = small(Identity(4, 1))
    x = signal(model.decomp, 2, torch.float32)
    term = Measurement(x[..., :2], lambda x: x[..., :2], 0.0)
    found = baselines.pnp_hvae(model, term, 0.8, steps=2)
    torch.testing.assert_close(found[..., :2], x[..., :2], rtol=1e-3, atol=1e-3)


def test_complex_draws_scatter_in_both_parts() -> None:
    model = small(FFT2Complex(4))
    x = signal(model.decomp, 2, torch.float32)
    mask = torch.ones(2, 1, 1, 4)
    mask[..., 2:] = 0
    term = Measurement(fourier(x, mask), fourier, 0.05, given=(mask,))
    drawn = posterior_draws(model, term, MAPRefiner(1, sample=True), 4, torch.Generator().manual_seed(0))
    assert (pack(drawn.flatten(0, 1)).unflatten(0, (4, 2)).std(0) > 1e-3).all()


def test_quality_of_images_that_are_known_to_be_wrong() -> None:
    x = torch.full((2, 1, 8, 8), 0.5)
    found = report.quality(torch.stack([x[0] + 0.2, x[1] - 0.02]), x)
    np.testing.assert_allclose(found["psnr"]["each"], [20.0, 40.0], atol=1e-4)
    np.testing.assert_allclose(found["nmse"]["each"], [0.16, 0.0016], atol=1e-5)
    assert found["psnr"]["mean"] == pytest.approx(30.0)
    assert found["psnr"]["se"] == pytest.approx(10.0)
    z = signal(FFT2Complex(8), 2, torch.float32)
    turned = report.quality(0.9j * z, z)
    np.testing.assert_allclose(turned["nmse"]["each"], [1.81, 1.81], atol=1e-4)  # the phase counts
    assert min(turned["ssim"]["each"]) > 0.95  # in magnitudes it does not


@pytest.mark.parametrize(("decomp", "rows"), [(Wavelet2(8, "haar", 1), 3), (Wavelet2(16, "haar", 3), 6)])
def test_larger_pictures_have_k_space_below(decomp: Decomposition, rows: int) -> None:
    x = signal(decomp, 3, torch.float32)
    case = problems.cases(x, decomp)[0]
    figure = report.draw(case, x, {report.CHOSEN: x, "not shown": x}, x, x.abs())
    assert len(figure.axes) == 4 * rows
    kspace = np.fft.fftshift(np.fft.fft2(x[0].numpy(), norm="ortho"), axes=(-2, -1))
    np.testing.assert_allclose(report.spectrum(x[0]), np.log(np.abs(kspace)).mean(0), atol=1e-3)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "sparse", partial(baselines.sparse, steps=3))
    model = small(Wavelet2(8, "haar", 1))
    x = signal(model.decomp, 5, torch.float32)
    case = problems.cases(x, model.decomp)[1]
    rows, found = solve.methods(model, None, 8, steps=1), dict[str, Tensor]()
    for name in ("wavelet sparsity", "separable, joint", "separable, joint, corrected"):
        found[name] = rows[name].solved(case, x, 0.1, found, 5)
        torch.testing.assert_close(rows[name].solved(case, x, 0.1, found, 2), found[name], rtol=1e-4, atol=1e-4)
    _, mean, deviation = solve.uncertainty(model, case, x[:3], steps=1, draws=2, batch=4)
    assert mean.shape == deviation.shape == (3, 1, 8, 8)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the example in small and returns its results."""
    monkeypatch.setattr(solve, "WEIGHTS", [0.1])
    monkeypatch.setattr(solve, "TEMPERATURES", [0.9])
    monkeypatch.setattr(solve, "sparse", partial(baselines.sparse, steps=3))
    monkeypatch.setattr(solve, "pnp_hvae", partial(baselines.pnp_hvae, steps=3))
    out, numbers = tmp_path / "out", {"--steps": 1, "--draws": 2, "--uncertain": 4, "--batch": 5, "--count": 8}

    def run(problem: str, **options: object) -> Any:
        given = numbers | {f"--{name}": value for name, value in options.items()}
        arguments = [str(a) for pair in given.items() for a in pair]
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--out", str(out), "--problems", problem])
        solve.main()
        return json.loads((out / "results.json").read_text())

    return run


def test_the_example_writes_a_table_of_every_method(tmp_path: Path, call: Callable[..., Any]) -> None:
    images = (0.5 * torch.randn(14, 1, 8, 8, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    torch.save({"train": images[:6], "held": images[6:]}, tmp_path / "images.pt")
    small(Wavelet2(8, "haar", 1)).save_pretrained(tmp_path / "separable")
    small(Identity(8, 1)).save_pretrained(tmp_path / "vanilla")
    paths = {"model": tmp_path / "separable", "vanilla": tmp_path / "vanilla", "images": tmp_path / "images.pt"}
    (found,) = call("deblur", **paths)["problems"].values()
    assert len(found["methods"]) == 13
    assert set(found["p"]) == set(report.AGAINST)
    assert found["known bands"]["separable, joint, corrected"] < 1e-6
    table = (tmp_path / "out" / "results.md").read_text()
    assert all(f"| {name} |" in table for name in found["methods"])
    assert (tmp_path / "out" / "deblur-bands-to-4-known.png").exists()
    torch.save(images, tmp_path / "images.pt")
    with pytest.raises(SystemExit, match="must hold a dictionary of 'train' and 'held', got Tensor"):
        call("deblur", **paths)


@pytest.mark.parametrize(("count", "uncertain"), [(8, 2), (2, 1), (8, 0)])
def test_few_images_make_few_rows(tmp_path: Path, call: Callable[..., Any], count: int, uncertain: int) -> None:
    images = 0.5 * torch.randn(14, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save({"train": images[:6], "held": images[6:]}, tmp_path / "images.pt")
    small(Wavelet2(8, "haar", 1)).save_pretrained(tmp_path / "separable")
    paths = {"model": tmp_path / "separable", "images": tmp_path / "images.pt"}
    (found,) = call("deblur", **paths, count=count, uncertain=uncertain)["problems"].values()
    assert set(found["calibration"]) == ({"within 1σ", "within 2σ", "rms error", "rms σ"} if uncertain else set())
    assert ("posterior draws" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")) == (uncertain > 0)
    assert (tmp_path / "out" / "deblur-bands-to-4-known.png").exists()


def test_as_many_rows_as_there_are_images() -> None:
    decomp = Wavelet2(8, "haar", 1)
    x = signal(decomp, 5, torch.float32)
    case = problems.cases(x, decomp)[0]
    for count, rows in ((1, 1), (2, 2), (5, 3)):
        figure = report.draw(case, x, {report.CHOSEN: x}, x[:count], x[:count].abs())
        assert len(figure.axes) == 4 * rows


def run_folder(folder: Path, decomposition: str, size: int) -> Path:
    """What train.py leaves, without training."""
    torch.manual_seed(0)
    sizes = {"layers": 1, "width": 6, "bottleneck": 4, "blocks": 0, "latent_channels": 4, "sigma": 0.2}
    setup = setups.Setup("cifar10", {"size": size}, {"decomposition": decomposition, **sizes}, {})
    setup.build().save_pretrained(folder / "model")
    (folder / "setup.json").write_text(json.dumps(setup.plain()))
    return folder


def test_the_example_takes_what_train_left(tmp_path: Path, call: Callable[..., Any]) -> None:
    paths = {
        "model": run_folder(tmp_path / "best", "Wavelet2", 8),
        "vanilla": run_folder(tmp_path / "vanilla", "Identity", 8),
        "data": write_cifar(tmp_path / "cifar", n=20),
    }
    results = call("standardised", **paths)
    assert (results["label"], results["images"]) == ("cifar10, 8×8", 8)
    assert len(results["problems"]["denoise, σ = 1 of standardised images"]["methods"]) == 13
    assert (tmp_path / "out" / "denoise-1-of-standardised-images.png").exists()
    larger = run_folder(tmp_path / "larger", "Identity", 16)
    with pytest.raises(SystemExit, match=r"larger was trained on other data than .*best"):
        call("standardised", **paths | {"vanilla": larger})
    with pytest.raises(SystemExit, match=r"setup.json is not what train.py leaves"):
        call("standardised", **paths | {"model": tmp_path / "best" / "model"})


@pytest.mark.parametrize("options", [{"model": "a"}, {"images": "a"}, {"model": "a", "data": "b", "images": "c"}])
def test_the_example_wants_models_with_their_images(
    options: dict[str, Path], call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call("deblur", **options)
    assert "--data" in capsys.readouterr().err
