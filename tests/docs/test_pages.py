"""The Python examples of the README and of the documentation run as they are printed, and files named exist.

Tutorials run from top to bottom as one program, other pages block by block. Trainings are cut to a
twentieth of their steps.
"""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import separable_hvae
from separable_hvae import FFT2Complex, FFT2Real
from tests.helpers.deepinv import require_deepinv
from tests.helpers.pages import PAGES, ROOT, TUTORIALS, blocks, program, run


def examples() -> list[Any]:
    found = [
        pytest.param(page, "\n" * before + source, id=f"{page.name}-line{before + 1}")
        for page in PAGES
        if page not in TUTORIALS
        for before, source in blocks(page)
    ]
    return found + [pytest.param(page, program(page), id=page.name) for page in TUTORIALS]


def named_files() -> list[Any]:
    """Local files that a page links to, shows or runs."""
    found = []
    for page in PAGES:
        shown = re.sub(r"(?s)<!--.*?-->", "", page.read_text(encoding="utf-8"))
        names = {page.parent / name for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", shown)}
        names |= {ROOT / name for name in re.findall(r"python ([\w/]+\.py)", shown)}
        found += [pytest.param(name, id=f"{page.name}-{name.name}") for name in sorted(names)]
    return found


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fit`` takes a twentieth of the steps it is told to take."""
    fit = separable_hvae.fit

    def fit_briefly(*args: Any, steps: int, **options: Any) -> separable_hvae.FitReport:
        return fit(*args, steps=max(1, steps // 20), **options)

    monkeypatch.setattr(separable_hvae, "fit", fit_briefly)


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize(("page", "source"), examples())
def test_example_runs(page: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import deepinv" in source:
        require_deepinv()
    monkeypatch.chdir(tmp_path)
    run(page, source)
    if page in TUTORIALS:
        shown = set(re.findall(rf"\(\.\./images/{page.stem}/([\w-]+\.png)\)", page.read_text(encoding="utf-8")))
        assert shown
        assert shown == {path.name for path in tmp_path.glob("*.png")}


def test_there_are_examples() -> None:
    assert len(examples()) >= 4
    assert len(TUTORIALS) >= 6


@pytest.mark.parametrize("path", named_files())
def test_named_file_exists(path: Path) -> None:
    assert path.exists()


def test_the_figure_of_bins_shows_the_definition() -> None:
    drawn = runpy.run_path(str(ROOT / "examples" / "figures" / "bins.py"))["owners"]
    axis = np.abs(np.fft.fftshift(np.fft.fftfreq(12, 1 / 12)))
    reach = 2 * np.maximum(*np.meshgrid(axis, axis))
    scales = np.array([1, 3, 6, 12])
    for decomp in (FFT2Real(12, 1, scales=[1, 3, 6, 12]), FFT2Complex(12, scales=[1, 3, 6, 12])):
        np.testing.assert_array_equal(drawn(decomp), scales[np.searchsorted(scales, reach)])
