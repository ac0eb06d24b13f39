"""The library on an accelerator that is pretended: tensors without numbers, on a device of its own.

    python -m tests.suites.accelerator

PyTorch checks the devices of such tensors as it does on a real one, so that whatever mixes them is found on any
machine. Whole inferences also have to be fit for a CUDA graph: once warm, they may look at no value and move
nothing between devices. What that gives is shown by tests on a real device.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from typing_extensions import override

from separable_hvae import HVAE, KnownBands, MAPRefiner, Measurement
from separable_hvae.data_terms.base import DataTerm
from separable_hvae.decompositions import wavelet
from separable_hvae.refine import Eager
from separable_hvae.refine.execution.base import Infer, T
from separable_hvae.refine.execution.fingerprint import fingerprint
from tests.helpers.models import tiny
from tests.helpers.zoo import SMALL

KIND, DEVICE = "pretended", "pretended:0"
REFINED = ("fft2-few-scales", "haar-skips", "own-pyramid")


class Backend(_DummyBackendModule):
    """What PyTorch asks of a kind of device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Values(TorchDispatchMode):
    """Answers whoever looks at a value; refuses it, and moves between devices, while something is recorded."""

    recording = False

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = func is torch.ops.aten._local_scalar_dense.default
        if looks and not self.recording:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 0.5 if dtype.is_floating_point else 17
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and t.ndim]
        if self.recording and (looks or len({t.device for t in tensors}) > 1):
            raise AssertionError(f"{func} looks at a value or moves one between devices")
        return result


class Here(Executor):
    """Runs in the thread that asks, where the modes of this module are."""

    def __init__(self, threads: int) -> None:
        """Take what a pool takes."""

    @override
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class Recorded(Eager):
    """Does what a recording does: everything once to warm up, then under strict rules."""

    def __init__(self, values: Values) -> None:
        super().__init__(threads=1)
        self.values_, self.count = values, 0

    @override
    def inference(self, infer: Infer[T], model: HVAE, settings: Callable[[], object]) -> Infer[T]:
        hash(fingerprint(settings()))

        def strictly(inputs: Any) -> T:
            infer(inputs)
            self.values_.recording, self.count = True, self.count + 1
            try:
                return infer(inputs)
            finally:
                self.values_.recording = False

        return strictly


def moved(model: HVAE) -> HVAE:
    """The model with its weights on the pretended device."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=DEVICE))
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=DEVICE)
    return model


def signals(model: HVAE) -> Tensor:
    """Two signals on the pretended device."""
    dtype = torch.complex64 if model.decomp.is_complex else torch.float32
    return torch.empty(2, model.decomp.channels, *model.decomp.size, dtype=dtype, device=DEVICE)


def terms(model: HVAE) -> list[tuple[DataTerm, bool]]:
    """What may be known of two signals, and whether its inference can be recorded as a whole."""
    x = signals(model)
    found: list[tuple[DataTerm, bool]] = [(Measurement(x, lambda x: 2 * x, 0.1, linear=False, start=x), False)]
    if model.decomp.orthonormal:
        bands = [torch.empty(2, *shape, device=DEVICE) for shape in model.decomp.band_shapes.values()]
        masks = [torch.empty(band.shape, dtype=torch.bool, device=DEVICE) for band in bands]
        found.append((KnownBands(bands[:-1] or bands, masks[: len(bands) - 1] or masks, 0.1), True))
    return found


def main() -> None:
    """Train and sample every small decomposition's model, and refine some."""
    _setup_privateuseone_for_python_backend(KIND, backend_module=Backend())
    warnings.simplefilter("ignore")
    # Matrices are made outside of modes, but real ones could not be on a device that is not there.
    vars(wavelet)["ThreadPoolExecutor"] = Here
    pretended, values = FakeTensorMode(), Values()  # type: ignore[no-untyped-call]
    for name in sorted(SMALL.keys() - {"own-dct"}):  # Its tables depend on values, which tensors lack here.
        model = tiny(SMALL[name](), layers=1, blocks=0)
        with pretended, values:
            x = signals(moved(model))
            model.train()
            model.loss(x).backward()
            model.eval().requires_grad_(True)
            assert all(p.grad is not None and p.grad.device.type == KIND for p in model.parameters())
            assert model.sample(2).device.type == model.encode(x).reconstruction.device.type == KIND
            if name not in REFINED:
                continue
            recorded = Recorded(values)
            for schedule, rule in (
                ("latent", "gd"),
                ("scale", "adam"),
                ("parallel", "adam"),
                ("joint", "gauss-newton"),
            ):
                refiner = MAPRefiner(2, schedule=schedule, rule=rule, execution=recorded)
                before = recorded.count
                result = refiner(model, x)
                assert recorded.count == before + 1
                assert {t.device.type for t in [result.reconstruction, *result.latents]} == {KIND}
            for term, whole in terms(model):
                before = recorded.count
                assert MAPRefiner(1, execution=recorded)(model, term).reconstruction.device.type == KIND
                assert recorded.count == before + whole


if __name__ == "__main__":
    main()
