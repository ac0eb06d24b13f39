"""Decompositions with tensors of their own: learned with the model, or read off data."""

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from typing_extensions import override

from separable_hvae import HVAE, Decomposition, MAPRefiner, fit

N = 16
LITTLE: dict[str, Any] = {"layers": 1, "width": 8, "bottleneck": 8, "blocks": 0, "latent_channels": 4}


class Basis(Decomposition):
    """Rows of an orthogonal matrix; scale s ends with row s²."""

    orthonormal = True
    rows: Tensor

    @override
    def build(self) -> None:
        self.ends = [0, *(s**2 for s in self.scales)]

    @override
    def band_shape(self, scale: int) -> list[int]:
        i = self.scales.index(scale)
        return [self.ends[i + 1] - self.ends[i]]

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        h = self.check_signal(x).flatten(1) @ self.rows.to(x).T
        return list(h.tensor_split(self.ends[1:-1], dim=1))

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        h = torch.cat(self.check_bands(bands), dim=1)
        return (h @ self.rows.to(h)).reshape(len(h), self.channels, *self.size)


class Fixed(Basis):
    """A buffer."""

    def __init__(self, size: int | Sequence[int], channels: int = 1, scales: Sequence[int] | None = None) -> None:
        self.register_buffer("rows", torch.eye(N, dtype=torch.float64))
        super().__init__(size, channels, scales)


class Learned(Basis):
    """A parameter that stays orthogonal, which gives the object a class of PyTorch's making."""

    def __init__(self, size: int | Sequence[int], channels: int = 1, scales: Sequence[int] | None = None) -> None:
        self.rows = nn.Parameter(torch.eye(N, dtype=torch.float64))
        orthogonal(self, "rows")
        super().__init__(size, channels, scales)


class LearnedInside(Basis):
    """The same in a module of its own."""

    def __init__(self, size: int | Sequence[int], channels: int = 1, scales: Sequence[int] | None = None) -> None:
        self.turn = orthogonal(nn.Linear(N, N, bias=False, dtype=torch.float64))
        super().__init__(size, channels, scales)

    @property
    @override
    def rows(self) -> Tensor:  # type: ignore[override]
        return cast(Tensor, self.turn.weight)


KINDS: list[Callable[..., Basis]] = [Fixed, Learned, LearnedInside]


def turned(kind: Callable[..., Basis]) -> Basis:
    """Any orthogonal matrix."""
    decomp = kind(4, scales=[1, 2, 4])
    matrix = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    if isinstance(decomp, LearnedInside):
        decomp.turn.weight = matrix
    else:
        decomp.rows = matrix
    return decomp


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_keeps_the_tensors_of_its_decomposition(kind: Callable[..., Basis]) -> None:
    decomp = turned(kind)
    decomp.check()
    before = decomp.rows.detach().clone()
    model = HVAE(decomp, **LITTLE)
    torch.testing.assert_close(cast(Basis, model.decomp).rows, before, rtol=0, atol=0)
    assert model.decomp is not decomp
    assert not {id(p) for p in decomp.parameters()} & {id(p) for p in model.parameters()}
    again = HVAE(decomp, [2, 4], **LITTLE).decomp
    torch.testing.assert_close(cast(Basis, again).rows, before, rtol=0, atol=0)
    assert again.band_shapes == {2: (4,), 4: (12,)}
    with torch.inference_mode():
        assert not any(t.is_inference() for t in decomp.bind(decomp.scales).state_dict().values())
    torch.testing.assert_close(copy.deepcopy(decomp).rows, before, rtol=0, atol=0)
    if kind is Fixed:
        torch.testing.assert_close(pickle.loads(pickle.dumps(decomp)).rows, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Learned, LearnedInside])
def test_a_learned_basis_finds_that_of_the_data(kind: type[Basis], tmp_path: Path) -> None:
    """Data along one direction, which the basis turns to, so that fewer coefficients are left to the finer scales."""
    decomp = turned(kind)
    direction = torch.linspace(-1, 1, N).reshape(1, 4, 4)
    data = torch.linspace(-3, 3, 64)[:, None, None, None] * direction / direction.norm()
    torch.manual_seed(0)
    model = HVAE(decomp, **LITTLE)

    @torch.no_grad()
    def entries() -> float:
        """How many coefficients the data's energy is spread over."""
        energy = torch.cat([h[-1].square() for h in model.decomp.analysis(data)])
        return float(energy.sum() ** 2 / energy.square().sum())

    before = entries()
    fit(model, data, steps=50, batch_size=32, learning_rate=2e-2, progress=False, checkpoint=tmp_path / "run")
    assert entries() < 0.6 * before
    model.decomp.check()
    model.save_pretrained(tmp_path / "saved")
    loaded = HVAE.from_pretrained(tmp_path / "saved", classes=[kind])
    assert isinstance(loaded.decomp, kind)
    for refiner in (MAPRefiner(0), MAPRefiner(3), MAPRefiner(3, schedule="joint")):
        found, expected = refiner(loaded, data[:5]), refiner(model, data[:5])
        assert torch.equal(found.reconstruction, expected.reconstruction)


@pytest.mark.parametrize("kind", [Fixed, Learned, LearnedInside])
def test_half_precision_is_not_for_the_basis(kind: Callable[..., Decomposition]) -> None:
    model = HVAE(kind(4), **LITTLE).bfloat16()
    assert model.start.dtype == torch.bfloat16
    model.decomp.check(dtype=torch.float32)
