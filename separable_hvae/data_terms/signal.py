"""Known signals.

    "likelihood"    −log p(x | z)              the model's own likelihood, up to constants
    "l2"            ‖ĥ − h‖² / 2σ²            Gaussian of the likelihood's variance
    "l1"            √2 ‖ĥ − h‖₁ / σ           Laplace of the likelihood's variance

The last two, and a callable, compare orthonormal bands each on its own. So does a likelihood that splits over them,
as a Gaussian does. Of any other, the full objective has the exact density of the decoded signal, with the guidance
of the finest scale, and so has the part of the last subset, whose band completes the signal; the parts of coarser
ones have :meth:`Likelihood.band_energy`, a Gaussian of the same variance. Never worse than the start is said of the
full objective.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae._validation import check_instance
from separable_hvae.data_terms.base import BoundTerm, DataTerm, Misfit, piece
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.distributions.gaussian import gaussian_energy, laplace_energy
from separable_hvae.distributions.likelihood import Likelihood, Prediction
from separable_hvae.functional import pack
from separable_hvae.model.hvae import HVAE
from separable_hvae.nn.decoder import Observation

LossName = Literal["likelihood", "l2", "l1"]
Loss = LossName | Callable[[Tensor, Tensor], Tensor]


def check_loss(loss: object) -> None:
    """Check a loss as far as it can be checked before it is called.

    Raises:
        TypeError: If it is neither a name nor a callable; a class is none.
        ValueError: If the name is unknown.
    """
    allowed = "loss must be 'likelihood', 'l2', 'l1' or a callable"
    if isinstance(loss, str) and loss not in get_args(LossName):
        raise ValueError(f"{allowed}, got {loss!r}")
    if not isinstance(loss, str) and (isinstance(loss, type) or not callable(loss)):
        raise TypeError(f"{allowed}, got {loss!r}")


class Signal(DataTerm):
    """The signals themselves are known.

    Args:
        x: Signals ``(B, C, *size)``.
        loss: ``"likelihood"``, ``"l2"``, ``"l1"``, or a callable ``(h_hat, h) -> (B,)`` on real tensors, in nats.

    Raises:
        TypeError: If ``x`` is no tensor or the loss neither a name nor a callable.
        ValueError: If the loss's name is unknown.
    """

    def __init__(self, x: Tensor, loss: Loss = "likelihood") -> None:
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
        variance, likelihood = model.likelihood.variance.detach(), model.likelihood
        distance = Distance(self.loss, likelihood if self.loss == "likelihood" else None)
        targets = None if seen.targets is None else [target.detach() for target in seen.targets]
        if self.loss == "likelihood" and not likelihood.splits:
            return _bind_whole(model, distance, seen.x, targets, variance)
        if targets is not None:
            return BoundTerm(
                BandMisfit(model.decomp, distance),
                [*targets, variance],
                lambda i, _, data: [data[i], data[-1]],
                pure=True,
            )

        def targets_of(index: int, bands: Sequence[Tensor | None], data: Sequence[Tensor]) -> list[Tensor]:
            return [_residual(model, index, bands, data[0]), data[-1]]

        return BoundTerm(SignalMisfit(model.decomp, distance), [seen.x, variance], targets_of, pure=True)


def _residual(model: HVAE, index: int, bands: Sequence[Tensor | None], x: Tensor) -> Tensor:
    """What a band's target, given the coarser ones, adds to the signal: packed."""
    target = model.decoder.target_of(index, x, [band for band in bands[:index] if band is not None])
    return pack(piece(model.decomp, index, target))


