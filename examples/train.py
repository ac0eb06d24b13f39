"""Train one of the setups of examples/cifar10 and examples/fastmri, on a CPU, a GPU or many.

    python examples/train.py examples/cifar10/best.toml --data cifar-10-binary.tar.gz --out runs/best
    python examples/train.py examples/cifar10/best.toml --tiny --time-budget 4m --data … --out runs/best-tiny
    accelerate launch examples/train.py examples/fastmri/paper.toml --data … --out … --precision bf16

Writes into OUT: setup.json, log.jsonl (losses, KL per layer, active units, residual per band, gradient norm,
images/s), samples/, checkpoint.safetensors, and model/ for HVAE.from_pretrained. Ctrl-C and SIGTERM stop
after the step at hand; --resume goes on as if nothing had happened.
"""

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from console import arguments, write_json
from PIL import Image
from setups import Setup, read
from torch import Tensor

from separable_hvae import HVAE, FitReport, fit

HELD_OUT = 512  # Images that are evaluated now and then.
UNITS = {"s": 1, "m": 60, "h": 3600}


def duration(text: str) -> float:
    """Seconds of a duration such as ``90s``, ``9m`` or ``1h30m``."""
    if not re.fullmatch(r"(\d+(\.\d+)?[smh])+", text):
        raise argparse.ArgumentTypeError(f"a duration is like 90s, 9m or 1h30m, got {text!r}")
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smh])", text))


def grid(images: Tensor, columns: int = 8) -> Image.Image:
    """Tile images ``(N, C, H, W)``, real ones in [-1, 1] and complex ones as magnitudes, into a picture."""
    x = images.abs() / images.abs().amax().clamp_min(1e-12) if images.is_complex() else (images + 1) / 2
    x = x[: len(x) - len(x) % columns].unflatten(0, (-1, columns)).cpu()
    pixels = np.uint8(255 * x.clamp(0, 1).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy())
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def train(setup: Setup, source: Path, out: Path, accelerator: Accelerator, **options: Any) -> tuple[HVAE, FitReport]:
    """Train a setup; ``options`` go before what the setup says.

    Returns:
        The model, with the averaged weights, and the report.
    """
    wanted = {**setup.training, **options}
    data, heldout = setup.load(source, train=True), setup.load(source, train=False)[:HELD_OUT]
    epochs = wanted.pop("epochs", None)
    if epochs is not None and not wanted.get("steps") and not wanted.get("time_budget"):
        batch = wanted.get("batch_size", inspect.signature(fit).parameters["batch_size"].default)
        wanted["steps"] = max(1, round(epochs * (len(data) // (batch * accelerator.num_processes))))
    torch.manual_seed(wanted.get("seed", 0))
    model = setup.build()

    def show(record: dict[str, Any], average: HVAE) -> None:
        if "heldout_loss" not in record:
            return
        here = torch.Generator(average.device).manual_seed(0)
        (out / "samples").mkdir(exist_ok=True)
        grid(average.sample(64, generator=here)).save(out / "samples" / f"step-{record['step']:07d}.png")
        held = {k.removeprefix("heldout_"): v for k, v in record.items() if k.startswith("heldout_")}
        print(
            f"step {record['step']}: held out −ELBO {held['loss']:.3f} nats/dim, "
            f"MSE of the mean {held['mse_mean']:.5f}, {held['active_units']} of {held['units']} units active",
            flush=True,
        )

    report = fit(
        model,
        data,
        heldout=heldout,
        augment=setup.augment(),
        checkpoint=out,
        log=out / "log.jsonl",
        callback=show,
        settings={"setup": setup.plain()},
        progress=sys.stderr is not None and sys.stderr.isatty(),
        accelerator=accelerator,
        **wanted,
    )
    return model, report


def main() -> None:
    """Read the arguments, train, save."""
    parser = arguments(__doc__)
    parser.add_argument("setup", type=Path, help="configuration file")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's archive, or fastMRI's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; many machines must all see it")
    parser.add_argument("--tiny", action="store_true", help="the setup's twin for a CPU")
    parser.add_argument("--resume", action="store_true", help="go on from OUT's checkpoint, if there is one")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the setup's epochs")
    parser.add_argument("--time-budget", type=duration, help="train this long in all, over interruptions: 90s, 9m, 2h")
    parser.add_argument("--batch-size", type=int, help="images in each step of each process")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="mixed precision")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--seed", type=int, help="instead of the setup's own, or 0")
    args = parser.parse_args()
    if torch.cuda.is_available() and not args.cpu:
        torch.backends.cudnn.benchmark = True  # Inputs keep their size.
        torch.set_float32_matmul_precision("high")
    given = {"steps": args.steps, "time_budget": args.time_budget, "batch_size": args.batch_size, "seed": args.seed}
    try:
        setup = read(args.setup, tiny=args.tiny)
        if (args.out / "checkpoint.safetensors").exists() and not args.resume:
            raise ValueError(f"{args.out} holds a run already: add --resume, or take another folder")
        args.out.mkdir(parents=True, exist_ok=True)
        accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.precision)
        options = {k: v for k, v in given.items() if v is not None}
        model, report = train(setup, args.data, args.out, accelerator, **options)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    if accelerator.is_main_process:
        model.save_pretrained(args.out / "model")
        write_json(args.out / "setup.json", setup.plain())
        print(f"{report.steps} steps in {report.seconds:.0f} s; {args.out / 'model'} holds the averaged weights")
    if report.interrupted:
        raise SystemExit(f"{parser.prog}: stopped at step {report.steps}; --resume goes on")


if __name__ == "__main__":
    main()
