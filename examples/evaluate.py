"""Table 1 of the paper for a model that examples/train.py trained: quality and time against the number of steps N.

    python examples/evaluate.py runs/best --data cifar-10-binary.tar.gz --out runs/best/evaluation
    python examples/evaluate.py runs/best --vanilla runs/vanilla --features inception.pt2 --data … --out …

Compares, on held-out images: amortized inference (posterior sample and posterior mean: different baselines),
iterative inference (from the prior) and hybrid inference, with the library's default refiner, its strongest one
(joint Gauss–Newton steps) and the paper's literal one, and the vanilla model with joint steps. Writes results.json,
results.md, quality.png (quality against N) and scales.png (every scale's output).
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from console import arguments, write_json
from matplotlib.figure import Figure
from metrics import extractor, fid, importance_bound, pictures, psnr, squared_error, ssim
from setups import Setup
from torch import Tensor, nn

from separable_hvae import HVAE, MAPRefiner, Refiner, Result
from separable_hvae.plots import progressive

UNITS = {"cifar10": ("8-bit levels", 127.5), "fastmri": ("volume's RMS", 1.0)}

GAUSS_NEWTON: Any = {"schedule": "joint", "rule": "gauss-newton"}
PRIOR_STEP = 0.1  # From the prior the way is long: fifty steps of the default 0.01 move a latent by 0.5 at most.


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    steps: int
    model: HVAE
    refiner: Refiner


def methods(model: HVAE, vanilla: HVAE | None, steps: list[int]) -> Iterator[Method]:
    """Every row of Table 1."""
    yield Method("amortized, sample", 0, model, MAPRefiner(0, sample=True))
    yield Method("amortized, mean", 0, model, MAPRefiner(0))
    for n in steps:
        yield Method("hybrid", n, model, MAPRefiner(n))
        yield Method("hybrid, Gauss–Newton", n, model, MAPRefiner(n, **GAUSS_NEWTON))
        yield Method("iterative", n, model, MAPRefiner(n, step_size=PRIOR_STEP, init="prior"))
        yield Method("hybrid, paper's refiner", n, model, MAPRefiner.paper(n))
        yield Method("iterative, paper's refiner", n, model, MAPRefiner.paper(n, init="prior"))
    if vanilla is not None:
        yield Method("vanilla, sample", 0, vanilla, MAPRefiner(0, sample=True))
        yield Method("vanilla, mean", 0, vanilla, MAPRefiner(0))
        for n in steps:
            yield Method("vanilla, joint", n, vanilla, MAPRefiner(n, schedule="joint"))
            yield Method("vanilla, Gauss–Newton", n, vanilla, MAPRefiner(n, **GAUSS_NEWTON))


def load(run: Path, device: str) -> tuple[HVAE, Setup]:
    """The model and the setup of a run.

    Raises:
        ValueError: If the folder holds no finished run, or its files are damaged.
    """
    path = run / "setup.json"
    try:
        setup = Setup(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not what train.py leaves: {error}") from error
    return HVAE.from_pretrained(run / "model", device=device).to(memory_format=torch.channels_last), setup


def clock(device: torch.device) -> float:
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(method: Method, x: Tensor, batch: int, seed: int) -> tuple[list[Result], list[float]]:
    """Refine all signals, and the seconds that each full batch took."""
    generator = torch.Generator(x.device).manual_seed(seed)
    results, seconds = [], []
    for part in x.split(batch):
        begin = clock(x.device)
        results.append(method.refiner(method.model, part, generator))
        seconds.append((clock(x.device) - begin) / len(part))
    return results, seconds[: max(1, len(x) // batch)]


def timings(method: Method, x: Tensor, batches: list[int], budget: float) -> dict[int, float]:
    """Median seconds for one image at each batch size, from 1 to 5 repetitions within a budget of seconds."""
    found: dict[int, float] = {}
    for batch in batches:
        part, taken = x[:batch], list[float]()
        begin = clock(x.device)
        while not taken or (len(taken) < 5 and clock(x.device) - begin < budget):
            start = clock(x.device)
            method.refiner(method.model, part, torch.Generator(x.device).manual_seed(0))
            taken.append(clock(x.device) - start)
        found[len(part)] = statistics.median(taken) / len(part)
    return found


def measure(
    method: Method, x: Tensor, unit: float, features: nn.Module, batch: int, batches: list[int], budget: float
) -> tuple[dict[str, Any], Tensor]:
    """One row, and the squared error of each signal."""
    results, seconds = run(method, x, batch, seed=0)
    reconstruction = torch.cat([r.reconstruction for r in results])
    error = squared_error(reconstruction, x) * unit**2
    latents = sum(z[0].numel() for z in results[0].latents)
    seen, wanted = pictures(reconstruction, x), pictures(x, x)
    times = {
        **timings(method, x, [b for b in batches if b != batch], budget),
        min(batch, len(x)): statistics.median(seconds),
    }
    best = min(times, key=times.__getitem__)
    refused = [r.refused for r in results if r.refused is not None]
    row = {
        "method": method.name,
        "steps": method.steps,
        "mse": float(error.mean()),
        "mse_standard_error": float(error.std() / len(error) ** 0.5),
        "nll": float(torch.cat([r.nll for r in results]).mean()) / latents,
        "psnr": float(psnr(seen, wanted).mean()),
        "ssim": float(ssim(seen, wanted).mean()),
        "fid": fid(features, wanted, seen),
        "refused": float(torch.cat(refused).float().mean()) if refused else 0.0,
        "ms_batch_1": 1e3 * times[1],
        "ms_best": 1e3 * times[best],
        "best_batch": best,
    }
    return row, error


def bounds(model: HVAE, x: Tensor, unit: float, samples: int, batch: int) -> dict[str, float]:
    """ELBO and importance-weighted bound, in nats/dim of the data as they are and in bits/dim of the table's unit."""
    generator = torch.Generator(x.device).manual_seed(0)
    parts = [importance_bound(model, part, samples, generator) for part in x.split(batch)]
    elbo, bound = (float(torch.cat(p).mean()) / model.decomp.numel for p in zip(*parts, strict=True))
    found = {"samples": samples, "elbo": elbo, "bound": bound}
    for name in ("elbo", "bound"):
        found[f"{name}_bits"] = (math.log(unit) - found[name]) / math.log(2)
    return found


def markdown(report: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    name = report["extractor"]
    head = ["method", "N", "MSE", "NLL, nats/dim", "PSNR, dB", "SSIM", f"FID ({name})", "improved", "refused"]
    head += ["ms/image, batch 1", "ms/image, best batch"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in report["rows"]:
        better = "" if "improved" not in r else f"{r['improved']:.0%}"
        cells = [r["method"], str(r["steps"]), f"{r['mse']:.4g} ± {r['mse_standard_error']:.2g}", f"{r['nll']:.3f}"]
        cells += [f"{r['psnr']:.2f}", f"{r['ssim']:.4f}", f"{r['fid']:.3g}", better, f"{r['refused']:.0%}"]
        cells += [f"{r['ms_batch_1']:.1f}", f"{r['ms_best']:.2f} ({r['best_batch']})"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| model | ELBO, nats/dim | bound, K = {report['samples']}, nats/dim | the same, bits/dim |"]
    lines.append("|---|---|---|---|")
    for model, b in report["bounds"].items():
        lines.append(f"| {model} | {b['elbo']:.3f} | {b['bound']:.3f} | {b['bound_bits']:.3f} |")
    about = (
        f"{report['images']} held-out images of {report['label']}, {report['device']}. MSE in ({report['unit']})²; "
        "± is the standard error over images. NLL is −log p(z) over the number of latents. Improved: images of lower "
        "error than from the same model's posterior mean. bits/dim: −log2 of the density, in the unit of the MSE."
    )
    return "\n".join([about, "", *lines]) + "\n"


def draw(report: dict[str, Any]) -> Figure:
    """MSE and NLL against N; amortized inference, which has none, as lines across."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("mse", "nll"), (f"MSE, ({report['unit']})²", "NLL, nats/dim"), strict=True)
    names = list(dict.fromkeys(r["method"] for r in report["rows"]))
    for axes, key, label in panels:
        for i, name in enumerate(names):
            rows = [r for r in report["rows"] if r["method"] == name]
            if rows[0]["steps"]:
                axes.plot([r["steps"] for r in rows], [r[key] for r in rows], marker="o", color=f"C{i}", label=name)
            else:
                axes.axhline(rows[0][key], linestyle="--", color=f"C{i}", label=name)
        axes.set(xlabel="gradient steps N on each latent", ylabel=label)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_yscale("log")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.suptitle(f"{report['label']}, {report['images']} held-out images", fontsize=10)
    return figure


def device_name(device: str) -> str:
    """What the times were taken on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s)"


def main() -> None:
    """Measure every row and write the results."""
    parser = arguments(__doc__)
    parser.add_argument("run", type=Path, help="folder that train.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's archive, or fastMRI's folder")
    parser.add_argument("--label", help="what to call the data in tables (default: the setup's name)")
    parser.add_argument("--vanilla", type=Path, help="run of the vanilla model, refined by a joint gradient")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--images", type=int, default=1000, help="held-out images (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 25, 50], help="numbers of steps N")
    parser.add_argument("--samples", type=int, default=32, help="samples K of the importance-weighted bound")
    parser.add_argument("--features", help="feature extractor for FID: a torch.export file .pt2, or module:name")
    parser.add_argument("--batch", type=int, default=100, help="images in each batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="*", default=[], help="further batch sizes to time, besides 1")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of timing for each point")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        model, setup = load(args.run, args.device)
        vanilla, other = load(args.vanilla, args.device) if args.vanilla else (None, setup)
        if (other.dataset, other.data["size"]) != (setup.dataset, setup.data["size"]):
            raise ValueError(f"{args.vanilla} was trained on other data than {args.run}")
        x = setup.load(args.data, train=False)[: args.images].to(args.device)
        name, features = extractor(args.features)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    args.out.mkdir(parents=True, exist_ok=True)
    (unit_name, unit), models = UNITS[setup.dataset], {"separable": model, **({"vanilla": vanilla} if vanilla else {})}
    report: dict[str, Any] = {
        "label": args.label or f"{setup.dataset}, {setup.data['size']}×{setup.data['size']}",
        "setup": setup.plain(),
        "device": device_name(args.device),
        "torch": torch.__version__,
        "images": len(x),
        "unit": unit_name,
        "extractor": name,
        "samples": args.samples,
        "bounds": {k: bounds(m, x, unit, args.samples, args.batch) for k, m in models.items() if m is not None},
        "rows": [],
    }
    means: dict[int, Tensor] = {}
    batches = sorted({1, *args.batches})
    for method in methods(model, vanilla, sorted(args.steps)):
        row, error = measure(method, x, unit, features.to(args.device), args.batch, batches, args.budget)
        if method.name.endswith("mean"):
            means[id(method.model)] = error
        elif id(method.model) in means:
            row["improved"] = float((error < means[id(method.model)]).float().mean())
        report["rows"].append(row)
        print(f"{method.name:28} N = {method.steps:3d}  MSE {row['mse']:9.4g}  NLL {row['nll']:8.3f}", flush=True)
        write_json(args.out / "results.json", report)
        (args.out / "results.md").write_text(markdown(report), encoding="utf-8")
    draw(report).savefig(args.out / "quality.png", dpi=110)
    refined = MAPRefiner()(model, x[:6])
    progressive(model.decomp, refined.bands, x[:6]).savefig(args.out / "scales.png", dpi=110)


if __name__ == "__main__":
    main()
