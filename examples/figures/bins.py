"""Draw which frequency bin belongs to which scale, read off the decompositions themselves (the paper's Fig. 1).

    python examples/figures/bins.py --out docs/images/bins.png

A real image keeps one bin of each conjugate pair, the others follow; a complex image keeps every bin.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from separable_hvae import Decomposition, FFT2Complex, FFT2Real

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # Before installed packages: one is called evaluate.
from console import arguments


def owners(decomp: Decomposition) -> NDArray[np.int64]:
    """The scale of each bin of a square image's spectrum ``(n, n)``: that whose band alone has energy there."""
    n = decomp.size[0]
    owner = np.zeros((n, n), np.int64)
    for i, (scale, shape) in enumerate(decomp.band_shapes.items()):
        band = torch.randn(16, *shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        spectrum = torch.fft.fft2(decomp.synthesis([*[None] * i, band]), norm="ortho")
        owner[(spectrum.abs().mean((0, 1)) > 1e-6).numpy()] = scale
    return np.fft.fftshift(owner)


def draw(size: int) -> Figure:
    """Both spectra, bin 0 in the middle; bins that follow from their partner are pale."""
    figure = Figure(figsize=(8, 4.1), layout="constrained")
    panels = figure.subplots(1, 2)
    bins = np.fft.fftshift(np.fft.fftfreq(size, 1 / size)).astype(int)
    rows, columns = np.meshgrid(bins, bins, indexing="ij")
    edge = [0, -size // 2]
    follows = (columns < 0) & (columns > edge[1]) | np.isin(columns, edge) & (rows < 0) & (rows > edge[1])
    for axes, decomp in zip(panels, (FFT2Real(size, channels=1), FFT2Complex(size)), strict=True):
        order = np.searchsorted(decomp.scales, owners(decomp))
        colours = colormaps["turbo"].resampled(len(decomp.scales))
        norm = BoundaryNorm(np.arange(len(decomp.scales) + 1) - 0.5, colours.N)
        opacity = np.where(follows, 0.3, 1.0) if not decomp.is_complex else 1.0
        extent = (bins[0] - 0.5, bins[-1] + 0.5, bins[-1] + 0.5, bins[0] - 0.5)
        axes.imshow(order, cmap=colours, norm=norm, alpha=opacity, extent=extent, interpolation="nearest")
        axes.set(title="real: Hermitian half-spectrum" if not decomp.is_complex else "complex: full spectrum")
        axes.set(xlabel="bin", ylabel="bin", xticks=[-size // 2, 0, size // 4], yticks=[-size // 2, 0, size // 4])
        handles = [axes.plot([], [], "s", color=colours(i), label=s)[0] for i, s in enumerate(decomp.scales)]
    figure.legend(handles=handles, title="scale", loc="outside right center", frameon=False)
    return figure


def main() -> None:
    """Write the figure."""
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("bins.png"))
    args = parser.parse_args()
    draw(args.size).savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
