"""Pictures of results: what each scale adds, how reconstructions compare, how refinement went.

Needs matplotlib (extra ``examples``). Every function returns a figure and leaves global state alone.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from separable_hvae.checks import check_instance
from separable_hvae.decomposition import Decomposition, check_finite
from separable_hvae.refine import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def progressive(decomp: Decomposition, bands: Sequence[Tensor], originals: Tensor) -> "Figure":
    """Partial sums of the bands, coarse to fine, one signal a row (the paper's Fig. 3).

    Args:
        decomp: The bound decomposition, two-dimensional.
        bands: Bands ``(B, *band_shape)``, coarse to fine.
        originals: Signals ``(B, C, H, W)``, shown last; their range is black to white.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If signals have no two axes, or the bands are not those of as many signals.
    """
    check_instance("decomp", decomp, Decomposition)
    _check_signals("originals", originals)
    decomp.check_bands(bands)
    if len(bands) != len(decomp.band_scales) or any(band is None for band in bands):
        got = sum(band is not None for band in bands)
        raise ValueError(f"bands must hold one tensor for each of the scales {decomp.band_scales}, got {got}")
    sums = [decomp.synthesis(list(bands)[: i + 1]) for i in range(len(bands))]
    _check_signals("the sum of bands", sums[-1])
    _check_alike("the sum of bands", sums[-1], originals)
    low, high = _range(originals)
    columns = [(f"scale ≤ {s}", x, low, high) for s, x in zip(decomp.band_scales, sums, strict=True)]
    return _gallery([*columns, ("original", originals, low, high)])


def comparison(originals: Tensor, reconstructions: Mapping[str, Tensor]) -> "Figure":
    """Originals, reconstructions and their errors, one signal a row.

    Args:
        originals: Signals ``(B, C, H, W)``; their range is black to white.
        reconstructions: Signals ``(B, C, H, W)`` by name; the largest error of all is white.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If signals have no two axes, there are no reconstructions, or they have another shape.
    """
    _check_signals("originals", originals)
    check_instance("reconstructions", reconstructions, Mapping)
    if not reconstructions:
        raise ValueError("reconstructions must hold at least one batch of signals, got none")
    for name, x in reconstructions.items():
        _check_signals(f"reconstructions[{name!r}]", x)
        _check_alike(f"reconstructions[{name!r}]", x, originals)
    low, high = _range(originals)
    errors = {name: (x - originals).abs() for name, x in reconstructions.items()}
    top = max(float(e.max()) for e in errors.values())
    columns = [(name, x, low, high) for name, x in {"original": originals, **reconstructions}.items()]
    zoom = f"|error| × {(high - low) / max(top, 1e-12):.0f}"
    return _gallery([*columns, *((f"{name},\n{zoom}", e, 0.0, top) for name, e in errors.items())])


def convergence(histories: Mapping[str, History]) -> "Figure":
    """Objective, data term and NLL of refinements against time.

    A schedule that solves one problem after the other starts a new line with each, since each has an
    objective of its own.

    Args:
        histories: ``result.history`` of refined results, by name.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument has the wrong type, as the ``None`` of results that were not refined.
        ValueError: If there are no histories.
    """
    check_instance("histories", histories, Mapping)
    if not histories:
        raise ValueError("histories must hold at least one history, got none")
    for name, history in histories.items():
        check_instance(f"histories[{name!r}]", history, History)
    columns = {"objective": "objective, nats", "data": "data term, nats", "nll": "−log p(z), nats"}
    figure = _figure(figsize=(11, 3.2))
    for axes, (column, label) in zip(figure.subplots(1, len(columns)), columns.items(), strict=True):
        for number, (name, history) in enumerate(histories.items()):
            for problem in dict.fromkeys(history.problem):
                rows = [i for i, p in enumerate(history.problem) if p == problem]
                values = getattr(history, column)
                axes.plot(
                    [history.seconds[i] for i in rows],
                    [values[i] for i in rows],
                    ".-",
                    color=f"C{number}",
                    label=name if rows[0] == 0 else None,
                )
        axes.set(xlabel="seconds", ylabel=label)
        axes.grid(alpha=0.3)
        if column == "objective" and histories:
            axes.legend(fontsize=8)
    return figure


def _figure(**options: Any) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need the extra "examples": pip install "separable-hvae[examples]"') from error
    return Figure(layout="constrained", **options)


def _gallery(columns: Sequence[tuple[str, Tensor, float, float]]) -> "Figure":
    """Columns of a title, signals ``(B, C, H, W)``, and the values that are black and white."""
    rows = len(columns[0][1])
    figure = _figure(figsize=(1.35 * len(columns), 1.35 * rows + 0.3))
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for j, (title, signals, low, high) in enumerate(columns):
        grid[0][j].set_title(title, fontsize=8)
        for i in range(rows):
            grid[i][j].imshow(
                _pixels(signals[i], low, high).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
            )
            grid[i][j].set_axis_off()
    return figure


def _check_signals(name: str, x: Tensor) -> None:
    check_instance(name, x, Tensor)
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"{name} must be real floating-point or complex, got {x.dtype}")
    if x.ndim != 4 or not x.numel():
        raise ValueError(f"{name} must hold signals (B, C, H, W), got shape {tuple(x.shape)}")
    check_finite(name, x)


def _check_alike(name: str, x: Tensor, originals: Tensor) -> None:
    if x.shape != originals.shape:
        raise ValueError(f"{name} must have the originals' shape {tuple(originals.shape)}, got {tuple(x.shape)}")
    if x.is_complex() != originals.is_complex():
        raise TypeError(f"{name} must be real or complex as the originals are, {originals.dtype}, got {x.dtype}")


def _range(signals: Tensor) -> tuple[float, float]:
    return (0.0, float(signals.abs().max())) if signals.is_complex() else (float(signals.min()), float(signals.max()))


def _pixels(signal: Tensor, low: float, high: float) -> Tensor:
    """One signal ``(C, H, W)``, complex ones as magnitudes, as a picture ``(H, W)`` or ``(H, W, 3)`` in [0, 1]."""
    x = (signal.abs() if signal.is_complex() else signal).detach().float().cpu()
    x = ((x - low) / max(high - low, 1e-12)).clamp(0, 1)
    return torch.movedim(x, 0, -1) if len(x) == 3 else x.mean(0)
