r"""Importance-weighted bound of the evidence.

    log p(x) ≥ E log (1/K) Σ_k w_k,        w_k = p(x | z_k) p(z_k) / q(z_k | x),  z_k ~ q(z | x)

K = 1 is the ELBO, and the bound rises with K (Burda, Grosse & Salakhutdinov, 2016).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from separable_hvae._validation import check_generator, check_integer
from separable_hvae.functional import finest
from separable_hvae.model.batches import map_tensors
from separable_hvae.nn import Observation, SubsetPass

if TYPE_CHECKING:
    from separable_hvae.model.hvae import HVAE

_ROWS = 256  # Signals, each with one sample, in a pass: they bound its memory.


@torch.no_grad()
def log_likelihood(model: "HVAE", x: Tensor, samples: int, generator: torch.Generator | None, condition: Any) -> Tensor:
    """The bound of signals ``(B, C, *size)``, with ``samples`` samples of each, some at a time, in nats: ``(B,)``."""
    samples = check_integer("samples", samples, 1)
    check_generator(generator)
    seen, found = model.observe(x), list[Tensor]()
    parts = seen.x, seen.activations, seen.targets, model.conditions(condition, len(x))
    at_once = max(1, min(samples, _ROWS // len(x)))
    for first in range(0, samples, at_once):
        count = min(at_once, samples - first)
        # Copies of each signal, one after the other.
        *rows, conditions = map_tensors(partial(_repeated, count), parts)
        seen = Observation(*rows)
        passes = model.decoder([None] * model.depth, len(seen.x), seen, conditions, generator=generator)
        result = model.result(passes, x.dtype, seen.x)
        assert result.data is not None
        weights = -(result.data + result.nll + log_posterior(passes))
        found.append(finest(weights).reshape(count, len(x)).logsumexp(0))
    return (torch.stack(found).logsumexp(0) - math.log(samples)).to(model.real_dtype)


def log_posterior(passes: Sequence[SubsetPass]) -> Tensor:
    """``log q(z | x)`` of the latents of a pass that has asked for posteriors, in nats: ``(B,)``."""
    pairs = [(q, z) for step in passes for q, z in zip(step.posteriors, step.latents, strict=True) if q is not None]
    return torch.stack([q.log_prob(z) for q, z in pairs]).sum(0)


def _repeated(count: int, t: Tensor) -> Tensor:
    return torch.cat([t] * count)
