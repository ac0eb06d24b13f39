"""Pictures of results: what each scale adds, how reconstructions compare, how sure they are, how refinement went.

Images are shown as they are, volumes by the three planes through their centre, and signals of one axis as
curves over the original, pale behind them. Needs matplotlib (extra ``plots``). Every function returns a
figure, which notebooks show, and leaves global state alone.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from separable_hvae._validation import check_instance
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import check_finite
from separable_hvae.refine import History

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

_ACROSS = 6  # Curves beside one another.
_GAP = (0.12, 0.47, 0.71)  # What is missing, in red, green and blue.


def progressive(decomp: Decomposition, bands: Sequence[Tensor], originals: Tensor) -> "Figure":
    """Partial sums of the bands, coarse to fine (the paper's Fig. 3).

    Images and volumes have one signal a row, curves one signal a column. The planes of a volume ``(D, H, W)``
    are ``H × W``, beside it ``H × D``, and below it ``D × W``, so that neighbours share an axis. Three channels of
    images and volumes are colours, any other number is averaged; those of curves lie below one another, and the
    range of each is named at the side. Complex signals are shown as magnitudes, curves with their phase too,
    wherever the magnitude exceeds a twentieth of the originals' largest.

    Args:
        decomp: The bound decomposition.
        bands: Bands ``(B, *band_shape)``, coarse to fine; finer ones may be missing.
        originals: Signals ``(B, C, *size)``, shown last; the range of images and volumes is black to white.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If signals have no or more than three axes, or the bands are not those of as many signals.
    """
    check_instance("decomp", decomp, Decomposition)
    _check_signals("originals", originals)
    decomp.check_bands(bands)
    if any(band is None for band in bands):
        raise ValueError("bands must hold tensors alone, got None: finer ones are left out at the end")
    originals = originals.detach()
    sums = [decomp.synthesis(list(bands)[: i + 1]).detach() for i in range(len(bands))]
    _check_signals("the sum of bands", sums[-1])
    _check_alike("the sum of bands", sums[-1], originals)
    shown = [(f"scale ≤ {s}", x) for s, x in zip(decomp.band_scales, sums, strict=False)]
    return _draw([*shown, ("original", originals)], [], originals)


def comparison(originals: Tensor, reconstructions: Mapping[str, Tensor]) -> "Figure":
    """Originals, reconstructions and their errors, laid out as by :func:`progressive`.

    Images and volumes show the magnitude of an error, curves of real signals its sign too.

    Args:
        originals: Signals ``(B, C, *size)``; the range of images and volumes is black to white.
        reconstructions: Signals ``(B, C, *size)`` by name; the largest error of all is white, and all curves of
            errors have one scale. NaN is what is missing: a gap in curves, blue in images.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If signals have no or more than three axes, there are no reconstructions, or they have
            another shape.
    """
    _check_signals("originals", originals)
    check_instance("reconstructions", reconstructions, Mapping)
    if not reconstructions:
        raise ValueError("reconstructions must hold at least one batch of signals, got none")
    for name, x in reconstructions.items():
        _check_signals(f"reconstructions[{name!r}]", x, gaps=True)
        _check_alike(f"reconstructions[{name!r}]", x, originals)
    originals = originals.detach()
    shown = [(name, x.detach()) for name, x in reconstructions.items()]
    kind = "error" if originals.ndim == 3 and not originals.is_complex() else "|error|"
    errors = [(f"{name},\n{kind}", x - originals) for name, x in shown]
    return _draw([("original", originals), *shown], errors, originals)


def uncertainty(originals: Tensor, draws: Tensor) -> "Figure":
    """Mean μ and standard deviation σ over draws, laid out as by :func:`progressive`; complex signals as magnitudes.

    Curves show μ in a band of μ ± σ, images and volumes σ beside μ.

    Args:
        originals: Signals ``(B, C, *size)``; the range of images and volumes is black to white.
        draws: Draws of each ``(n, B, C, *size)``, as :func:`posterior_draws` gives them.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If signals have no or more than three axes, or there are not two draws of each at least.
    """
    _check_signals("originals", originals)
    check_instance("draws", draws, Tensor)
    if draws.ndim != originals.ndim + 1 or len(draws) < 2:
        wanted = ", ".join(map(str, originals.shape))
        raise ValueError(f"draws must have shape (n, {wanted}) with n at least 2, got {tuple(draws.shape)}")
    for draw in draws:
        _check_signals("draws", draw)
        _check_alike("draws", draw, originals)
    if originals.is_complex():
        originals, draws = originals.abs(), draws.abs()
    originals, draws = originals.detach(), draws.detach()
    mean, deviation = draws.mean(0), draws.std(0)
    if originals.ndim > 3:
        return _gallery([("original", originals), ("μ", mean)], [("σ", deviation)], originals)
    limits = _limits([originals, mean - deviation, mean + deviation])
    return _curves([_Track("μ ± σ", mean, originals, limits, spread=deviation)], originals)


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


def _figure(pad: float | None = None, **options: Any) -> "Figure":
    """Make an empty figure with ``pad`` inches around each panel, ``None`` being matplotlib's own."""
    try:
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        from separable_hvae._figure import NotebookFigure
    except ImportError as error:
        raise ImportError('pictures need the extra "plots": pip install "separable-hvae[plots]"') from error
    return NotebookFigure(layout=ConstrainedLayoutEngine(w_pad=pad, h_pad=pad), **options)


_Named = Sequence[tuple[str, Tensor]]
"""Signals ``(B, C, *size)`` with the name that a picture gives them."""


def _draw(values: _Named, errors: _Named, originals: Tensor) -> "Figure":
    """Draw values and errors of signals, as their number of axes asks for."""
    if originals.ndim == 3:
        return _curves(_tracks(values, errors, originals), originals)
    return _gallery(values, errors, originals)


def _gallery(values: _Named, errors: _Named, originals: Tensor) -> "Figure":
    """Images and volumes: names across, signals down."""
    low, high = _range(originals)
    top = _top(errors)
    zoom = (high - low) / max(top, 1e-12)
    columns = [(name, x, low, high) for name, x in values]
    columns += [(f"{name} × {zoom:.0f}", e.abs(), 0.0, top) for name, e in errors]
    pictures = [[_picture(x, low, high) for x in signals] for _, signals, low, high in columns]
    height, width = pictures[0][0].shape[:2]
    # Volumes lie further apart than their planes.
    (across, down), pad = ((1.35, 1.35), None) if originals.ndim == 4 else ((2.2, 2.2 * height / width), 0.1)
    titles = [_wrapped(title, across) for title, *_ in columns]
    above = 0.15 * (1 + max(title.count("\n") for title in titles))
    figure = _figure(pad, figsize=(across * len(columns), down * len(originals) + above))
    grid = figure.subplots(len(originals), len(columns), squeeze=False)
    for j, title in enumerate(titles):
        grid[0][j].set_title(title, fontsize=8)
        for i, picture in enumerate(pictures[j]):
            shown = grid[i][j].imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            shown.set_cmap(shown.get_cmap().with_extremes(bad=_GAP))
            grid[i][j].set_axis_off()
    return figure


@dataclass(frozen=True)
class _Track:
    """One row of curves: real signals ``(B, C, N)``, what lies pale behind and around them, and their range.

    Phases are dots, since a line would join both sides of a jump by 2π.
    """

    label: str
    signals: Tensor
    behind: Tensor | None
    range: tuple[float, float]
    is_phase: bool = False
    spread: Tensor | None = None


def _curves(tracks: Sequence[_Track], originals: Tensor) -> "Figure":
    """Signals of one axis: names down, signals across, channels below one another in a panel.

    Many signals continue below, all names again.
    """
    batch, channels, points = originals.shape
    strips = math.ceil(batch / _ACROSS)
    columns = math.ceil(batch / strips)
    heights = [(0.6 if track.is_phase else 1.0) * (1 + 0.3 * (channels - 1)) for track in tracks] * strips
    figure = _figure(figsize=(1 + max(5.0, 2.4 * columns), 0.9 * sum(heights) + 0.6))
    grid = figure.subplots(len(heights), columns, squeeze=False, sharex=True, sharey="row", height_ratios=heights)
    for number, row in enumerate(grid):
        strip, place = divmod(number, len(tracks))
        track, signals = tracks[place], range(batch)[strip * columns : (strip + 1) * columns]
        low, high = _widened(*track.range)
        down = torch.arange(channels, dtype=torch.float64) * (high - low)
        label = _wrapped(track.label, 1.35)
        label += "" if channels == 1 else f"\n{track.range[0]:.2g} to {track.range[1]:.2g}"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        row[0].set_ylim(low - float(down[-1]), high)
        if channels > 1:
            row[0].set_yticks((low + high) / 2 - down, [f"ch. {c}" for c in range(channels)])
        elif track.is_phase:
            row[0].set_yticks([-math.pi, 0, math.pi], ["−π", "0", "π"])
        line = "." if track.is_phase else "-"
        for axes in row[len(signals) :]:
            axes.set_axis_off()
        for i, axes in zip(signals, row, strict=False):
            if track.spread is not None:
                ends = (_numbers(track.signals[i] + sign * track.spread[i], down).T for sign in (-1, 1))
                for below, above in zip(*ends, strict=True):
                    axes.fill_between(range(points), below, above, color="C1", alpha=0.4, lw=0)
            if track.behind is not None:
                axes.plot(_numbers(track.behind[i], down), line, color="C0", alpha=0.3, lw=3, ms=4)
            axes.plot(_numbers(track.signals[i], down), line, color="C0", lw=0.9, ms=1.5)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlim(0, max(points - 1, 1))
        axes.set_xlabel("sample", fontsize=8)
    return figure


def _tracks(values: _Named, errors: _Named, originals: Tensor) -> list[_Track]:
    """Rows of curves: values, phases below complex ones, then errors, signed where they are real."""
    is_complex = originals.is_complex()
    amplitudes = [x.abs() if is_complex else x for _, x in values]
    limits = _limits(amplitudes)
    quiet = 0.05 * float(originals.abs().max())
    tracks: list[_Track] = []
    for (name, x), amplitude in zip(values, amplitudes, strict=True):
        behind = None if x is originals else originals
        magnitude = behind.abs() if behind is not None and is_complex else behind
        tracks.append(_Track(name, amplitude, magnitude, limits))
        if is_complex:
            pale = None if behind is None else _phase(behind, quiet)
            tracks.append(_Track("phase", _phase(x, quiet), pale, (-math.pi, math.pi), is_phase=True))
    top = _top(errors)
    for name, e in errors:
        tracks.append(_Track(name, e.abs(), None, (0.0, top)) if is_complex else _Track(name, e, None, (-top, top)))
    return tracks


def _phase(x: Tensor, quiet: float) -> Tensor:
    """Phase in radians, NaN where the magnitude is at most ``quiet`` and the phase that of noise."""
    return torch.where(x.abs() > quiet, x.angle(), torch.nan)


def _widened(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis, with room beside the curves; of one point, a unit around it."""
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def _limits(signals: Sequence[Tensor]) -> tuple[float, float]:
    """Least and largest of real signals, gaps aside."""
    numbers = torch.cat([x.flatten() for x in signals])
    numbers = numbers[~numbers.isnan()]
    return float(numbers.min()), float(numbers.max())


def _top(errors: _Named) -> float:
    """The largest magnitude, gaps aside."""
    return max((float(e.abs().nan_to_num(0).max()) for _, e in errors), default=0.0)


def _wrapped(name: str, inches: float) -> str:
    """A name in small print, in lines of a width."""
    return "\n".join(textwrap.fill(line, int(inches / 0.065)) for line in name.split("\n"))


def _check_signals(name: str, x: Tensor, *, gaps: bool = False) -> None:
    check_instance(name, x, Tensor)
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"{name} must be real floating-point or complex, got {x.dtype}")
    if x.ndim not in (3, 4, 5) or not x.numel():
        raise ValueError(f"{name} must hold signals (B, C, *size) of one to three axes, got shape {tuple(x.shape)}")
    check_finite(name, x[~x.isnan()] if gaps else x)


def _check_alike(name: str, x: Tensor, originals: Tensor) -> None:
    if x.shape != originals.shape:
        raise ValueError(f"{name} must have the originals' shape {tuple(originals.shape)}, got {tuple(x.shape)}")
    if x.is_complex() != originals.is_complex():
        raise TypeError(f"{name} must be real or complex as the originals are, {originals.dtype}, got {x.dtype}")


def _range(signals: Tensor) -> tuple[float, float]:
    return (0.0, float(signals.abs().max())) if signals.is_complex() else (float(signals.min()), float(signals.max()))


def _picture(signal: Tensor, low: float, high: float) -> Tensor:
    """One image or volume ``(C, *size)``, complex ones as magnitudes, as ``(H, W)`` or ``(H, W, 3)`` in [0, 1]."""
    x = (signal.abs() if signal.is_complex() else signal).float().cpu()
    x = ((x - low) / max(high - low, 1e-12)).clamp(0, 1)
    x = _planes(x) if x.ndim == 4 else x
    if len(x) != 3:
        return x.mean(0)
    return torch.movedim(torch.where(x.isnan().any(0), torch.tensor(_GAP)[:, None, None], x), 0, -1)


def _planes(x: Tensor) -> Tensor:
    """Planes through the centre of ``(C, D, H, W)``, on white: ``H × W``, beside it ``H × D``, below it ``D × W``."""
    c, d, h, w = x.shape
    gap = math.ceil(max(d, h, w) / 48)
    canvas = x.new_ones(c, h + gap + d, w + gap + d)
    canvas[:, :h, :w] = x[:, d // 2]
    canvas[:, :h, w + gap :] = x[:, :, :, w // 2].mT
    canvas[:, h + gap :, :w] = x[:, :, h // 2]
    return canvas


def _numbers(signal: Tensor, down: Tensor) -> "npt.NDArray[np.float64]":
    """One signal ``(C, N)`` as columns ``(N, C)``, each channel lowered by its entry of ``down``."""
    return (signal.cpu().double().mT - down).numpy()
