r"""Importance-weighted bound of the evidence.

    log p(x) ≥ E log (1/K) Σ_k w_k,        w_k = p(x | z_k) p(z_k) / q(z_k | x),  z_k ~ q(z | x)

K = 1 is the ELBO, and the bound rises with K (Burda, Grosse & Salakhutdinov, 2016).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from separable_hvae.functional import finest
from separable_hvae.nn.subset import SubsetPass

if TYPE_CHECKING:
    from separable_hvae.model.hvae import HVAE, Observation

_ROWS = 256  # Signals, each with one sample, in a pass: they bound its memory.


@torch.no_grad()
def log_likelihood(model: "HVAE", x: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """The bound of signals ``(B, C, *size)``, with ``samples`` samples of each, in nats: ``(B,)``."""
    seen, found = model.observe(x), list[Tensor]()
    at_once = max(1, min(samples, _ROWS // len(x)))
    for first in range(0, samples, at_once):
        count = min(at_once, samples - first)
        rows = seen if count == 1 else _repeated(seen, count)
        passes = model.top_down([None] * model.depth, len(rows.x), rows, generator=generator)
        result = model.result(passes, x.dtype, rows.x)
        assert result.data is not None
        weights = -(result.data + result.nll + log_posterior(passes))
        found.append(finest(weights).reshape(count, len(x)).logsumexp(0))
    return (torch.stack(found).logsumexp(0) - math.log(samples)).to(model.precision)


def log_posterior(passes: Sequence[SubsetPass]) -> Tensor:
    """``log q(z | x)`` of the latents of a pass that has asked for posteriors, in nats: ``(B,)``."""
    pairs = [(q, z) for step in passes for q, z in zip(step.posteriors, step.latents, strict=True) if q is not None]
    return torch.stack([q.log_prob(z) for q, z in pairs]).sum(0)


def _repeated(seen: "Observation", count: int) -> "Observation":
    """``count`` copies of each signal, copy after copy."""

    def repeat(t: Tensor) -> Tensor:
        return t.repeat(count, *[1] * (t.ndim - 1))

    targets = None if seen.targets is None else [repeat(t) for t in seen.targets]
    return type(seen)(repeat(seen.x), {s: repeat(a) for s, a in seen.activations.items()}, targets)
