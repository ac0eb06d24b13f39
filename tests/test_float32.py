"""What is computed in full stays so, whatever PyTorch has been told to do with float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from separable_hvae import Wavelet2
from separable_hvae._contexts import refcounted
from separable_hvae._float32 import float32, float32_settings, full_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Before PyTorch 2.9 a CPU has no such setting.
WITH_SETTINGS = [CUDA, CPU] if hasattr(torch.backends.cudnn, "conv") else [CUDA]


@pytest.fixture
def user() -> Iterator[None]:
    """A user who wants fast products, and gets PyTorch back as it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_transforms_multiply_exactly_and_leave_the_users_setting(user: None) -> None:
    given = float32_settings()
    for device in WITH_SETTINGS:
        with full_precision(device):
            assert float32_settings() != given
            inside = float32_settings()
            with full_precision(device):
                assert float32_settings() == inside
    assert float32_settings() == given
    assert torch.get_float32_matmul_precision() == "high"


def test_wavelets_multiply_exactly(user: None) -> None:
    seen: list[Any] = []

    class Products(TorchDispatchMode):
        @override
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                seen.append(float32_settings())
            return func(*args, **(kwargs or {}))

    with full_precision(CPU):
        exact = float32_settings()
    decomp = Wavelet2(8, "db4", channels=1)
    with Products():  # type: ignore[no-untyped-call]
        decomp.synthesis(decomp.analysis(torch.ones(1, 1, 8, 8)))
    assert set(seen) == {exact}


def test_full_precision_changes_nothing_that_is_exact() -> None:
    given = float32_settings()
    with full_precision(CUDA):
        assert float32_settings() == given


def test_convolutions_are_exact_around_faster_ones() -> None:
    given = float32_settings()
    with float32(CUDA, "conv"):
        exact = float32_settings()
        with float32(CUDA, "conv", tf32=True):
            assert float32_settings() != exact
        assert float32_settings() == exact
    assert float32_settings() == given != exact


def test_a_device_without_such_settings_has_nothing_to_change() -> None:
    given = float32_settings()
    with float32(torch.device("meta"), "conv", tf32=True):
        assert float32_settings() == given


def test_threads_share_a_change() -> None:
    """It is there for as long as any of them needs it, in whatever order they leave."""
    done: list[str] = []

    @contextmanager
    def change() -> Iterator[None]:
        done.append("made")
        yield
        done.append("undone")

    both, first_left = Barrier(2), Barrier(2)

    def first() -> None:
        with refcounted("test", change):
            both.wait(10)
        first_left.wait(10)

    thread = Thread(target=first)
    thread.start()
    with refcounted("test", change):
        both.wait(10)
        first_left.wait(10)
        assert done == ["made"]
    thread.join()
    assert done == ["made", "undone"]