def _bind_whole(
    model: HVAE, distance: "Distance", x: Tensor, targets: list[Tensor] | None, variance: Tensor
) -> BoundTerm:
    """The data term of a likelihood that does not split over bands."""
    last = len(model.subsets) - 1

    def targets_of(index: int, bands: Sequence[Tensor | None], data: Sequence[Tensor]) -> list[Tensor]:
        x, *targets, variance = data
        if index == last:
            coarser = [None if band is None else band.detach() for band in bands[:index]]
            if not any(band is not None for band in coarser):
                return [torch.zeros_like(x), x]
            return [model.decomp.synthesis(coarser), x]
        return [targets[index] if targets else _residual(model, index, bands, x), variance]

    misfit = LikelihoodMisfit(model.decomp, distance, model.likelihood, last, in_bands=targets is not None)
    return BoundTerm(misfit, [x, *(targets or []), variance], targets_of, pure=True)


@dataclass(frozen=True)
class Distance:
    """A loss between two real tensors, in nats: ``(B,)``.

    Args:
        loss: ``"likelihood"``, ``"l2"``, ``"l1"``, or a callable ``(h_hat, h) -> (B,)``.
        likelihood: The likelihood of that name.
    """

    loss: Loss
    likelihood: Likelihood | None = None

    def __call__(self, h_hat: Tensor, h: Tensor, variance: Tensor) -> Tensor:
        """Measure, and check that a user's loss gives one number for each sample.

        Args:
            h_hat: What is compared, ``(B, ...)``.
            h: What it is compared with.
            variance: Variance of the named losses, a scalar.
        """
        if self.loss == "l2":
            return gaussian_energy(h_hat - h, variance)
        if self.loss == "l1":
            return laplace_energy(h_hat - h, variance)
        if isinstance(self.loss, str):
            assert self.likelihood is not None
            return self.likelihood.band_energy(h_hat - h, variance)
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

    The likelihood's variance comes last, in a subset's targets and in the data.
    """

    decomp: Decomposition
    distance: Distance

    @override
    def local(self, index: int, band: Tensor, targets: Sequence[Tensor]) -> Tensor:
        return self.distance(band, *targets)

    @override
    def total(self, bands: Sequence[Tensor], data: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        *targets, variance = data
        parts = zip(self.decomp.band_scales, bands, targets, strict=True)
        return [(scale, self.distance(band, target, variance)) for scale, band, target in parts]


@dataclass(frozen=True)
class SignalMisfit(Misfit):
    """Bands of any decomposition against a known signal, the variance last as above."""

    decomp: Decomposition
    distance: Distance

    @override
    def local(self, index: int, band: Tensor, targets: Sequence[Tensor]) -> Tensor:
        return self.distance(pack(piece(self.decomp, index, band)), *targets)

    @override
    def total(self, bands: Sequence[Tensor], data: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        x, variance = data
        reconstruction = self.decomp.synthesis(bands)
        return [(self.decomp.scales[-1], self.distance(pack(reconstruction), pack(x), variance))]


@dataclass(frozen=True)
class LikelihoodMisfit(Misfit):
    """A likelihood of the decoded signal, which does not split over bands.

    Attributes:
        decomp: The decomposition.
        distance: How the bands of all subsets but the last are compared.
        likelihood: The likelihood.
        last: Number of the last subset, whose band completes the signal.
        in_bands: Whether the others are compared as orthonormal bands, or as what they add to the signal.
    """

    decomp: Decomposition
    distance: Distance
    likelihood: Likelihood
    last: int
    in_bands: bool

    @override
    def local(self, index: int, band: Tensor, targets: Sequence[Tensor]) -> Tensor:
        if index == self.last:
            coarser, x = targets
            return self.likelihood.energy(Prediction([], coarser + piece(self.decomp, index, band)), x)
        return self.distance(band if self.in_bands else pack(piece(self.decomp, index, band)), *targets)

    @override
    def total(self, bands: Sequence[Tensor], data: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        mean = self.decomp.synthesis(bands)
        return [(self.decomp.scales[-1], self.likelihood.energy(Prediction(bands, mean), data[0]))]


def absolute_error(h_hat: Tensor, h: Tensor) -> Tensor:
    """``‖ĥ − h‖₁``, summed over everything but the batch, the paper's data term: ``(B,)``."""
    return (h_hat - h).abs().flatten(1).sum(1)
