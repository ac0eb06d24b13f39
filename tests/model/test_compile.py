"""Models under ``torch.compile`` and ``torch.export``: few graphs, and the same answers."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae import HVAE, FFT2Complex, FFT2Real, Identity, Wavelet1, Wavelet2
from separable_hvae._float32 import float32_settings
from tests.helpers.models import seeded, tiny
from tests.helpers.zoo import OWN, Make, signal

MAKES: dict[str, Make] = {
    "fourier": lambda: FFT2Real(4, 1),
    "complex": lambda: FFT2Complex(4, 1),
    "wavelet": lambda: Wavelet2(4, "db2", 1),
    "identity": lambda: Identity(4, 1),
}
# Where a trace ends, torch asks tensors between its parts for gradients that they do not keep.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
MODELS = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@pytest.fixture(autouse=True)
def _traces() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that counts its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        self.graphs.append(graph)
        return graph

    def products(self) -> set[torch.dtype]:
        """In what matrices are multiplied."""
        nodes = (n for graph in self.graphs for n in graph.graph.nodes if n.target in (operator.matmul, torch.matmul))
        return {n.meta["example_value"].dtype for n in nodes}

    def __len__(self) -> int:
        return len(self.graphs)


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], Graphs]:
    graphs = Graphs()
    return torch.compile(function, backend=graphs), graphs


def calibrated(make: Make, **options: Any) -> tuple[HVAE, Tensor]:
    model = tiny(make(), layers=1, blocks=0, **options)
    x = signal(model.decomp, 4, torch.float32)
    model.calibrate(x)
    return model, x


@MODELS
def test_models_trace_in_one_graph(make: Make) -> None:
    model, x = calibrated(make)
    latents = [z.detach() for z in model.encode(x).latents]
    encode, of_encode = compiled(model.encode)
    decode, of_decode = compiled(model.decode)
    found, expected = encode(x), model.encode(x)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction)
    torch.testing.assert_close(found.elbo, expected.elbo)
    torch.testing.assert_close(decode(latents).reconstruction, expected.reconstruction)
    assert (len(of_encode), len(of_decode)) == (1, 1)


@MODELS
def test_losses_trace_in_one_graph_with_their_gradients(make: Make) -> None:
    model, x = calibrated(make)
    model.train()
    loss, graphs = compiled(model.loss)
    gradients = []
    for function in (loss, model.loss):
        torch.manual_seed(0)
        value = function(x, kl_weight=0.5)
        gradients.append([value, *torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
    loss(x[:3], kl_weight=0.5)
    loss(x[:2], kl_weight=0.5)
    assert len(graphs) == 2, "one more for batches of any size"


def test_models_of_any_decomposition_trace() -> None:
    model, x = calibrated(OWN["own-pyramid"])
    encode, graphs = compiled(model.encode)
    torch.testing.assert_close(encode(x).reconstruction, model.encode(x).reconstruction)
    assert len(graphs) == 1


def test_a_loaded_model_looks_once_whether_it_is_calibrated() -> None:
    model, x = calibrated(MAKES["wavelet"])
    fresh = tiny(MAKES["wavelet"](), layers=1, blocks=0, seed=1)
    fresh.load_state_dict(model.state_dict())
    fresh.train()
    loss, graphs = compiled(fresh.loss)
    loss(x)
    assert len(graphs) <= 3
    loss(x)
    loss(x)
    assert len(graphs) <= 4


@pytest.mark.parametrize("compile_", [False, True])
def test_loading_an_uncalibrated_state_calibrates_anew(compile_: bool) -> None:
    model, x = calibrated(MAKES["wavelet"])
    fresh = tiny(MAKES["wavelet"](), layers=1, blocks=0)
    model.train()
    loss = compiled(model.loss)[0] if compile_ else model.loss
    loss(x)
    model.load_state_dict(fresh.state_dict())
    loss(x)
    assert int(model.standardization.calibrated) == 1
    assert not model.is_calibrated


def test_compiled_transforms_are_exact_where_products_are_not() -> None:
    """TF32 is allowed for products of float32, and traced code cannot change that."""
    decomp = Wavelet1(32, "db4")
    x = signal(decomp, 2, torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        setting = float32_settings()
        analysis, graphs = compiled(decomp.analysis)
        bands = analysis(x)
        assert float32_settings() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert graphs.products() == {torch.float64}
    for found, expected in zip(bands, decomp.analysis(x.double()), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float())
    torch._dynamo.reset()
    analysis, graphs = compiled(decomp.analysis)
    analysis(x)
    assert graphs.products() == {torch.float32}


@MODELS
def test_autocast_around_compiled_code_leaves_transforms_alone(make: Make) -> None:
    decomp = make()
    x = signal(decomp, 2, torch.float32)
    analysis, graphs = compiled(decomp.analysis)
    with torch.autocast("cpu", torch.bfloat16):
        for found, expected in zip(analysis(x), decomp.analysis(x), strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


class Call(nn.Module):
    """``torch.export`` takes modules, of tensors in and out."""

    def __init__(self, model: HVAE, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    @override
    def forward(self, *inputs: Tensor) -> Tensor:
        given = list(inputs) if self.method == "decode" else inputs[0]
        result: Tensor = getattr(self.model, self.method)(given).reconstruction
        return result


@pytest.mark.parametrize("method", ["encode", "decode"])
@MODELS
def test_exported_models_take_batches_of_any_size(make: Make, method: str) -> None:
    model, x = calibrated(make)
    inputs = (x,) if method == "encode" else tuple(z.detach() for z in model.encode(x).latents)
    call, batch = Call(model, method), torch.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in inputs),)
    exported = torch.export.export(call, inputs, dynamic_shapes=shapes, strict=False).module()
    for n in (4, 3):
        given = tuple(t[:n] for t in inputs)
        torch.testing.assert_close(exported(*given), call(*given))


def test_draws_follow_the_generators_of_compiled_calls() -> None:
    model, x = calibrated(MAKES["fourier"])
    encode, _ = compiled(model.encode)
    torch.manual_seed(3)
    found = encode(x, temperature=1.0).reconstruction
    torch.manual_seed(3)
    torch.testing.assert_close(found, model.encode(x, temperature=1.0).reconstruction)
    given = encode(x, temperature=1.0, generator=seeded(1)).reconstruction
    torch.testing.assert_close(given, model.encode(x, temperature=1.0, generator=seeded(1)).reconstruction)
