"""Train a small separable HVAE on real images, then refine its posterior on held-out ones.

    python examples/quickstart.py                       # handwritten digits, 8×8
    python examples/quickstart.py --images FOLDER       # your own pictures, cut to 32×32 RGB

Prints one table and writes two pictures into ./quickstart/.
"""

import time
from pathlib import Path

import torch
from console import arguments
from data import digits, tiles

from separable_hvae import HVAE, MAPRefiner, Result, Wavelet2, fit
from separable_hvae.plots import comparison, progressive


def main() -> None:
    """Train, refine, print the table, write the pictures."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="train on the pictures of this folder")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed repeats the numbers")
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for the pictures")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    try:
        images = tiles(args.images) if args.images else digits()
    except ValueError as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    images = images[torch.randperm(len(images))]
    held_out, images = images[: len(images) // 6], images[len(images) // 6 :]

    _, channels, size, _ = images.shape
    model = HVAE(Wavelet2(size, "haar", channels), layers=3, width=32, bottleneck=16, blocks=1, sigma=0.05)
    model.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
    print(f"{len(images)} images to train on, {len(held_out)} held out; {model.depth} layers, scales {model.scales}")
    fit(model, images, steps=args.steps, batch_size=32, learning_rate=8e-3, seed=args.seed)

    noise = torch.Generator().manual_seed(args.seed)
    methods = {
        "amortized sample": MAPRefiner(steps=0, sample=True),
        "amortized mean": MAPRefiner(steps=0),
        "iterative, N = 25": MAPRefiner(steps=25, init="prior"),
        "hybrid, N = 25": MAPRefiner(steps=25),
    }
    held_out = held_out[:300].to(model.device)
    results: dict[str, Result] = {}
    print(f"\n{'':20}{'MSE, 8 bit':>12}{'NLL, nats/dim':>16}{'ms/image':>10}{'improved':>10}")
    for name, refiner in methods.items():
        begin = time.perf_counter()
        result = refiner(model, held_out, noise)
        seconds = time.perf_counter() - begin
        results[name] = result
        error = (result.reconstruction - held_out).square().mean((1, 2, 3)) * 127.5**2
        mean = (results.get("amortized mean", result).reconstruction - held_out).square().mean((1, 2, 3)) * 127.5**2
        latents = sum(z[0].numel() for z in result.latents)
        better = f"{(error < mean).float().mean():.0%}" if "N =" in name else "–"
        nll = float(result.nll.mean()) / latents
        print(f"{name:20}{error.mean():12.2f}{nll:16.3f}{1e3 * seconds / len(held_out):10.2f}{better:>10}")

    args.out.mkdir(parents=True, exist_ok=True)
    few = slice(0, 4)
    hybrid, mean = results["hybrid, N = 25"], results["amortized mean"]
    progressive(model.decomp, [h[few] for h in hybrid.bands], held_out[few]).savefig(args.out / "scales.png", dpi=160)
    pair = {"amortized": mean.reconstruction[few], "hybrid": hybrid.reconstruction[few]}
    comparison(held_out[few], pair).savefig(args.out / "refinement.png", dpi=160)
    print(f"\nWrote {args.out / 'scales.png'} and {args.out / 'refinement.png'}.")


if __name__ == "__main__":
    main()
