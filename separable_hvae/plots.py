"""Pictures of results: what each scale adds, and how reconstructions compare.

Needs matplotlib (extra ``examples``). Every function returns a figure and leaves global state alone.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from separable_hvae.decomposition import Decomposition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def progressive(decomp: Decomposition, bands: Sequence[Tensor], originals: Tensor) -> "Figure":
    """Partial sums of the bands, coarse to fine, one signal a row (the paper's Fig. 3).

    Args:
        decomp: The bound decomposition, two-dimensional.
        bands: Bands ``(B, *band_shape)``, coarse to fine.
        originals: Signals ``(B, C, H, W)``, shown last.
    """
    sums = [decomp.synthesis(list(bands)[: i + 1]) for i in range(len(bands))]
    titles = [f"scale ≤ {s}" for s in decomp.band_scales]
    return gallery(dict(zip([*titles, "original"], [*sums, originals], strict=True)), like=originals)


def comparison(originals: Tensor, reconstructions: Mapping[str, Tensor], *, zoom: float | None = None) -> "Figure":
    """Originals, reconstructions and their errors, one signal a row.

    Args:
        originals: Signals ``(B, C, H, W)``.
        reconstructions: Signals ``(B, C, H, W)`` by name.
        zoom: Factor on the errors' brightness; ``None`` makes the largest error white.
    """
    errors = {name: (x - originals).abs() for name, x in reconstructions.items()}
    span = float(originals.abs().max() if originals.is_complex() else originals.max() - originals.min())
    top = span / zoom if zoom else max(float(e.max()) for e in errors.values())
    columns = {"original": originals, **reconstructions}
    figure = gallery({**columns, **{f"|error|, {n}": e for n, e in errors.items()}}, like=originals)
    for i, axes in enumerate(figure.axes):
        if i % (len(columns) + len(errors)) >= len(columns) and axes.images:
            name = list(errors)[i % (len(columns) + len(errors)) - len(columns)]
            axes.images[0].set(data=_pixels(errors[name][i // (len(columns) + len(errors))], 0.0, top))
    return figure


def gallery(columns: Mapping[str, Tensor], *, like: Tensor) -> "Figure":
    """Signals side by side, one column for each name, in the value range of ``like``.

    Args:
        columns: Signals ``(B, C, H, W)`` by title; complex ones are shown as magnitudes.
        like: Signals whose range is black to white.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If signals have no two axes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need the extra "examples": pip install "separable-hvae[examples]"') from error
    if like.ndim != 4:
        raise ValueError(f"pictures need signals (B, C, H, W), got shape {tuple(like.shape)}")
    shown = like.abs() if like.is_complex() else like
    low, high = (0.0 if like.is_complex() else float(shown.min())), float(shown.max())
    rows = len(like)
    figure = Figure(figsize=(1.35 * len(columns), 1.35 * rows + 0.3), layout="constrained")
    grid: Sequence[Sequence[Axes]] = figure.subplots(rows, len(columns), squeeze=False)
    for j, (title, signals) in enumerate(columns.items()):
        grid[0][j].set_title(title, fontsize=8)
        for i in range(rows):
            grid[i][j].imshow(_pixels(signals[i], low, high), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            grid[i][j].set_axis_off()
    return figure


def _pixels(signal: Tensor, low: float, high: float) -> Tensor:
    """One signal ``(C, H, W)`` as a picture ``(H, W)`` or ``(H, W, 3)`` in [0, 1]."""
    x = (signal.abs() if signal.is_complex() else signal).detach().float().cpu()
    x = ((x - low) / max(high - low, 1e-12)).clamp(0, 1)
    return torch.movedim(x, 0, -1) if len(x) == 3 else x.mean(0)
