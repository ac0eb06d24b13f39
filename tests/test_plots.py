import io
import math
import pickle
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from separable_hvae import FFT1Complex, FFT2Complex, Identity, Wavelet1, Wavelet2, Wavelet3
from separable_hvae.plots import comparison, convergence, progressive, uncertainty
from separable_hvae.refine import History

Numbers = npt.NDArray[np.float64]


def pixels(figure: Any) -> list[list[Numbers]]:
    """The picture in each cell of a figure, row by row."""
    columns = sum(bool(a.get_title()) for a in figure.axes)
    shown = [np.asarray(a.images[0].get_array()) for a in figure.axes]
    return [shown[i : i + columns] for i in range(0, len(shown), columns)]


def curves(figure: Any) -> dict[str, list[list[Numbers]]]:
    """For each named row of a figure, the curves ``(N,)`` of each of its panels; a name's rows follow one another."""
    rows: dict[str, list[list[Numbers]]] = {}
    name = ""
    for axes in figure.axes:
        name = axes.get_ylabel() or name
        rows.setdefault(name, []).append([np.asarray(line.get_ydata()) for line in axes.get_lines()])
    return rows


def test_figures_show_themselves_in_notebooks() -> None:
    decomp, x = Wavelet2(8, channels=1), torch.rand(2, 1, 8, 8)
    for figure in (
        comparison(x, {"a": 0.5 * x}),
        pickle.loads(pickle.dumps(progressive(decomp, decomp.analysis(x), x))),
    ):
        assert isinstance(figure, Figure)
        with Image.open(io.BytesIO(figure._repr_png_())) as shown:  # type: ignore[attr-defined]
            assert shown.size == tuple((figure.get_size_inches() * figure.dpi).astype(int))
            assert np.asarray(shown.convert("L")).std() > 10


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "separable_hvae._figure", raising=False)
    x = torch.rand(1, 1, 4, 4)
    with pytest.raises(ImportError, match=r'pip install "separable-hvae\[plots\]"'):
        comparison(x, {"a": x})


def test_progressive_ends_in_the_signal() -> None:
    decomp, x = Wavelet2(8, channels=1), torch.rand(2, 1, 8, 8)
    for row, signal in zip(pixels(progressive(decomp, decomp.analysis(x), x)), x, strict=True):
        expected = ((signal[0] - x.min()) / (x.max() - x.min())).numpy()
        np.testing.assert_allclose(row[-1], expected, atol=1e-6)
        np.testing.assert_allclose(row[-2], row[-1], atol=1e-5)
        np.testing.assert_allclose(row[0], np.full((8, 8), float(expected.mean())), atol=1e-5)


def test_comparison_shows_errors_against_the_largest() -> None:
    x = torch.rand(2, 3, 4, 4)
    good, bad = x + 0.01, x - 0.1
    for _, _, _, small, large in pixels(comparison(x, {"good": good, "bad": bad})):
        np.testing.assert_allclose(small, np.full((4, 4, 3), 0.1), atol=1e-4)
        np.testing.assert_allclose(large, np.ones((4, 4, 3)), atol=1e-4)


def test_complex_signals_are_shown_as_magnitudes() -> None:
    decomp, x = FFT2Complex(8), torch.randn(1, 1, 8, 8, dtype=torch.complex64)
    ((*_, shown),) = pixels(progressive(decomp, decomp.analysis(x), x))
    np.testing.assert_allclose(shown, (x.abs() / x.abs().max())[0, 0].numpy(), atol=1e-6)


def test_volumes_are_shown_by_their_central_planes() -> None:
    decomp, x = Wavelet3((4, 6, 8), channels=1), torch.rand(2, 1, 4, 6, 8)
    grid = pixels(progressive(decomp, decomp.analysis(x), x))
    assert [len(row) for row in grid] == [len(decomp.scales) + 1] * 2
    for row, volume in zip(grid, (x - x.min()) / (x.max() - x.min()), strict=True):
        for shown in row[-2:]:  # all bands, and the original
            assert shown.shape == (6 + 1 + 4, 8 + 1 + 4)
            np.testing.assert_allclose(shown[:6, :8], volume[0, 2].numpy(), atol=1e-5)
            np.testing.assert_allclose(shown[:6, -4:], volume[0, :, :, 4].T.numpy(), atol=1e-5)
            np.testing.assert_allclose(shown[-4:, :8], volume[0, :, 3].numpy(), atol=1e-5)
            assert (shown[6:, 8:] == 1).all()


def test_volumes_of_three_channels_are_coloured_and_complex_ones_magnitudes() -> None:
    x = torch.randn(1, 3, 4, 4, 4, dtype=torch.complex64)
    ((shown, _, error),) = pixels(comparison(x, {"half": x / 2}))
    np.testing.assert_allclose(shown[:4, :4], (x.abs() / x.abs().max())[0, :, 2].movedim(0, -1).numpy(), atol=1e-6)
    np.testing.assert_allclose(error, shown, atol=1e-6)


def test_signals_of_one_axis_are_curves_over_the_original() -> None:
    decomp, x = Wavelet1(16, channels=1, scales=[4, 8, 16]), torch.randn(3, 1, 16, dtype=torch.float64)
    rows = curves(progressive(decomp, decomp.analysis(x), x))
    assert list(rows) == ["scale ≤ 4", "scale ≤ 8", "scale ≤ 16", "original"]
    for name, kept in zip(rows, (1, 2, 3, 0), strict=True):
        assert len(rows[name]) == 3
        for i, panel in enumerate(rows[name]):
            if name == "original":
                (curve,) = panel
                np.testing.assert_array_equal(curve, x[i, 0].numpy())
            else:
                behind, curve = panel
                np.testing.assert_array_equal(behind, x[i, 0].numpy())
                partial = decomp.synthesis(decomp.analysis(x)[:kept])
                np.testing.assert_allclose(curve, partial[i, 0].numpy(), atol=1e-12)


def test_errors_of_curves_have_a_sign_and_one_scale() -> None:
    x = torch.randn(2, 1, 8, dtype=torch.float64)
    figure = comparison(x, {"good": x - 0.01, "bad": x + 0.1})
    rows = curves(figure)
    assert list(rows) == ["original", "good", "bad", "good,\nerror", "bad,\nerror"]
    np.testing.assert_allclose(rows["good,\nerror"], np.full((2, 1, 8), -0.01))
    np.testing.assert_allclose(rows["bad,\nerror"], np.full((2, 1, 8), 0.1))
    for axes in figure.axes[-4:]:
        assert axes.get_ylim() == pytest.approx((-0.11, 0.11))


def test_channels_of_curves_lie_below_one_another() -> None:
    x = torch.rand(1, 3, 8, dtype=torch.float64)
    figure = comparison(x, {"same": x})
    first = figure.axes[0]
    assert first.get_ylabel() == f"original\n{float(x.min()):.2g} to {float(x.max()):.2g}"
    assert [text.get_text() for text in first.get_yticklabels()] == ["ch. 0", "ch. 1", "ch. 2"]
    step = 1.1 * float(x.max() - x.min())
    for line, channel, place in zip(first.get_lines(), x[0], range(3), strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata()) + place * step, channel.numpy(), atol=1e-12)
    low, high = first.get_ylim()
    assert high - low == pytest.approx(3 * step)


