"""Compare the choices that the paper leaves open, at equal training time.

    python examples/defaults.py --out runs/defaults [--cifar10 cifar-10-batches-bin]

For vanilla (Identity), Fourier and Haar bands, both heads, with and without what is missing of the target band as the
posterior's input: held-out ½·SE/σ² + KL in nats/dim, several seeds, on digits and on CIFAR-10 at 16×16.
Time is each process's own CPU time on one thread, so runs beside each other do not count against one
another. Writes results.json and results.md; finished runs in results.json are not repeated.
"""

import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

import torch
from console import arguments, read_json, write_json
from data import cifar10, digits
from torch import Tensor

from separable_hvae import HVAE, FFT2Real, Identity, Wavelet2, evaluate, fit

DECOMPOSITIONS = {"Identity": Identity, "FFT2Real": FFT2Real, "Wavelet2": Wavelet2}
CONFIGURATIONS = [
    ("Identity", "grid", False),
    *product(["FFT2Real", "Wavelet2"], ["grid", "coefficient"], [False, True]),
]
BEST = [("Identity", "grid", False), ("Wavelet2", "grid", True)]
SIGMA = 0.1


def load(dataset: str, folder: Path | None) -> tuple[Tensor, Tensor]:
    """Training and held-out images."""
    if dataset == "digits":
        x = digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
        return x[:1500], x[1500:]
    assert folder is not None
    return cifar10(folder, train=True, side=16), cifar10(folder, train=False, side=16)[:1000]


def run(
    dataset: str, folder: Path | None, name: str, head: str, band: bool, seed: int, seconds: float
) -> dict[str, Any]:
    """Train one model for ``seconds`` of CPU time and measure it."""
    torch.set_num_threads(1)
    train, held_out = load(dataset, folder)
    torch.manual_seed(seed)
    decomp = DECOMPOSITIONS[name](train.shape[-1], channels=train.shape[1])
    model = HVAE(decomp, layers=3, width=32, bottleneck=16, blocks=1, head=head, sigma=SIGMA, band_input=band)
    model.to(memory_format=torch.channels_last)
    report = fit(
        model,
        train,
        time_budget=seconds,
        batch_size=32,
        learning_rate=0.008,
        seed=seed,
        progress=False,
        clock=time.process_time,
    )
    measured = evaluate(model, held_out)
    settings = {
        "dataset": dataset,
        "decomposition": name,
        "head": head,
        "band_input": band,
        "seed": seed,
        "seconds": seconds,
    }
    return {**settings, "steps": report.steps, **measured}


def table(results: Iterable[dict[str, Any]]) -> str:
    """Mean and spread over seeds, one line for each configuration."""
    lines = [
        "| data | bands | head | target band | ½·SE/σ² + KL, nats/dim | MSE of the mean, 8 bit | steps |",
        "|---" * 7 + "|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["dataset"], r["decomposition"], r["head"], r["band_input"]), []).append(r)
    for (dataset, name, head, band), runs in sorted(groups.items()):
        objective = [r["objective"] for r in runs]
        spread = statistics.stdev(objective) if len(objective) > 1 else 0.0
        error = statistics.mean(r["mse_mean"] for r in runs) * 127.5**2
        steps = statistics.mean(r["steps"] for r in runs)
        seen = "yes" if band else "no"
        measured = f"{statistics.mean(objective):.2f} ± {spread:.2f} | {error:.0f} | {steps:.0f}"
        lines.append(f"| {dataset} | {name} | {head} | {seen} | {measured} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--cifar10", type=Path, help="unpacked archive cifar-10-batches-bin")
    parser.add_argument(
        "--seconds", type=float, default=30, help="CPU seconds of training on digits; 1.5 times that on CIFAR-10"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--best", action="store_true", help="only the vanilla model and the best separable one")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    results: list[dict[str, Any]] = read_json(path) if path.exists() else []
    keys = ("dataset", "decomposition", "head", "band_input", "seed", "seconds")
    done = {tuple(r[k] for k in keys) for r in results}
    datasets = ["digits", *(["cifar10"] if args.cifar10 else [])]
    chosen = BEST if args.best else CONFIGURATIONS
    budget = {"digits": args.seconds, "cifar10": 1.5 * args.seconds}
    wanted = [(d, *c, seed, budget[d]) for seed in range(args.seeds) for d in datasets for c in chosen]
    missing = [w for w in wanted if w not in done]
    with ProcessPoolExecutor(args.processes) as pool:
        futures = [pool.submit(run, w[0], args.cifar10, *w[1:]) for w in missing]
        for i, future in enumerate(as_completed(futures), 1):
            results.append(future.result())
            write_json(path, results)
            print(f"{i}/{len(futures)}", {k: results[-1][k] for k in (*keys, "objective")}, flush=True)
    (args.out / "results.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
