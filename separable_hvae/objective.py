r"""What refinement minimises: the negative log of the joint density, sample by sample.

    J(z) = −Σ_l log N(z_l; μ_p, σ_p) + Σ_s β_s d(h_s(z), t_s)                  nats, (B,)

Eq. 7 of the paper prints the first term without its minus; its text, and MAP, need it. The data term d
is summed over a sample's entries and never over the batch, so a sample's result does not depend on its
neighbours. By default it is the model's own likelihood,

    "l2"    ‖ĥ − h‖² / 2σ²            Gaussian with the model's σ
    "l1"    √2 ‖ĥ − h‖₁ / σ           Laplace of the same variance

which orthonormal bands split exactly, band by band. Other decompositions have one data term on the
signal, and each subset aims at the target that its coarser bands leave it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from separable_hvae.decomposition import full_precision, pack
from separable_hvae.hvae import HVAE, Observation
from separable_hvae.subset import SubsetPass

LossName = Literal["l1", "l2"]
Loss = LossName | Callable[[Tensor, Tensor], Tensor]
ByScale = float | Mapping[int, float] | Sequence[float]
"""A number for every scale, a mapping from scale to number, or one number for each scale."""


@dataclass(frozen=True)
class Terms:
    """The two parts of an objective, in nats: ``(B,)`` each.

    Attributes:
        nll: ``−Σ log p(z)`` of the latents concerned.
        data: Data term, guidance included.
    """

    nll: Tensor
    data: Tensor

    @property
    def objective(self) -> Tensor:
        """``nll + data``."""
        return self.nll + self.data


class Objective:
    """The MAP objective of one batch.

    Args:
        model: The model.
        seen: The batch.
        loss: ``"l2"``, ``"l1"``, or a callable ``(h_hat, h) -> (B,)`` on real tensors, in nats.
        guidance: β, one number or by scale.
    """

    def __init__(self, model: HVAE, seen: Observation, loss: Loss, guidance: ByScale) -> None:
        self.model, self.seen = model, seen
        self.loss = _named_loss(loss, float(model.sigma.detach())) if isinstance(loss, str) else loss
        self.guidance = by_scale("guidance", guidance, model.scales)

    def distance(self, scale: int, h_hat: Tensor, h: Tensor) -> Tensor:
        """``β_s d(h_hat, h)``: ``(B,)``.

        Raises:
            ValueError: If the loss does not return one number for each sample.
        """
        d = self.loss(h_hat, h)
        if not isinstance(d, Tensor) or d.shape != h.shape[:1]:
            got = tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__
            raise ValueError(f"loss must return one number for each sample, shape {tuple(h.shape[:1])}, got {got}")
        return self.guidance[scale] * d

    def subset(self, index: int, step: SubsetPass, target: Tensor) -> Terms:
        """The part of one subset, everything coarser fixed and everything finer ignored (eq. 6)."""
        scale = self.model.subsets[index].scale
        return Terms(-step.log_prior().sum(1), self.distance(scale, step.band, target))

    def total(self, passes: Sequence[SubsetPass]) -> Terms:
        """The full MAP objective of a pass through every subset."""
        nll = -torch.cat([step.log_prior() for step in passes], dim=1).sum(1)
        bands, targets = [step.band for step in passes], self.seen.targets
        if targets is None:
            with full_precision(bands[0].device):
                reconstruction = self.model.decomp.synthesis(bands)
            return Terms(nll, self.distance(self.model.scales[-1], pack(reconstruction), pack(self.seen.x)))
        parts = zip(self.model.decomp.band_scales, bands, targets, strict=True)
        return Terms(nll, torch.stack([self.distance(s, h_hat, h) for s, h_hat, h in parts]).sum(0))


def squared_error(h_hat: Tensor, h: Tensor) -> Tensor:
    """``‖ĥ − h‖²``, summed over everything but the batch: ``(B,)``."""
    return (h_hat - h).square().flatten(1).sum(1)


def absolute_error(h_hat: Tensor, h: Tensor) -> Tensor:
    """``‖ĥ − h‖₁``, summed over everything but the batch: ``(B,)``."""
    return (h_hat - h).abs().flatten(1).sum(1)


def _named_loss(name: str, sigma: float) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "l2":
        return lambda h_hat, h: squared_error(h_hat, h) / (2 * sigma**2)
    return lambda h_hat, h: math.sqrt(2) / sigma * absolute_error(h_hat, h)


def by_scale(name: str, value: ByScale, scales: Sequence[int], *, least: float = 0.0) -> dict[int, float]:
    """Read a setting that is one number or given by scale.

    Raises:
        TypeError: If an entry is no number.
        ValueError: If an entry is below ``least`` or not finite, a mapping names an unknown scale or
            leaves one out, or a sequence has another length than ``scales``.
    """
    if isinstance(value, Mapping):
        if set(value) != set(scales):
            raise ValueError(f"{name} must have one entry for each scale {list(scales)}, got {list(value)}")
        values = [value[s] for s in scales]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        values = list(value)
        if len(values) != len(scales):
            raise ValueError(f"{name} must have one entry for each of the {len(scales)} scales, got {len(values)}")
    else:
        values = [value] * len(scales)
    for v in values:
        check_number(name, v, least)
    return dict(zip(scales, values, strict=True))


def check_number(name: str, value: float, least: float) -> None:
    """Raise unless ``value`` is a finite number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be at least {least:g} and finite, got {value}")
