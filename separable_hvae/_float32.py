"""How exactly PyTorch computes in float32, whatever the caller has set: autocast, and TF32 where it multiplies."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from separable_hvae._contexts import HELD, refcounted

P = ParamSpec("P")
R = TypeVar("R")
Operation = Literal["matmul", "conv"]
_FLAG: str
_EXACT: tuple[Any, ...]
_TF32: Any
_BACKENDS: dict[tuple[str, str], Any]
_cuda, _cudnn, _cpu = (cast(Any, getattr(torch.backends, name)) for name in ("cuda", "cudnn", "mkldnn"))
if hasattr(_cudnn, "conv"):
    _FLAG, _EXACT, _TF32 = "fp32_precision", ("ieee", "none"), "tf32"
    _BACKENDS = {
        ("cuda", "matmul"): _cuda.matmul,
        ("cuda", "conv"): _cudnn.conv,
        ("cpu", "matmul"): _cpu.matmul,
        ("cpu", "conv"): _cpu.conv,
    }
else:  # Before PyTorch 2.9. Later versions raise an error where both kinds of flags have been used.
    _FLAG, _EXACT, _TF32 = "allow_tf32", (False,), True
    _BACKENDS = {("cuda", "matmul"): _cuda.matmul, ("cuda", "conv"): _cudnn}


def float32_settings() -> Hashable:
    """How PyTorch multiplies matrices and convolves in float32, in the whole process: equal where it is the same."""
    return tuple(getattr(backend, _FLAG) for backend in _BACKENDS.values())


def float32(device: torch.device, operation: Operation, *, tf32: bool = False) -> AbstractContextManager[None]:
    """Context in which an operation in float32 is exact to rounding, or uses TF32, in the whole process."""
    key = device.type, operation
    if key not in _BACKENDS:
        return nullcontext()

    @contextmanager
    def changed() -> Iterator[None]:
        backend = _BACKENDS[key]
        before = getattr(backend, _FLAG)
        setattr(backend, _FLAG, _TF32 if tf32 else _EXACT[0])
        try:
            yield
        finally:
            setattr(backend, _FLAG, before)

    return refcounted((*key, tf32), changed)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Context in which autocast and TF32 products are off, so that transforms run in float32 or float64.

    Code that is being traced cannot change how products are taken: see :func:`rounds_products`.
    """
    plain = cast(AbstractContextManager[None], torch.autocast(device.type, enabled=False))
    if torch.compiler.is_compiling() or _multiplies_exactly(device.type):
        return plain
    return _both(plain, float32(device, "matmul"))


def in_full_precision(method: Callable[P, R]) -> Callable[P, R]:
    """Run a method in :func:`full_precision`, on the device of the first tensor that it is given."""

    @wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = _device(args) or _device(kwargs.values())
        # Transforms are called often, and nearly always there is nothing to change.
        if device is None or not (
            torch.is_autocast_enabled(device.type)
            or not (torch.compiler.is_compiling() or _multiplies_exactly(device.type))
        ):
            return method(*args, **kwargs)
        with full_precision(device):
            return method(*args, **kwargs)

    wrapped.in_full_precision = True  # type: ignore[attr-defined]
    return wrapped


def rounds_products(device: torch.device) -> bool:
    """Whether TF32 or bfloat16 is allowed for products of float32, which code that is being traced cannot change."""
    return not _read_while_tracing(device.type)


def _multiplies_exactly(kind: str) -> bool:
    """Whether products in float32 are exact by the user's own setting, not by what another thread holds for a while."""
    backend = _BACKENDS.get((kind, "matmul"))
    return backend is None or (getattr(backend, _FLAG) in _EXACT and (kind, "matmul", False) not in HELD)


# Traces are made anew where the setting has changed.
_read_while_tracing = torch.compiler.assume_constant_result(_multiplies_exactly)


def _device(values: Iterable[object]) -> torch.device | None:
    for value in values:
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, (list, tuple)) and (device := _device(value)) is not None:
            return device
    return None


@contextmanager
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield
