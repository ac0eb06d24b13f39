"""Time of one gradient step on every latent against depth (the paper's Fig. 2).

    python examples/speed/depth.py --out runs/depth

Measures, in one process and in turns: eq. 4 latent by latent (the vanilla model), a joint gradient
through the whole decoder, Algorithm 1, and scale by scale. One step's time is (t(3 steps) − t(1 step)) / 2,
so what a refinement does once is not counted. Writes depth.json and depth.png.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from separable_hvae import HVAE, Decomposition, FFT2Real, Identity, MAPRefiner

METHODS: dict[str, tuple[type[Decomposition], str]] = {
    "eq. 4, latent by latent (vanilla)": (Identity, "latent"),
    "joint gradient (vanilla)": (Identity, "joint"),
    "joint gradient (separable)": (FFT2Real, "joint"),
    "Algorithm 1 (separable)": (FFT2Real, "latent"),
    "scale by scale (separable)": (FFT2Real, "scale"),
}


def seconds(refiner: MAPRefiner, model: HVAE, x: torch.Tensor) -> float:
    """Wall time of one refinement, the device's work included."""
    if x.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    refiner(model, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def step_time(model: HVAE, schedule: str, x: torch.Tensor, budget: float) -> dict[str, Any]:
    """Median and range of one step's time, from as many repetitions as the budget allows, at most 7."""
    one, three = (MAPRefiner(steps=n, schedule=schedule) for n in (1, 3))
    seconds(one, model, x)
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (len(times) < 7 and time.perf_counter() - begin < budget):
        short = seconds(one, model, x)
        times.append((seconds(three, model, x) - short) / 2)
    return {"median": statistics.median(times), "low": min(times), "high": max(times), "repetitions": len(times)}


def draw(results: list[dict[str, Any]], device: str) -> Figure:
    """Time against depth, both on logarithmic axes."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in METHODS:
        runs = [r for r in results if r["method"] == name]
        depth = [r["depth"] for r in runs]
        axes.loglog(depth, [1e3 * r["median"] for r in runs], marker="o", label=name)
        axes.fill_between(depth, [1e3 * r["low"] for r in runs], [1e3 * r["high"] for r in runs], alpha=0.2)
    axes.set(xlabel="stochastic layers L", ylabel="one step on every latent, ms", title=device)
    depths = sorted({r["depth"] for r in results})
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    return figure


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16, 27], help="layers of each of 6 scales"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=20, help="seconds for each point, one repetition at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/depth"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="scale .* latents for the")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    device = torch.cuda.get_device_name() if x.is_cuda else f"CPU, {args.threads} thread(s)"
    results: list[dict[str, Any]] = []
    for layers in args.layers:
        models = {
            kind: HVAE(kind(32), layers=layers, width=args.width, bottleneck=args.width // 2).to(args.device)
            for kind in (Identity, FFT2Real)
        }
        for name, (kind, schedule) in METHODS.items():
            measured = step_time(models[kind], schedule, x, args.budget)
            results.append({"method": name, "depth": models[kind].depth, **measured})
            print(f"L = {models[kind].depth:4d}  {name:36} {1e3 * measured['median']:10.1f} ms", flush=True)
        settings = {"device": device, "batch": args.batch, "width": args.width, "torch": torch.__version__}
        (args.out / "depth.json").write_text(json.dumps({**settings, "results": results}, indent=1))
    draw(results, f"{device}, batch {args.batch}").savefig(args.out / "depth.png", dpi=160)


if __name__ == "__main__":
    main()
