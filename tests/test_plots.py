import numpy as np
import pytest
import torch

from separable_hvae import FFT1Real, FFT2Complex, Wavelet2
from separable_hvae.plots import comparison, convergence, progressive
from separable_hvae.refine import History


def pixels(figure: object) -> list[list["np.typing.NDArray[np.float64]"]]:
    """The picture in each cell of a figure, row by row."""
    axes = figure.axes  # type: ignore[attr-defined]
    columns = sum(bool(a.get_title()) for a in axes)
    shown = [np.asarray(a.images[0].get_array()) for a in axes]
    return [shown[i : i + columns] for i in range(0, len(shown), columns)]


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


def test_pictures_need_two_axes() -> None:
    decomp, x = FFT1Real(8), torch.randn(1, 1, 8)
    with pytest.raises(ValueError, match=r"originals must hold signals \(B, C, H, W\), got shape \(1, 1, 8\)"):
        progressive(decomp, decomp.analysis(x), x)


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
