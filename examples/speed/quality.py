"""Quality against time: what each schedule and update rule reaches, and when.

    python examples/speed/quality.py --out runs/quality                                     # digits
    python examples/speed/quality.py --cifar10 cifar-10-batches-bin --out runs/quality-cifar   # at 16×16

Trains a separable model with Haar bands, one with Fourier bands and a vanilla one for the same time (or
takes them from --models), tunes each method's step size on one half of the held-out images, and reports
the other half: 8-bit MSE, −log p(z) per latent and the MAP objective after N steps, with the paired
standard error of the difference from joint Adam, and the median time at the batch size asked for, all
methods being timed in turns.
Writes quality.json, quality.md, quality.png and guidance.png.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from timing import seconds
from torch import Tensor

from separable_hvae import HVAE, Decomposition, FFT2Real, Identity, MAPRefiner, Result, Wavelet2, fit

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # Before installed packages: one is called evaluate.
from console import arguments, write_json
from data import cifar10, digits

MODELS: dict[str, type[Decomposition]] = {"Haar": Wavelet2, "Fourier": FFT2Real, "vanilla": Identity}
GAUSS_NEWTON = {"schedule": "joint", "rule": "gauss-newton"}
METHODS: dict[str, dict[str, Any]] = {
    "latent": {"schedule": "latent"},
    "scale": {"schedule": "scale"},
    "parallel": {"schedule": "parallel"},
    "joint": {"schedule": "joint"},
    "combined": {"schedule": "combined"},
    "joint, Gauss–Newton": GAUSS_NEWTON,
    "combined, Gauss–Newton": {"schedule": "combined", "rule": "gauss-newton"},
}
VANILLA = ["joint", "joint, Gauss–Newton"]
REFERENCE = {"schedule": "joint", "step_size": 0.06}
STEPS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25]
SIZES = [0.01, 0.03, 0.06, 0.1]
GUIDANCE = [0.1, 0.3, 1.0, 3.0, 10.0]
SIGMA = 0.05


@dataclass
class Setting:
    """A trained model with its held-out images."""

    name: str
    model: HVAE
    tuning: Tensor
    reporting: Tensor


def trained(name: str, train: Tensor, seconds: float, folder: Path) -> HVAE:
    """The model of this name from the folder, else trained for ``seconds`` of CPU time."""
    path = folder / name.lower()
    if path.exists():
        return HVAE.from_pretrained(path)
    torch.manual_seed(0)
    decomp = MODELS[name](train.shape[-1], channels=train.shape[1])
    model = HVAE(decomp, layers=3, width=32, bottleneck=16, blocks=1, sigma=SIGMA)
    model.to(memory_format=torch.channels_last)
    fit(model, train, time_budget=seconds, batch_size=32, learning_rate=8e-3, clock=time.process_time)
    model.save_pretrained(path)
    return HVAE.from_pretrained(path)


def numbers(result: Result, x: Tensor) -> dict[str, Tensor]:
    """8-bit MSE, −log p(z) per latent and the MAP objective of each image."""
    assert result.objective is not None
    mse = (result.reconstruction - x).square().flatten(1).mean(1) * 127.5**2
    return {"mse": mse, "nll": result.nll / sum(z[0].numel() for z in result.latents), "objective": result.objective}


def time_in_turns(setting: Setting, methods: dict[str, dict[str, Any]], few: Tensor, repetitions: int) -> None:
    """Median wall time of every point, from rounds through all of them: what slows the machine meets each method."""
    timed = [
        (point, MAPRefiner(point["steps"], **method["options"]))
        for method in methods.values()
        for point in method["points"]
    ]
    rounds = [[seconds(refiner, setting.model, few) for _, refiner in timed] for _ in range(repetitions + 1)]
    # The first round warms up.
    for (point, _), times in zip(timed, zip(*rounds[1:], strict=True), strict=True):
        point["seconds"] = statistics.median(times)


def tuned(setting: Setting, options: dict[str, Any]) -> dict[str, Any]:
    """Options with the step size that gives the lowest objective after 25 steps on the tuning half."""
    if options.get("rule") == "gauss-newton":
        return options
    reached = {}
    for size in SIZES:
        result = MAPRefiner(25, step_size=size, **options)(setting.model, setting.tuning)
        reached[size] = float(numbers(result, setting.tuning)["objective"].mean())
    return {**options, "step_size": min(reached, key=reached.__getitem__)}


def curve(
    setting: Setting, options: dict[str, Any], reference: dict[str, Tensor], steps: Sequence[int]
) -> dict[str, Any]:
    """A method with what each number of steps reaches on the reporting half."""
    model, x = setting.model, setting.reporting
    points = []
    for count in steps:
        result = MAPRefiner(count, **options)(model, x)
        point: dict[str, Any] = {"steps": count}
        for name, values in numbers(result, x).items():
            difference = values - reference[name]
            point[name] = float(values.mean())
            point[f"{name}_difference"] = float(difference.mean())
            point[f"{name}_error"] = float(difference.std() / len(difference) ** 0.5)
        assert result.refused is not None
        point["refused"] = int(result.refused.sum())
        points.append(point)
    return {"options": options, "points": points}


def time_to(points: list[dict[str, Any]], name: str, goal: float) -> float | None:
    """The first measured time at which a curve is at or below a goal."""
    return next((p["seconds"] for p in points if p[name] <= goal), None)


def trade(setting: Setting, options: dict[str, Any]) -> list[dict[str, float]]:
    """MSE against NLL as guidance varies."""
    points = []
    for beta in GUIDANCE:
        measured = numbers(
            MAPRefiner(25, guidance=beta, **options)(setting.model, setting.reporting), setting.reporting
        )
        points.append({"guidance": beta, "mse": float(measured["mse"].mean()), "nll": float(measured["nll"].mean())})
    return points


def table(curves: dict[str, dict[str, Any]]) -> str:
    """One line for each model and method."""
    lines = [
        "| model | method | step size | MSE at N = 25 | against joint Adam 0.06 | nats/latent | J | ms at N = 25 "
        "| ms to joint's J | ms to joint's MSE |",
        "|---" * 10 + "|",
    ]
    for model, methods in curves.items():
        (goal,) = methods["reference"]["points"]
        for name, method in methods.items():
            if name == "reference":
                continue
            at = next(p for p in method["points"] if p["steps"] == 25)
            reached = [time_to(method["points"], column, goal[column]) for column in ("objective", "mse")]
            first, second = (f"{1e3 * t:.0f} ({goal['seconds'] / t:.1f}×)" if t is not None else "–" for t in reached)
            lines.append(
                f"| {model} | {name} | {method['options'].get('step_size', '–')} | {at['mse']:.2f} "
                f"| {at['mse_difference']:+.2f} ± {at['mse_error']:.2f} | {at['nll']:.3f} | {at['objective']:.2f} "
                f"| {1e3 * at['seconds']:.0f} | {first} | {second} |"
            )
        lines.append(
            f"| {model} | *joint, Adam 0.06* | 0.06 | {goal['mse']:.2f} | | {goal['nll']:.3f} "
            f"| {goal['objective']:.2f} | {1e3 * goal['seconds']:.0f} | | |"
        )
    return "\n".join(lines) + "\n"


def draw(curves: dict[str, dict[str, Any]], title: str) -> Figure:
    """MSE, NLL and objective above that of the best point, against time."""
    figure = Figure(figsize=(12, 3.4 * len(curves)), layout="constrained")
    grid = figure.subplots(len(curves), 3, squeeze=False)
    labels = {"mse": "MSE, 8 bit", "nll": "−log p(z), nats/latent", "objective": "J − lowest J, nats"}
    for row, (model, methods) in zip(grid, curves.items(), strict=True):
        runs = {name: m["points"] for name, m in methods.items() if name != "reference"}
        lowest = min(p["objective"] for points in runs.values() for p in points)
        for axes, (column, label) in zip(row, labels.items(), strict=True):
            for name, points in runs.items():
                color = f"C{list(METHODS).index(name)}"
                shift = lowest - 0.02 if column == "objective" else 0.0
                times = [1e3 * p["seconds"] for p in points]
                axes.plot(times, [p[column] - shift for p in points], ".-", color=color, label=name)
            axes.set(xlabel="ms", ylabel=label, xscale="log", title=model)
            if column != "nll":
                axes.set_yscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3, which="both")
        row[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


def draw_trade(trades: dict[str, list[dict[str, float]]], amortized: dict[str, dict[str, float]]) -> Figure:
    """MSE against NLL as guidance varies, with the amortized mean."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for model, points in trades.items():
        (line,) = axes.plot([p["nll"] for p in points], [p["mse"] for p in points], ".-", label=f"{model}, refined")
        for p in points:
            axes.annotate(f"β={p['guidance']:g}", (p["nll"], p["mse"]), fontsize=6)
        start = amortized[model]
        axes.plot(start["nll"], start["mse"], "x", color=line.get_color(), label=f"{model}, amortized mean")
    axes.set(xlabel="−log p(z), nats/latent", ylabel="MSE, 8 bit", yscale="log")
    figure.legend(loc="outside right upper", fontsize=7)
    axes.grid(alpha=0.3, which="both")
    return figure


