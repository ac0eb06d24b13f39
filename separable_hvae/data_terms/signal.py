"""Known signals."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae._float32 import full_precision
from separable_hvae._validation import check_instance
from separable_hvae.data_terms.base import BoundTerm, DataTerm, Misfit, piece
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import pack
from separable_hvae.model.hvae import HVAE, Observation

LossName = Literal["l1", "l2"]


Loss = LossName | Callable[[Tensor, Tensor], Tensor]


def check_loss(loss: object) -> None:
    """Check a loss as far as it can be checked before it is called.

    Raises:
        TypeError: If it is neither a name nor a callable; a class is none.
        ValueError: If the name is unknown.
    """
    if isinstance(loss, str) and loss not in ("l1", "l2"):
        raise ValueError(f"loss must be 'l1', 'l2' or a callable, got {loss!r}")
    if not isinstance(loss, str) and (isinstance(loss, type) or not callable(loss)):
        raise TypeError(f"loss must be 'l1', 'l2' or a callable, got {loss!r}")


class Signal(DataTerm):
    """The signals themselves are known.

    Args:
        x: Signals ``(B, C, *size)``.
        loss: ``"l2"``, ``"l1"``, or a callable ``(h_hat, h) -> (B,)`` on real tensors, in nats.

    Raises:
        TypeError: If ``x`` is no tensor or the loss neither a name nor a callable.
        ValueError: If the loss's name is unknown.
    """

    def __init__(self, x: Tensor, loss: Loss = "l2") -> None:
        check_instance("x", x, Tensor)
        check_loss(loss)
        self.x, self.loss = x, loss

    @override
    def __len__(self) -> int:
        return len(self.x)

    @override
    def rows(self, rows: slice | Tensor) -> Self:
        part = copy(self)
        part.x = self.x[rows]
        return part

    @override
    def guess(self, model: HVAE) -> Tensor:
        x = model.decomp.check_signal(self.x)
        return x.clone() if x.is_inference() else x.detach()

    @override
    def bind(self, model: HVAE, seen: Observation) -> BoundTerm:
        distance, sigma = Distance(self.loss), model.sigma.detach()
        if seen.targets is not None:
            known = [*(target.detach() for target in seen.targets), sigma]
            return BoundTerm(
                BandMisfit(model.decomp, distance), known, lambda i, _, data: [data[i], data[-1]], pure=True
            )

        def targets(index: int, bands: Sequence[Tensor | None], data: Sequence[Tensor]) -> list[Tensor]:
            x, sigma = data
            target = model.left(index, x, [band for band in bands[:index] if band is not None])
            return [pack(piece(model.decomp, index, target)), sigma]

        return BoundTerm(SignalMisfit(model.decomp, distance), [seen.x, sigma], targets, pure=True)


@dataclass(frozen=True)
class Distance:
    """A loss between two real tensors, in nats: ``(B,)``.

    Args:
        loss: ``"l2"``, ``"l1"``, or a callable ``(h_hat, h) -> (B,)``.
    """

    loss: Loss

    def __call__(self, h_hat: Tensor, h: Tensor, sigma: Tensor) -> Tensor:
        """Measure, and check that a user's loss gives one number for each sample.

        Args:
            h_hat: What is compared, ``(B, ...)``.
            h: What it is compared with.
            sigma: Standard deviation of the named losses, a scalar.
        """
        if self.loss == "l2":
            return squared_error(h_hat, h) / (2 * sigma.square())
        if self.loss == "l1":
            return math.sqrt(2) / sigma * absolute_error(h_hat, h)
        d = self.loss(h_hat, h)
        if not isinstance(d, Tensor) or d.shape != h.shape[:1]:
            got = tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__
            raise ValueError(f"loss must return one number for each sample, shape {tuple(h.shape[:1])}, got {got}")
        if torch.is_grad_enabled() and h_hat.requires_grad and not d.requires_grad:
            raise ValueError("loss must be differentiable: what it returned does not depend on h_hat for autograd")
        return d


@dataclass(frozen=True)
class BandMisfit(Misfit):
    """Orthonormal bands against known ones, each on its own.

    The model's σ comes last, in a subset's targets and in the data.
    """

    decomp: Decomposition
    distance: Distance

    @override
    def local(self, index: int, band: Tensor, targets: Sequence[Tensor]) -> Tensor:
        return self.distance(band, *targets)

    @override
    def total(self, bands: Sequence[Tensor], data: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        *targets, sigma = data
        parts = zip(self.decomp.band_scales, bands, targets, strict=True)
        return [(scale, self.distance(band, target, sigma)) for scale, band, target in parts]


@dataclass(frozen=True)
class SignalMisfit(Misfit):
    """Bands of any decomposition against a known signal, the model's σ last as above."""

    decomp: Decomposition
    distance: Distance

    @override
    def local(self, index: int, band: Tensor, targets: Sequence[Tensor]) -> Tensor:
        return self.distance(pack(piece(self.decomp, index, band)), *targets)

    @override
    def total(self, bands: Sequence[Tensor], data: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        x, sigma = data
        with full_precision(bands[0].device):
            reconstruction = self.decomp.synthesis(bands)
        return [(self.decomp.scales[-1], self.distance(pack(reconstruction), pack(x), sigma))]


def squared_error(h_hat: Tensor, h: Tensor) -> Tensor:
    """``‖ĥ − h‖²``, summed over everything but the batch: ``(B,)``."""
    return (h_hat - h).square().flatten(1).sum(1)


def absolute_error(h_hat: Tensor, h: Tensor) -> Tensor:
    """``‖ĥ − h‖₁``, summed over everything but the batch: ``(B,)``."""
    return (h_hat - h).abs().flatten(1).sum(1)
