"""Time and memory of one gradient step on every latent, against depth (the paper's Fig. 2).

    python examples/speed/depth.py --out runs/depth                     # depth by layers of each of 6 scales
    python examples/speed/depth.py --by scales --out runs/depth-scales  # depth by number of scales, 5 layers each

Measures in one process and in turns (a round through all methods, then the next), on untrained models of
32×32 RGB signals: eq. 4 latent by latent (the vanilla model), a joint gradient through the whole decoder,
and every schedule of the separable model. One step's time is (t(1 + n steps) − t(1 step)) / n, so what a
refinement does once is not counted.
Memory is what autograd keeps for the backward pass of the largest problem, weights aside, on any device.
Writes depth.json and depth.png.
"""

import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from timing import EXECUTIONS, seconds
from torch import Tensor

from separable_hvae import HVAE, Decomposition, FFT2Real, Identity, MAPRefiner
from separable_hvae.refine import Eager

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # Before installed packages: one is called evaluate.
from console import arguments, write_json

SIDE = 32
METHODS: dict[str, tuple[type[Decomposition], dict[str, Any]]] = {
    "eq. 4, latent by latent (vanilla)": (Identity, {"schedule": "latent"}),
    "joint (vanilla)": (Identity, {"schedule": "joint"}),
    "Algorithm 1": (FFT2Real, {"schedule": "latent"}),
    "scale": (FFT2Real, {"schedule": "scale"}),
    "parallel": (FFT2Real, {"schedule": "parallel"}),
    "joint": (FFT2Real, {"schedule": "joint"}),
    "joint, Gauss–Newton": (FFT2Real, {"schedule": "joint", "rule": "gauss-newton"}),
}
SLOW = 1.0  # Seconds.
SCALES = [32, 16, 8, 4, 2, 1, 24, 12, 6, 3]  # Taken in this order where depth is the number of scales.


class Stopwatch:
    """Times of one step of a method on a model.

    Args:
        model: The model.
        options: Of the refiner.
        x: Signals.
    """

    def __init__(self, model: HVAE, options: dict[str, Any], x: Tensor) -> None:
        self.model, self.x = model, x
        one = MAPRefiner(steps=1, **options)
        one(model, x)  # What is compiled or recorded is so on first use.
        slow = seconds(one, model, x) > SLOW
        # Fast steps need more of them for a difference well above the clock's and the machine's noise.
        self.more = 2 if slow else 8
        self.one, self.many = one, MAPRefiner(steps=1 + self.more, **options)
        if not isinstance(self.many.execution, Eager):
            self.many(model, x)
        self.times: list[float] = []
        self.spent = 0.0

    def measure(self) -> None:
        """Take one more time."""
        short, long = (seconds(refiner, self.model, self.x) for refiner in (self.one, self.many))
        self.times.append((long - short) / self.more)
        self.spent += short + long

    def summary(self) -> dict[str, Any]:
        """Median and range."""
        times = self.times
        return {"median": statistics.median(times), "low": min(times), "high": max(times), "repetitions": len(times)}


def measure_in_turns(watches: Sequence[Stopwatch], budget: float, most: int) -> None:
    """Go through the methods in rounds, each until its seconds are spent or it has been measured often enough."""
    while due := [w for w in watches if not w.times or (len(w.times) < most and w.spent < budget)]:
        for watch in due:
            watch.measure()


def kept_bytes(model: HVAE, options: dict[str, Any], x: Tensor) -> int:
    """Most bytes that the backward pass of one step needs, weights aside."""
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    most = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def done(_: Any) -> None:
        nonlocal most
        most = max(most, sum(kept.values()))
        kept.clear()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        MAPRefiner(steps=1, **options, execution=Eager(threads=1))(model, x, callback=done)
    return most


