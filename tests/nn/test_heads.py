import pytest
import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae import HVAE, CoefficientHead, FFT2Real, GridHead, ScaleHead
from separable_hvae.nn.heads import HEADS
from tests.helpers.models import reach_every_parameter
from tests.helpers.zoo import SMALL, Make, signal


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_every_head_on_every_decomposition(make: Make, name: str) -> None:
    decomp = make()
    for s, shape in decomp.band_shapes.items():
        head = HEADS[name](decomp, s, width=6, bottleneck=4, blocks=1, gain=0.5)
        band = head(torch.randn(3, 6, *decomp.grid(s)))
        assert band.shape == (3, *shape)
        assert band.dtype == torch.float32
        # A constant picture holds nothing of a band without DC.
        silent = not decomp.from_grid(s, torch.ones(1, *decomp.picture_shape(s))).abs().max() > 1e-5
        reach_every_parameter(head, [band], but={"emit.bias"} if name == "grid" and silent else ())


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_grid_head_takes_the_band_of_what_it_emits(make: Make) -> None:
    decomp = make()
    s = decomp.band_scales[-1]
    head = GridHead(decomp, s, width=6, bottleneck=4, blocks=0, gain=0.5)
    pictures: list[Tensor] = []
    head.emit.register_forward_hook(lambda _module, _inputs, output: pictures.append(output))
    band = head(torch.randn(2, 6, *decomp.grid(s)))
    assert pictures[0].shape == (2, *decomp.picture_shape(s))
    torch.testing.assert_close(band, decomp.from_grid(s, pictures[0]))


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_coefficient_head_reaches_every_coefficient(make: Make) -> None:
    """Each coefficient has a weight of its own: the head's bias alone can move every one of them."""
    decomp = make()
    for s, shape in decomp.band_shapes.items():
        head = CoefficientHead(decomp, s, width=6, bottleneck=4, blocks=0, gain=0.5)
        context = torch.randn(1, 6, *decomp.grid(s))
        before = head(context)
        bias = head.emit.bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias.add_(1)
        torch.testing.assert_close(head(context) - before, torch.ones(1, *shape))


@pytest.mark.parametrize("name", HEADS)
def test_heads_emit_float32_under_autocast(name: str) -> None:
    model = HVAE(FFT2Real(8), head=name, layers=1, width=6, bottleneck=4, blocks=1)
    x = signal(model.decomp, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x)
    assert {h.dtype for h in result.bands} == {torch.float32}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_reading_is_what_is_left_without_blocks(make: Make, name: str) -> None:
    decomp = make()
    s = decomp.band_scales[-1]
    head = HEADS[name](decomp, s, width=6, bottleneck=4, blocks=2, gain=0.5)
    a, b = torch.randn(2, 3, 6, *decomp.grid(s))
    # Linear in the context, and the head itself where blocks do nothing.
    torch.testing.assert_close(
        head.read(a) + 2 * head.read(b), head.read(a + 2 * b) + 2 * head.read(torch.zeros_like(a))
    )
    for name, parameter in head.blocks.named_parameters():
        if name.endswith("leave.weight"):
            torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(head(a), head.read(a))


class ConstantHead(ScaleHead):
    """A user's own head: one learned band, whatever the context."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.band = torch.nn.Parameter(torch.ones(self.shape))

    @override
    def forward(self, context: Tensor) -> Tensor:
        return self.band.expand(len(context), *self.shape)


def test_a_users_own_head() -> None:
    model = HVAE(FFT2Real(8), head=ConstantHead, layers=1, width=6, bottleneck=4, blocks=1)
    model.eval().subsets[1].get_buffer("unit").fill_(3)
    for i, band in enumerate(model.encode(signal(model.decomp, dtype=torch.float32)).bands):
        torch.testing.assert_close(band, torch.full_like(band, 3 if i == 1 else 1))


def test_the_base_refuses_to_be_built() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ScaleHead(FFT2Real(8), 8, width=6, bottleneck=4, blocks=1, gain=1.0)  # type: ignore[abstract]
