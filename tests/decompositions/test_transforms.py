"""Models under ``torch.func``."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from typing_extensions import override

from separable_hvae import HVAE, FFT2Complex, FFT2Real, Identity, Wavelet2
from separable_hvae.functional import check_finite
from tests.helpers.models import tiny
from tests.helpers.zoo import Make, signal


class Loss(nn.Module):
    """``functional_call`` calls ``forward``."""

    def __init__(self, model: HVAE) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.model.loss(x)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: FFT2Real(8), lambda: FFT2Complex(8), lambda: Wavelet2(8, "db2"), lambda: Identity(8)]
)
def test_gradients_of_each_sample(make: Make, train: bool) -> None:
    model = tiny(make(), layers=1).double().train(train)
    x = signal(model.decomp, 3)
    model.calibrate(x)
    loss = Loss(model)

    def of_one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return cast(Tensor, functional_call(loss, parameters, (x[None],)))

    torch.manual_seed(0)
    parameters = {name: p.detach() for name, p in loss.named_parameters()}
    found = vmap(grad(of_one), in_dims=(None, 0), randomness="same")(parameters, x)
    for i in range(len(x)):
        torch.manual_seed(0)
        wanted = torch.autograd.grad(loss(x[i : i + 1]), list(loss.parameters()), materialize_grads=True)
        for name, g in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(found[name][i], g, rtol=1e-9, atol=1e-10)


def test_what_is_not_finite_is_seen_under_vmap() -> None:
    model = tiny(FFT2Real(8)).eval()
    x = signal(model.decomp, 6, torch.float32).unflatten(0, (2, 3))
    bound = vmap(vmap(lambda x: model.encode(x[None]).elbo[0]))
    torch.testing.assert_close(bound(x).flatten(), model.encode(x.flatten(0, 1)).elbo)
    x[1, 2, 0, 3, 4] = torch.inf
    with pytest.raises(ValueError, match="x must be finite, got NaN or infinity"):
        bound(x)
    for kept in (x.clone().requires_grad_(), x.to(torch.complex64)):
        with pytest.raises(ValueError, match="y must be finite"):
            check_finite("y", kept)
