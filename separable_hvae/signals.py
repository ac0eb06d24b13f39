"""Signals as tensors: complex ones as real numbers, other grids, precision, and what is no number."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from separable_hvae.shared import is_held, shared

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64)
_RESAMPLING = {1: "linear", 2: "bilinear", 3: "trilinear"}
_POOLING: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


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

    return shared((*key, tf32), changed)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Context in which autocast and TF32 products are off, so that transforms run in float32 or float64."""
    plain = cast(AbstractContextManager[None], torch.autocast(device.type, enabled=False))
    products = device.type, "matmul"
    # Transforms ask often, and products are nearly always exact without a change.
    if getattr(_BACKENDS.get(products), _FLAG, _EXACT[0]) in _EXACT and not is_held((*products, False)):
        return plain
    return _both(plain, float32(device, "matmul"))


@contextmanager
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield


def resample(y: Tensor, points: Sequence[int]) -> Tensor:
    """Resample the trailing axes of ``y`` to ``points``: averages downwards, interpolates upwards.

    Args:
        y: Real tensor ``(B, C, *grid)`` with one to three grid axes.
        points: Points wanted on each axis.

    Returns:
        Tensor ``(B, C, *points)``.
    """
    dims = len(points)
    fewer = tuple(min(a, b) for a, b in zip(y.shape[2:], points, strict=True))
    if fewer != tuple(y.shape[2:]):
        y = _POOLING[dims](y, fewer)
    if fewer != tuple(points):
        y = F.interpolate(y, size=tuple(points), mode=_RESAMPLING[dims], align_corners=False)
    return y


def pack(x: Tensor) -> Tensor:
    """View a signal as real numbers: ``(B, C, ...)`` complex becomes ``(B, 2C, ...)`` real."""
    return rearrange(torch.view_as_real(x.resolve_conj()), "b c ... two -> b (c two) ...") if x.is_complex() else x


def unpack(y: Tensor, *, is_complex: bool) -> Tensor:
    """Invert :func:`pack`."""
    if not is_complex:
        return y
    return torch.view_as_complex(rearrange(y, "b (c two) ... -> b c ... two", two=2).contiguous())


def check_finite(name: str, x: Tensor) -> None:
    """Raise a ``ValueError`` if a tensor holds NaN or infinity."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
