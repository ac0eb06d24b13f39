"""Small models of the tests."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from separable_hvae import HVAE, Decomposition, FFT1Real
from separable_hvae.nn.stochastic_layer import LayerPass, StochasticLayer


def tiny(decomp: Decomposition, *, perturbed: bool = True, seed: int = 0, **options: Any) -> HVAE:
    """A small model, by default off its zero initialisations so that every path carries something."""
    torch.manual_seed(seed)
    model = HVAE(decomp, **({"layers": 2, "width": 6, "bottleneck": 4, "blocks": 1} | options))
    if perturbed:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_passes(model: HVAE, run: Callable[[], object]) -> list[LayerPass]:
    """What each stochastic layer did during a run."""
    seen: list[LayerPass] = []
    layers = [m for m in model.modules() if isinstance(m, StochasticLayer)]
    hooks = [m.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for m in layers]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def units(model: HVAE) -> list[float]:
    """The unit of each band, coarse to fine."""
    return [float(subset.get_buffer("unit")) for subset in model.subsets]


def few(seed: int = 0, **options: Any) -> HVAE:
    """Two bands of two layers each, in float64."""
    return tiny(FFT1Real(4, scales=[1, 4]), seed=seed, sigma=SIGMA, **options).double()


def assert_equal(a: Sequence[Tensor], b: Sequence[Tensor], *, exactly: bool = True) -> None:
    for left, right in zip(a, b, strict=True):
        if exactly:
            torch.testing.assert_close(left, right, rtol=0, atol=0)
        else:
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def reach_every_parameter(module: nn.Module, outputs: list[Tensor], but: Collection[str] = ()) -> None:
    """Check that a random combination of outputs has a gradient on each named parameter, ``but`` some."""
    torch.manual_seed(5)
    torch.stack([(y * torch.randn_like(y)).sum() for y in outputs]).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert name in but or float(parameter.grad.abs().max()) > 0, name


SIGMA = 0.3
