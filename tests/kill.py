"""Training that is killed again and again, and goes on each time, against a run that is left alone.

    python -m tests.kill --times 20

SIGKILL strikes at random moments, while steps are taken and while checkpoints are written, which happens
after every step. In the end both runs must hold the same weights, bit for bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from separable_hvae import FFT1Real, fit
from tests.test_hvae import tiny

ROOT = Path(__file__).resolve().parents[1]
STEPS = 1200
LONGEST = 0.25  # Seconds of training before a kill.


def train(folder: Path) -> None:
    """Train, or go on training, and leave the weights in ``folder``; say when the first batch is taken."""
    torch.set_num_threads(1)
    begun = False

    def say(x: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal begun
        if not begun:
            sys.stdout.write("begun\n")
            sys.stdout.flush()
            begun = True
        return x + 0.01 * torch.randn(x.shape, generator=generator)

    model = tiny(FFT1Real(4, scales=[1, 4]), perturbed=False, layers=1)
    data = torch.randn(40, 1, 4, generator=torch.Generator().manual_seed(0))
    options = {"checkpoint": folder, "checkpoint_every": 0.0, "augment": say, "progress": False}
    fit(model, data, steps=STEPS, batch_size=8, **options)  # type: ignore[arg-type]
    save_file(dict(model.state_dict()), folder / "final")


def start(folder: Path) -> "subprocess.Popen[str]":
    """A process that trains in ``folder``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "tests.kill", "--run", str(folder)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: "subprocess.Popen[str]", folder: Path) -> dict[str, Tensor]:
    """The weights of a process that is left alone."""
    _, error = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(error)
    return load_file(folder / "final")


def killed_and_resumed(times: int, seed: int = 0) -> tuple[int, bool]:
    """Kill a run up to ``times`` times; return how often it was, and whether it ended as the one left alone."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        alone, struck = Path(place) / "alone", Path(place) / "struck"
        alone.mkdir()
        struck.mkdir()
        expected = finish(start(alone), alone)
        kills = 0
        while kills < times:
            process = start(struck)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0, LONGEST))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if process.returncode == 0:
                break
            kills += 1
        found = finish(start(struck), struck)
    return kills, expected.keys() == found.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def main() -> None:
    """Train in a folder, or kill and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        train(args.run)
        return
    kills, same = killed_and_resumed(args.times)
    print(f"killed {kills} times; weights {'bit-identical' if same else 'DIFFER'}")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
