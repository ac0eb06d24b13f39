"""Training under SIGKILL: runs of ``examples/train.py`` that are killed, resumed, and compared with one left alone.

    python -m tests.suites.kills --moments 20

Kills take turns. One comes at a moment that is uniform over the time that a run takes; the next in the very writing
of a file, with some share of its bytes on the disk: a checkpoint, there being one after each step, or the model at the
end. What a resumed run leaves must be the same: model, samples and log byte for byte, and of the last checkpoint every
tensor and counter. Only what a clock decides may differ.
"""

import argparse
import json
import os
import random
import signal
import stat
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tests.helpers.images import write_cifar
from tests.helpers.scripts import script

train = script("train")

MICRO = """
dataset = "cifar10"
[data]
size = 8
augment = ["flip"]
[model]
decomposition = "Wavelet2"
scales = [2, 8]
layers = 1
width = 4
bottleneck = 4
blocks = 0
sigma = 0.1
[training]
steps = 30
batch_size = 8
learning_rate = 5e-3
every = 1
checkpoint_every = 0.0
"""


def records(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without what a clock decides."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "signals_per_second"} for r in lines]


def kept(run: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Counters and tensors of a run's checkpoint, without what a clock decides."""
    with safe_open(run / "checkpoint.safetensors", framework="pt") as file:
        counters = {k: v for k, v in json.loads(file.metadata()["counters"]).items() if k != "seconds"}
        return counters, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def same(name: str, run: Path, whole: Path) -> bool:
    """Whether two runs left the same file under this name."""
    if not ((run / name).is_file() and (whole / name).is_file()):
        return False
    if name == "log.jsonl":
        return records(run) == records(whole)
    if name == "checkpoint.safetensors":
        (counters, tensors), (other_counters, others) = kept(run), kept(whole)
        equal = tensors.keys() == others.keys() and all(torch.equal(t, others[k]) for k, t in tensors.items())
        return equal and counters == other_counters
    return (run / name).read_bytes() == (whole / name).read_bytes()


def differences(run: Path, whole: Path) -> list[str]:
    """Names of the files that are not the same, or not there, in both of two runs."""
    names = {str(p.relative_to(folder)) for folder in (run, whole) for p in folder.rglob("*") if p.is_file()}
    return sorted(name for name in names if not same(name, run, whole))


class Sync:
    """Stands in for ``os.fsync``: counts calls, and in one of them dies with a share of the file's bytes written."""

    def __init__(self, last: int = 0, share: float = 1.0) -> None:
        self.last, self.share, self.count, self.fsync = last, share, 0, os.fsync

    def __call__(self, descriptor: int) -> None:
        self.count += 1
        if self.count == self.last:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                os.truncate(descriptor, int(self.share * found.st_size))
            os.kill(os.getpid(), signal.SIGKILL)
        self.fsync(descriptor)


def start(out: Path, sync: Sync) -> int:
    """Begin a run, or go on with one, in a child process; return its number."""
    if process := os.fork():
        return process
    # What has been imported need not be imported again: a run takes a second, not five.
    code = 1
    try:
        errors = os.open(out.with_suffix(".errors"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        os.fsync = sync  # type: ignore[assignment]
        folder = str(out.parent)
        sys.argv = ["train.py", f"{folder}/setup.toml", "--data", folder, "--out", str(out), "--resume", "--cpu"]
        train.main()
        out.with_suffix(".syncs").write_text(str(sync.count))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(process: int) -> int:
    """Wait for a run's exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def finish(out: Path) -> None:
    """Begin a run, or go on with one, and see it through."""
    if end(start(out, Sync())):
        raise SystemExit(f"training failed:\n{out.with_suffix('.errors').read_text()}")


def main() -> None:
    """Print one line for each kill; exit with an error if a resumed run ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="kills, each of a run of its own")
    parser.add_argument("--seed", type=int, help="of the moments; others each time without")
    args = parser.parse_args()
    torch.set_num_threads(1)
    drawn, bad, done, tried = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cifar(folder, n=20)
        (folder / "setup.toml").write_text(MICRO)
        begin = time.perf_counter()
        finish(folder / "whole")
        seconds, syncs = time.perf_counter() - begin, int((folder / "whole.syncs").read_text())
        while done < args.moments:
            tried += 1
            out = folder / f"run-{tried}"
            if done % 2:
                number, share = drawn.randint(1, syncs), drawn.random()
                process = start(out, Sync(number, share))
                what = f"in write {number:2} of {syncs}, {share:4.0%} of its bytes there"
            else:
                moment = drawn.uniform(0, seconds)
                process = start(out, Sync())
                time.sleep(moment)
                os.kill(process, signal.SIGKILL)
                what = f"after {moment:.2f} of {seconds:.2f} s"
            if end(process) != -signal.SIGKILL:
                continue  # This run was faster than the first one and had ended.
            done += 1
            log = out / "log.jsonl"
            line = (
                f"{done:3}  killed {what:44} {log.read_text().count(chr(10)) if log.exists() else 0:3} records, then "
            )
            finish(out)
            wrong = differences(out, folder / "whole")
            bad += bool(wrong)
            print(line + (f"other: {', '.join(wrong)}" if wrong else "the same"), flush=True)
    print(f"{done} kills, {bad} resumed runs that ended otherwise")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
