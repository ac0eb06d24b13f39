"""Several processes: data-parallel gradients, and what an import brings along."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = {
    "accelerate",
    "deepinv",
    "h5py",
    "huggingface_hub",
    "hypothesis",
    "matplotlib",
    "PIL",
    "pytest",
    "sklearn",
    "torchvision",
}


def start(*command: str, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        [sys.executable, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    finish(start("-m", "tests.suites.gloo", str(tmp_path / "one")))
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2"}
    pair = [start("-m", "tests.suites.gloo", str(tmp_path / "two"), RANK=r, LOCAL_RANK=r, **group) for r in "01"]
    for process in pair:
        finish(process)
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys()
    assert len(one) > 3 * 10
    assert any(bool(g.abs().max() > 1e-3) for g in one.values())
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-9, atol=1e-12)


def test_importing_brings_in_no_extra() -> None:
    seen = "import sys, {}; print(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    without, with_it = (
        set(finish(start("-c", seen.format(name))).split()) for name in ("torch", "torch, separable_hvae")
    )
    brought = with_it - without
    assert "separable_hvae" in brought
    assert not brought & EXTRAS
