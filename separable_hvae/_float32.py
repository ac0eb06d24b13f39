"""How exactly PyTorch computes in float32, whatever the caller has set: autocast, and TF32 where it multiplies."""

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch

from separable_hvae._contexts import is_held, refcounted

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
