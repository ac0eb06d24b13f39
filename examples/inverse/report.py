"""How good reconstructions are, and tables and pictures of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from problems import Case, to_kspace
from scipy.stats import wilcoxon
from skimage.metrics import structural_similarity
from torch import Tensor

from separable_hvae import Decomposition

Picture = npt.NDArray[np.floating[Any]]
SWEPT, CHOSEN = "separable, scale by scale", "separable, joint"
AGAINST = ["total variation", "wavelet sparsity", "vanilla, joint", "vanilla, PnP-HVAE", "separable, amortized"]
DIGITS = {"psnr": 2, "ssim": 3, "nmse": 4}


def quality(found: Tensor, x: Tensor) -> dict[str, Any]:
    """PSNR in dB, SSIM and NMSE of each image, with mean and standard error.

    Complex images are compared as magnitudes in PSNR and SSIM, whose range is the original's largest, as is
    usual in MRI; NMSE is that of the complex numbers. Real ones have the range 2, from -1 to 1.
    """
    a, b = (found.abs(), x.abs()) if x.is_complex() else (found, x)
    span = b.amax((1, 2, 3)) if x.is_complex() else torch.full((len(x),), 2.0)
    psnr = 10 * torch.log10(span.square() / (a - b).square().mean((1, 2, 3)))
    nmse = (found - x).abs().square().sum((1, 2, 3)) / x.abs().square().sum((1, 2, 3))
    pairs = zip(a.double().numpy(), b.double().numpy(), span.tolist(), strict=True)
    ssim = [structural_similarity(u, v, data_range=s, channel_axis=0) for u, v, s in pairs]
    values = {"psnr": psnr.double().numpy(), "ssim": np.array(ssim), "nmse": nmse.double().numpy()}
    return {
        name: {"mean": float(v.mean()), "se": float(v.std(ddof=1) / len(v) ** 0.5), "each": v.round(5).tolist()}
        for name, v in values.items()
    }


def significance(table: Mapping[str, Any], measure: str) -> dict[str, float]:
    """p-values of paired Wilcoxon tests, the refined separable model against others."""
    mine = np.array(table[CHOSEN][measure]["each"])
    others = {name: np.array(table[name][measure]["each"]) for name in AGAINST if name in table}
    return {name: float(wilcoxon(mine, other).pvalue) for name, other in others.items()}


def known_error(case: Case, found: Tensor, decomp: Decomposition) -> float:
    """Squared error in the bands that are known, summed over all images."""
    assert case.known is not None
    bands = zip(decomp.analysis(found), case.known.bands, strict=False)
    return sum(float((h - k).square().sum()) for h, k in bands if k is not None)


def markdown(report: Mapping[str, Any]) -> str:
    """One table for each problem."""
    about = f"{report['images']} held-out images of {report['label']}, {report['steps']} steps; mean ± standard error."
    lines = [about]
    for problem, found in report["problems"].items():
        lines += [
            "",
            f"## {problem}",
            "",
            f"| method | PSNR, dB | SSIM | NMSE | ms/image | against “{CHOSEN}” |",
            "|---" * 6 + "|",
        ]
        for name, row in found["methods"].items():
            cells = [f"{row[k]['mean']:.{d}f} ± {row[k]['se']:.{d}f}" for k, d in DIGITS.items()]
            p = ""
            if name in found["p"]:
                lower = row[found["measure"]]["mean"] < found["methods"][CHOSEN][found["measure"]]["mean"]
                worse = lower == (found["measure"] == "psnr")
                p = f"{'worse' if worse else 'better'}, {found['p'][name]:.1g}"
            lines.append(f"| {name} | {' | '.join(cells)} | {row['ms']:.1f} | {p} |")
        if "known bands" in found:
            errors = found["known bands"]
            share = errors[CHOSEN] / errors["separable, amortized"]
            lines += ["", f"Squared error in the known bands, “separable, joint” over amortized: {share:.2%}."]
        if found["calibration"]:
            shown = ", ".join(f"{k} {v:.3f}" for k, v in found["calibration"].items())
            lines += ["", f"{report['draws']} posterior draws: {shown}."]
    lines += [
        "",
        "Against: which mean is better, and the p-value of a paired Wilcoxon test (PSNR; NMSE of complex images).",
    ]
    return "\n".join(lines) + "\n"


def draw(case: Case, x: Tensor, solved: Mapping[str, Tensor], mean: Tensor | None, deviation: Tensor | None) -> Figure:
    """Up to three images: original, some methods, and the uncertainty; log-magnitude k-space below each.

    Real images of fewer than 16 pixels on a side, whose k-space shows little, go without.
    """
    names = ["adjoint (zero-filled)", "total variation", "vanilla, joint", "separable, amortized", SWEPT, CHOSEN]
    columns = {"original": x} | {name: solved[name] for name in names if name in solved}
    if mean is not None and deviation is not None:
        columns |= {"mean of draws": mean, "σ of draws": deviation}
    kinds = ["image", "k-space"] if x.is_complex() or x.shape[-1] >= 16 else ["image"]
    rows = [(i, kind) for i in range(min(3, *map(len, columns.values()))) for kind in kinds]
    figure = Figure(figsize=(1.5 * len(columns), 1.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for (i, kind), line in zip(rows, axes, strict=True):
        low, high = (0.0, float(x[i].abs().max())) if x.is_complex() else (-1.0, 1.0)
        original = spectrum(x[i])
        for (name, images), panel in zip(columns.items(), line, strict=True):
            image = images[i].detach()
            if kind == "k-space" and name.startswith("σ"):
                panel.set_axis_off()
            elif kind == "k-space":
                panel.imshow(spectrum(image), cmap="magma", vmin=float(original.min()), vmax=float(original.max()))
            elif name.startswith("σ"):
                panel.imshow(image.square().mean(0).sqrt().numpy(), cmap="magma", vmin=0)
            else:
                panel.imshow(pixels(image, low, high), cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
            if (i, kind) == rows[0]:
                panel.set_title(name, fontsize=7)
    figure.suptitle(case.name, fontsize=9)
    return figure


def pixels(image: Tensor, low: float, high: float) -> Picture:
    """An image ``(C, H, W)``, complex ones as magnitudes, as a picture in [0, 1]: ``(H, W, 3)``, or ``(H, W)``."""
    x = (((image.abs() if image.is_complex() else image) - low) / (high - low)).clamp(0, 1)
    return np.asarray(x.movedim(0, -1) if len(x) == 3 else x.mean(0))


def spectrum(image: Tensor) -> Picture:
    """Log-magnitude k-space of an image ``(C, H, W)``, the mean of its channels: ``(H, W)``."""
    return np.asarray(to_kspace(image).abs().clamp_min(1e-3).log().mean(0))
