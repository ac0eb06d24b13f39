"""Time of a whole hybrid inference (encoder, N steps, decoder), by schedule, execution and batch size.

    python examples/speed/inference.py                                          # a small model on a CPU
    python examples/speed/inference.py --width 128 --layers 5 --size 32 --device cuda \\
        --executions eager step-graphs graphs compiled-graphs --batches 1 16 64 256   # as large as the paper's model
    python examples/speed/inference.py --model runs/best/model                  # a trained one

Without --model, untrained models of RGB signals with Fourier bands. Every execution is warmed up (compiled, recorded)
before it is timed; what that took is reported too. Writes inference.json and inference.md.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from timing import EXECUTIONS, seconds

from separable_hvae import HVAE, FFT2Real, MAPRefiner

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # Before installed packages: one is called evaluate.
from console import arguments, write_json


def table(results: list[dict[str, Any]]) -> str:
    """One line for each combination, with its speed-up over eager execution."""
    eager = {(r["schedule"], r["batch"]): r["median"] for r in results if r["execution"] == "eager"}
    lines = ["| schedule | execution | batch | ms | images/s | over eager | ready after, s |", "|---" * 7 + "|"]
    for r in results:
        base = eager.get((r["schedule"], r["batch"]))
        gain = f"{base / r['median']:.2f}×" if base else "–"
        lines.append(
            f"| {r['schedule']} | {r['execution']} | {r['batch']} | {1e3 * r['median']:.1f} "
            f"| {r['batch'] / r['median']:.1f} | {gain} | {r['ready']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="folder of save_pretrained, instead of the next four options")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2, help="layers of each scale; scales are 1, 2, 4, … size")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--schedules", nargs="+", default=["scale", "parallel", "joint"])
    parser.add_argument("--executions", nargs="+", choices=EXECUTIONS, default=["eager", "compiled"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/inference"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model:
        model = HVAE.from_pretrained(args.model)
    else:
        size, width = args.size, args.width
        model = HVAE(FFT2Real(size), layers=args.layers, width=width, bottleneck=width // 2, blocks=args.blocks)
    model.to(args.device)
    decomp = model.decomp
    dtype = torch.complex64 if decomp.is_complex else torch.float32
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} thread(s)"
    settings = {
        **{k: v for k, v in vars(args).items() if k not in ("out", "model")},
        "device": device,
        "torch": torch.__version__,
    }
    results: list[dict[str, Any]] = []
    for batch in args.batches:
        x = torch.randn(batch, decomp.channels, *decomp.size, dtype=dtype, device=args.device)
        for schedule in args.schedules:
            for execution in args.executions:
                refiner = MAPRefiner(args.steps, schedule=schedule, execution=EXECUTIONS[execution]())
                ready = seconds(refiner, model, x)
                times = [seconds(refiner, model, x) for _ in range(args.repetitions)]
                measured = {"median": statistics.median(times), "low": min(times), "high": max(times), "ready": ready}
                results.append({"schedule": schedule, "execution": execution, "batch": batch, **measured})
                print(table(results).splitlines()[-1], flush=True)
    write_json(args.out / "inference.json", {**settings, "depth": model.depth, "results": results})
    about = f"{device}, L = {model.depth}, N = {args.steps}"
    (args.out / "inference.md").write_text(f"{about}\n\n{table(results)}", encoding="utf-8")


if __name__ == "__main__":
    main()