def draw(results: list[dict[str, Any]], title: str) -> Figure:
    """Time and memory against depth, with the laws that they should follow."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(r["method"] for r in results):
        runs = [r for r in results if r["method"] == name]
        depth = [r["depth"] for r in runs]
        left.loglog(depth, [1e3 * r["median"] for r in runs], marker="o", label=name)
        left.fill_between(depth, [1e3 * r["low"] for r in runs], [1e3 * r["high"] for r in runs], alpha=0.2)
        right.loglog(depth, [r["bytes"] / 2**20 for r in runs], marker="o", label=name)
    depths = sorted({r["depth"] for r in results})
    law(left, results, "eq. 4, latent by latent (vanilla)", "median", 1e3, 2, "∝ L²")
    law(left, results, "scale", "median", 1e3, 1, "∝ L")
    law(right, results, "joint", "bytes", 2**-20, 1, "∝ L")
    for axes in (left, right):
        axes.set_xticks(depths, [str(d) for d in depths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3, which="both")
        axes.set_xlabel("stochastic layers L")
    left.set(ylabel="one step on every latent, ms", title=title)
    right.set(ylabel="kept for the backward pass, MiB")
    left.legend(fontsize=7)
    return figure


def law(axes: Axes, results: list[dict[str, Any]], name: str, column: str, unit: float, power: int, label: str) -> None:
    """A dotted line through a method's last point, with the slope that theory gives it."""
    runs = [r for r in results if r["method"] == name]
    if len(runs) > 1:
        depth = [runs[0]["depth"], runs[-1]["depth"]]
        end = unit * runs[-1][column]
        axes.loglog(depth, [end * (d / depth[1]) ** power for d in depth], ":", color="0.4", linewidth=1)
        axes.annotate(label, (depth[0], end * (depth[0] / depth[1]) ** power), fontsize=7, color="0.4")


def main() -> None:
    """Measure and draw."""
    parser = arguments(__doc__)
    parser.add_argument("--by", choices=["layers", "scales"], default="layers", help="what makes models deeper")
    parser.add_argument("--depths", type=int, nargs="+", help="layers of each of 6 scales, or numbers of scales")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=10, help="seconds for each point, one repetition at least")
    parser.add_argument("--repetitions", type=int, default=7, help="of each point, if the budget allows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--executions", nargs="+", choices=EXECUTIONS, default=["eager"])
    parser.add_argument("--workers", type=int, help="threads that share the scales of a step; those of --threads")
    parser.add_argument("--out", type=Path, default=Path("runs/depth"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    x = torch.randn(args.batch, 3, SIDE, SIDE, device=args.device)
    device = torch.cuda.get_device_name() if x.is_cuda else f"CPU, {args.threads} thread(s)"
    settings = {**{k: v for k, v in vars(args).items() if k != "out"}, "device": device, "torch": torch.__version__}
    title = f"{device}, batch {args.batch}, width {args.width}"
    results: list[dict[str, Any]] = []
    shared = {} if args.workers is None else {"threads": args.workers}
    for number in args.depths or ([1, 2, 4, 8, 12, 27] if args.by == "layers" else [1, 2, 4, 6, 8, 10]):
        by_layers = args.by == "layers"
        scales = sorted(SCALES[: 6 if by_layers else number])
        models = {
            kind: HVAE(
                kind(SIDE), scales, layers=number if by_layers else 5, width=args.width, bottleneck=args.width // 2
            )
            for kind in (Identity, FFT2Real)
        }
        watches: dict[tuple[str, str], Stopwatch] = {}
        for name, execution in product(args.methods, args.executions):
            kind, options = METHODS[name]
            model = models[kind].to(args.device)
            watches[name, execution] = Stopwatch(model, {**options, "execution": EXECUTIONS[execution](**shared)}, x)
        measure_in_turns(list(watches.values()), args.budget, args.repetitions)
        for (name, execution), watch in watches.items():
            depth, kept = watch.model.depth, kept_bytes(watch.model, METHODS[name][1], x)
            label = name if len(args.executions) == 1 else f"{name}, {execution}"
            results.append({"method": label, "depth": depth, "scales": len(scales), **watch.summary(), "bytes": kept})
            median = 1e3 * results[-1]["median"]
            print(f"L = {depth:4d}  {label:36} {median:10.1f} ms {kept / 2**20:9.2f} MiB", flush=True)
        write_json(args.out / "depth.json", {**settings, "results": results})
    draw(results, title).savefig(args.out / "depth.png", dpi=160)


if __name__ == "__main__":
    main()