def test_complex_curves_are_magnitude_and_phase() -> None:
    decomp = FFT1Complex(16, scales=[4, 16])
    x = torch.polar(torch.linspace(0, 1, 16, dtype=torch.float64), torch.linspace(-3, 3, 16, dtype=torch.float64))
    rows = curves(progressive(decomp, decomp.analysis(x[None, None]), x[None, None]))
    assert list(rows) == ["scale ≤ 4", "phase", "scale ≤ 16", "original"]
    ((behind, shown),) = rows["scale ≤ 16"]
    np.testing.assert_allclose(behind, x.abs().numpy())
    np.testing.assert_allclose(shown, x.abs().numpy(), atol=1e-12)
    phases = rows["phase"]
    assert [len(panel) for panel in phases] == [2, 2, 1]
    quiet = (x.abs() <= 0.05).numpy()
    assert quiet.any()
    np.testing.assert_array_equal(np.isnan(phases[-1][0]), quiet)
    np.testing.assert_allclose(phases[-1][0][~quiet], np.linspace(-3, 3, 16)[~quiet])
    np.testing.assert_array_equal(np.isnan(phases[0][0]), quiet)


def test_errors_of_complex_curves_are_magnitudes() -> None:
    x = torch.randn(1, 1, 8, dtype=torch.complex128)
    rows = curves(comparison(x, {"turned": 1j * x}))
    ((error,),) = rows["turned,\n|error|"]
    np.testing.assert_allclose(error, math.sqrt(2) * x[0, 0].abs().numpy())


def test_progressive_takes_the_bands_that_there_are() -> None:
    decomp, x = Wavelet1(16, channels=1, scales=[4, 8, 16]), torch.randn(1, 1, 16)
    assert list(curves(progressive(decomp, decomp.analysis(x)[:2], x))) == ["scale ≤ 4", "scale ≤ 8", "original"]


def test_curves_stand_in_a_band_of_one_deviation() -> None:
    x, draws = torch.randn(2, 1, 8, dtype=torch.float64), torch.randn(5, 2, 1, 8, dtype=torch.float64)
    figure = uncertainty(x, draws)
    mean, deviation = np.mean(draws.numpy(), 0)[:, 0], np.std(draws.numpy(), 0, ddof=1)[:, 0]
    for axes, original, middle, away in zip(figure.axes, x[:, 0].numpy(), mean, deviation, strict=True):
        behind, line = (np.asarray(line.get_ydata()) for line in axes.get_lines())
        np.testing.assert_array_equal(behind, original)
        np.testing.assert_allclose(line, middle)
        ends: Any = axes.collections[0].get_paths()[0].vertices
        for place in range(8):
            heights = ends[ends[:, 0] == place, 1]
            np.testing.assert_allclose([heights.min(), heights.max()], middle[place] + away[place] * np.array([-1, 1]))


def test_deviations_of_images_stand_beside_means() -> None:
    x, draws = torch.rand(1, 1, 4, 4), torch.rand(3, 1, 1, 4, 4)
    ((_, mean, deviation),) = pixels(uncertainty(x, draws))
    np.testing.assert_allclose(mean, ((draws.mean(0) - x.min()) / (x.max() - x.min())).clamp(0, 1)[0, 0], atol=1e-6)
    expected = np.std(draws.numpy(), 0, ddof=1)[0, 0]
    np.testing.assert_allclose(deviation, expected / expected.max(), atol=1e-6)


def test_complex_draws_are_magnitudes() -> None:
    x, draws = torch.randn(1, 1, 4, dtype=torch.complex128), torch.randn(3, 1, 1, 4, dtype=torch.complex128)
    ((panel,),) = curves(uncertainty(x, draws)).values()
    np.testing.assert_allclose(panel, [np.abs(x.numpy())[0, 0], np.abs(draws.numpy()).mean(0)[0, 0]])


