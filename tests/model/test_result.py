from typing import Any

import pytest
import torch
from torch import Tensor

from separable_hvae import FFT2Real, MAPRefiner
from tests.helpers.models import seeded, tiny


def test_a_result_prints_as_shapes_and_means() -> None:
    model = tiny(FFT2Real(4, channels=1), layers=[1, 2, 1])
    x = torch.randn(5, 1, 4, 4, generator=seeded())
    with torch.no_grad():
        result = model(x, seeded())
    lines = str(result).splitlines()
    assert lines[0] == "Result:"
    assert lines[1].split() == ["reconstruction", "(5,", "1,", "4,", "4)", "float32"]
    assert "2 × (5, 1, 2, 2)" in lines[3]
    assert f"{float(result.nll.mean()):.4g} nats" in lines[4]
    assert result.kl is not None
    assert f"{float(result.kl.sum(1).mean()):.4g} nats" in lines[5]
    assert len(str(result)) == len(repr(result)) < 500
    refined = MAPRefiner(2)(model, x)
    assert "0 of 5" in str(refined)
    assert len(str(refined)) < 600


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_graphs_are_kept_where_they_are_asked_for(mode: str) -> None:
    model = tiny(FFT2Real(4, channels=1)).train(mode == "train")
    x = torch.randn(2, 1, 4, 4, generator=seeded())

    def kept(x: Tensor, **options: Any) -> set[bool]:
        encoded = model.encode(x, **options)
        given = [z.detach() for z in encoded.latents]
        if x.requires_grad:
            given[0].requires_grad_()
        return {r.reconstruction.requires_grad for r in (encoded, model.decode(given, **options))}

    assert kept(x) == {mode == "train"}
    assert kept(x, with_grad=True) == {True}
    assert kept(x.clone().requires_grad_()) == {True}
    assert model(x).reconstruction.requires_grad
    assert model.loss(x).requires_grad
    with torch.no_grad():
        assert kept(x, with_grad=True) == {False}
        assert not model(x).reconstruction.requires_grad
    # The same gradients as ever.
    model.eval().encode(x, with_grad=True).reconstruction.sum().backward()
    assert model.start.grad is not None
