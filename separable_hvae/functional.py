"""Signals as tensors: complex ones as real numbers, other grids, and what is no number."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae._validation import check_flag

HALF = (torch.bfloat16, torch.float16)
REAL = (torch.float64, torch.float32, *HALF)
COMPLEX = (torch.complex128, torch.complex64)
_RESAMPLING = {1: "linear", 2: "bilinear", 3: "trilinear"}
_POOLING: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


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


def real(y: Tensor) -> Tensor:
    """Complex numbers as real ones, with a last axis of two; real ones as they are."""
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y


def pack(x: Tensor) -> Tensor:
    """View a signal as real numbers: ``(B, C, ...)`` complex becomes ``(B, 2C, ...)`` real."""
    return rearrange(real(x), "b c ... two -> b (c two) ...") if x.is_complex() else x


def unpack(y: Tensor, *, is_complex: bool) -> Tensor:
    """Invert :func:`pack`."""
    if not is_complex:
        return y
    return torch.view_as_complex(rearrange(y, "b (c two) ... -> b c ... two", two=2).contiguous())


class _AllFinite(torch.autograd.Function):
    """Whether every entry is finite; under ``torch.func.vmap`` one answer for all, which Python can read."""

    @staticmethod
    @override
    def forward(x: Tensor) -> Tensor:
        return torch.isfinite(x).all()

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """There is nothing to differentiate."""

    @staticmethod
    @override
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, None]:
        return _all_finite(x), None


_all_finite = cast(Callable[[Tensor], Tensor], _AllFinite.apply)


def check_finite(name: str, x: Tensor) -> None:
    """Raise a ``ValueError`` if a tensor holds NaN or infinity; traced code, which cannot read it, goes on."""
    if not torch.compiler.is_compiling() and not bool(_all_finite(x.detach())):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def as_plain(x: Tensor) -> Tensor:
    """A plain tensor of the same numbers where a subclass came that carries data of its own, such as an image's."""
    if torch.compiler.is_compiling():
        return x
    is_own = type(x).__torch_function__ is not torch._C._disabled_torch_function_impl
    return x.as_subclass(Tensor) if is_own and type(x) not in (Tensor, torch.nn.Parameter) else x


def is_recomputing() -> bool:
    """Whether a forward pass runs inside of a backward one, as gradient checkpointing repeats it."""
    return torch._C._current_graph_task_id() != -1


def finest(x: Tensor) -> Tensor:
    """Real numbers as float64, or float32 on Apple's GPUs, which have no finer ones."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is."""
    return x.float() if x.dtype in HALF else x


def cast_exactly(kept: Iterable[nn.Module], cast_all: Callable[[], object]) -> None:
    """Cast or move a model, but keep the own tensors of some of its modules in float32 at least.

    Args:
        kept: Modules whose own parameters and buffers are not for half precision.
        cast_all: Casts or moves the whole model.
    """
    owners = [(m, n) for m in kept for n in (*m._parameters, *m._buffers) if getattr(m, n) is not None]
    before = [getattr(owner, name).detach() for owner, name in owners]
    cast_all()
    for (owner, name), exact in zip(owners, before, strict=True):
        now = getattr(owner, name)
        if widen(now).dtype != now.dtype:
            now.data = exact.to(now.device)


def require_autograd(model: nn.Module) -> None:
    """Raise a ``ValueError`` if tensors of a model are of inference mode, which autograd cannot use."""
    if any(t.is_inference() for t in [*model.parameters(), *model.buffers()]):
        raise ValueError("model must be built outside torch.inference_mode to be trained, calibrated or refined")


def graph_for(asked: bool, *given: Any) -> AbstractContextManager[Any]:
    """Context in which autograd keeps a graph, if it is on, and it is asked for or a given tensor requires it."""
    check_flag("with_grad", asked)
    needed = asked or any(isinstance(t, Tensor) and t.requires_grad for t in given)
    return nullcontext() if needed else torch.no_grad()


def signal_dtype(real: torch.dtype, is_complex: bool) -> torch.dtype:
    """The dtype of signals of a real precision: itself, or its complex partner."""
    return (torch.complex128 if real == torch.float64 else torch.complex64) if is_complex else real


def per_sample(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers of samples ``(B,)`` as ``(B, 1, …)``, to go with tensors ``(B, ...)`` of as many axes as ``like``."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors are; the CPU where it has none."""
    return next((t.device for t in itertools.chain(module.parameters(), module.buffers())), torch.device("cpu"))