def main() -> None:
    """Train what is missing, tune, measure, write."""
    parser = arguments(__doc__)
    parser.add_argument("--cifar10", type=Path, help="unpacked archive cifar-10-batches-bin, instead of digits")
    parser.add_argument("--seconds", type=float, default=90, help="CPU seconds of training for each model")
    parser.add_argument("--models", type=Path, help="folder of trained models (default: OUT/models)")
    parser.add_argument("--held-out", type=int, default=200, help="images, half to tune on and half to report")
    parser.add_argument("--batch", type=int, default=1, help="images in each timed call")
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls for each point")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.cifar10:
        train, held_out = (cifar10(args.cifar10, train=t, side=16) for t in (True, False))
    else:
        x = digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
        train, held_out = x[:1400], x[1400:]
    half = args.held_out // 2
    curves: dict[str, dict[str, Any]] = {}
    trades, amortized = {}, {}
    for name in MODELS:
        model = trained(name, train, args.seconds, args.models or args.out / "models")
        setting = Setting(name, model, held_out[:half], held_out[half : 2 * half])
        few = setting.reporting[: args.batch]
        reference = numbers(MAPRefiner(25, **REFERENCE)(model, setting.reporting), setting.reporting)
        curves[name] = {"reference": curve(setting, REFERENCE, reference, [25])}
        for method in VANILLA if name == "vanilla" else METHODS:
            curves[name][method] = curve(setting, tuned(setting, METHODS[method]), reference, STEPS)
            print(f"{name}, {method}: {curves[name][method]['points'][-1]['mse']:.2f}", flush=True)
        time_in_turns(setting, curves[name], few, args.repetitions)
        trades[name] = trade(setting, GAUSS_NEWTON)
        amortized[name] = curves[name]["joint"]["points"][0]
    title = f"CPU, {args.threads} thread(s), batch {args.batch}; {'CIFAR-10 at 16×16' if args.cifar10 else 'digits'}"
    settings = {"torch": torch.__version__, "title": title, "seconds": args.seconds, "held_out": args.held_out}
    write_json(args.out / "quality.json", {**settings, "curves": curves, "guidance": trades})
    (args.out / "quality.md").write_text(table(curves), encoding="utf-8")
    print(table(curves))
    draw(curves, title).savefig(args.out / "quality.png", dpi=130)
    draw_trade(trades, amortized).savefig(args.out / "guidance.png", dpi=130)


if __name__ == "__main__":
    main()
