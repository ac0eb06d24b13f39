"""Signals that a terminal or a scheduler sends to a whole group of processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import sys, time
import torch
from torch.utils.data import DataLoader
from separable_hvae import fit
from tests.helpers.training import fresh, waves

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 10**5

    def __getitem__(self, index):
        time.sleep(0.002)
        return waves()[index % 40]

def begin(record, model):
    print("step", record["step"], flush=True)

if __name__ == "__main__":
    method, kind, folder = sys.argv[1:]
    torch.multiprocessing.set_start_method(method)
    data = Slow() if kind == "dataset" else DataLoader(Slow(), batch_size=8, num_workers=1)
    options = {"workers": 1} if kind == "dataset" else {}
    report = fit(fresh(), data, steps=10**6, every=1, callback=begin, checkpoint=folder, progress=False, batch_size=8,
                 **options)
    print("ended", report.steps, report.interrupted, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="process groups are those of POSIX")
@pytest.mark.parametrize(
    ("number", "method", "kind"),
    [
        (signal.SIGTERM, "fork", "dataset"),
        (signal.SIGINT, "fork", "loader"),
        (signal.SIGINT, "spawn", "dataset"),
    ],
)
def test_a_signal_to_the_group_ends_the_run_in_order(
    tmp_path: Path, number: signal.Signals, method: str, kind: str
) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    process = subprocess.Popen(
        [sys.executable, str(script), method, kind, str(tmp_path)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "step 3\n":
                break
        time.sleep(0.05)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    last = [line for line in out.splitlines() if line.startswith("ended")]
    assert process.returncode == 0, err
    assert last, err
    assert last[0].split()[2] == "True"
    assert int(last[0].split()[1]) >= 3
    assert err == ""
    assert (tmp_path / "checkpoint.safetensors").exists()
    # None of its processes is left.
    for _ in range(200):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("a process is left")