@pytest.mark.parametrize("size", [(8,), (4, 4), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_what_is_missing_is_a_gap(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, *size, dtype=dtype)
    missing = torch.zeros(x.shape, dtype=torch.bool)
    missing[..., 1] = True
    figure = comparison(x, {"measured": torch.where(missing, torch.nan, x)})
    figure.draw_without_rendering()
    if len(size) == 1:
        rows = curves(figure)
        ((*_, shown),) = rows["measured"]
        ((error,),) = rows[f"measured,\n{'|error|' if x.is_complex() else 'error'}"]
        np.testing.assert_array_equal(np.isnan(shown), missing[0, 0].numpy())
        np.testing.assert_array_equal(error, np.where(missing[0, 0].numpy(), np.nan, 0))
    elif len(size) == 2:
        ((whole, shown, _),) = pixels(figure)
        np.testing.assert_array_equal(np.ma.getmaskarray(np.ma.masked_invalid(shown)), missing[0, 0].numpy())
        np.testing.assert_array_equal(np.asarray(shown)[~missing[0, 0].numpy()], whole[~missing[0, 0].numpy()])


def test_gaps_of_coloured_images_are_blue() -> None:
    x = torch.rand(1, 3, 2, 2)
    measured = x.clone()
    measured[0, :, 0, 0] = torch.nan
    ((_, shown, _),) = pixels(comparison(x, {"measured": measured}))
    assert shown[0, 0].argmax() == 2
    assert np.isfinite(shown).all()


@pytest.mark.parametrize("size", [(8,), (4, 4)])
def test_long_names_are_wrapped(size: tuple[int, ...]) -> None:
    x, name = torch.rand(1, 1, *size), "the mean of many draws, refined and corrected, from the prior"
    figure = comparison(x, {name: x, f"{name}s": x})
    figure.set_layout_engine(None)
    texts = [axes.get_title() or axes.get_ylabel() for axes in figure.axes]
    assert all(len(line) <= 20 for text in texts for line in text.split("\n"))
    assert " ".join(texts[1].split("\n")) == name


def test_many_curves_go_on_below() -> None:
    x = torch.randn(20, 1, 8, dtype=torch.float64)
    rows = curves(uncertainty(x, torch.stack([x, x])))
    panels = [panel for row in rows.values() for panel in row]
    np.testing.assert_array_equal([panel[0] for panel in panels], x[:, 0].numpy())
    figure = comparison(x[:7], {"same": x[:7]})
    assert len(figure.axes) == 2 * 3 * 4
    assert [a.get_ylabel() for a in figure.axes[::4]] == ["original", "same", "same,\nerror"] * 2
    assert not figure.axes[-1].get_lines()


@pytest.mark.parametrize("size", [(1,), (4,), (1, 4), (2, 1, 3)])
def test_constant_signals_and_axes_of_one_point_are_drawn(size: tuple[int, ...]) -> None:
    decomp, x = Identity(size, channels=2), torch.zeros(1, 2, *size)
    progressive(decomp, decomp.analysis(x), x).draw_without_rendering()
    comparison(x, {"same": x}).draw_without_rendering()


@pytest.mark.parametrize("size", [(8,), (4, 4), (2, 2, 2)])
def test_signals_that_carry_gradients_are_drawn(size: tuple[int, ...]) -> None:
    decomp, x = Identity(size, channels=1), torch.rand(1, 1, *size, requires_grad=True)
    progressive(decomp, decomp.analysis(x), x)
    comparison(x.detach(), {"twice": 2 * x})


def test_convergence_draws_each_problem_of_a_history() -> None:
    histories = {
        "scale": History([0, 0, 1], [0, 1, 0], [1, 1, 4], [3.0, 2.0, 5.0], [1.0, 0.5, 4.0], [2.0, 1.5, 1.0], [1.0] * 3),
        "joint": History([0, 0], [0, 1], [4, 4], [9.0, 8.0], [5.0, 4.0], [4.0, 4.0], [1.0] * 2, [0.1, 0.2]),
    }
    histories["scale"].seconds = [0.1, 0.2, 0.3]
    figure = convergence(histories)
    for axes, column in zip(figure.axes, ("objective", "data", "nll"), strict=True):
        lines = [tuple(np.asarray(line.get_xydata()).T.tolist()) for line in axes.get_lines()]
        scale = getattr(histories["scale"], column)
        joint = getattr(histories["joint"], column)
        assert lines == [([0.1, 0.2], scale[:2]), ([0.3], scale[2:]), ([0.1, 0.2], joint)]
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["scale", "joint"]
