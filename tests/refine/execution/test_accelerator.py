"""Everything stays on one device, and inferences can be recorded."""

import subprocess
import sys

import pytest
from torch.utils import backend_registration


def test_all_on_a_pretended_accelerator() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("needs a PyTorch that can pretend a device")
    # In a process of its own: a kind of device cannot be taken back.
    done = subprocess.run(
        [sys.executable, "-m", "tests.suites.accelerator"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
