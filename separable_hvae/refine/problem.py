r"""A problem: some latents move, everything else stands still.

A refiner's schedule turns inference into a sequence of problems; its update rule sees nothing of a
problem but its latents, its objective J(z), in nats for each sample, the gradient of J, and along a
direction d the curvature of its Gauss–Newton model,

    κ(d) = ‖∂w/∂z · d‖² + |d²/dt² data(h + t ∂h/∂z · d)|,     w = (z − μ_p) / σ_p

where the size of the second derivative counts: a loss that is not convex bends downwards far from the data.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from separable_hvae.refine.execution.base import Eager, Execution
from separable_hvae.refine.objective import Terms
from separable_hvae.refine.pieces import Call, Outcome, Piece

Settle = Callable[["Problem", list[Tensor], int], list[Tensor]]


class Problem:
    """Minimise an objective over some latents, each sample on its own.

    Args:
        latents: Where they start, tensors ``(B, latent_channels, *grid)``.
        scales: The scale of each.
        steps: Number of steps to take.
        pieces: The objective is the sum of these, each with the number of latents that it takes, in order,
            and the tensors that stand still.
        joint: Whether the objective spans the whole hierarchy.
        until: Share of the time for all problems that may have passed when this one ends.
        spread: Standard deviation of each latent's posterior; of its prior where there is none.
        settle: Maps the problem, its latents and the number of steps done to where they go on from.

    Attributes:
        execution: How pieces run; a refiner sets its own.
        generator: Random numbers for steps that draw, the ones that the refiner was called with.
    """

    execution: Execution = Eager()
    generator: torch.Generator | None = None

    def __init__(
        self,
        latents: Sequence[Tensor],
        scales: Sequence[int],
        steps: int,
        pieces: Sequence[tuple[Piece, int, list[Tensor]]],
        *,
        joint: bool = False,
        until: float = 1.0,
        spread: Sequence[Tensor] = (),
        settle: Settle | None = None,
    ) -> None:
        self.latents = [z.detach() for z in latents]
        self.scales = list(scales)
        self.steps = steps
        self.pieces = list(pieces)
        self.joint = joint
        self.until = until
        self.spread = [s.detach() for s in spread]
        self._settle = settle
        self.outcomes: list[Outcome] = []
        self._looked: list[Call] = []

    @property
    def all_scales(self) -> tuple[int, ...]:
        """Every scale of the model, coarse to fine."""
        return self.pieces[0][0].objective.model.scales

    @property
    def terms(self) -> Terms | None:
        """The terms of the objective where the gradient was taken last; ``None`` before."""
        if not self.outcomes:
            return None
        nll, data = ([getattr(outcome, name) for outcome in self.outcomes] for name in ("nll", "data"))
        return Terms(torch.stack(nll).sum(0), torch.stack(data).sum(0))

    def gradient(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Gradient of every sample's objective; its terms are kept in ``self.terms``."""
        self._looked = self._calls(latents)
        results = self.execution.gradients(self._looked)
        self.outcomes = [outcome for _, outcome in results]
        return [g for gradients, _ in results for g in gradients]

    def curvature(self, direction: Sequence[Tensor]) -> Tensor:
        """Gauss–Newton curvature along a direction, where the gradient was taken last: ``(B,)``.

        The directional derivatives are finite differences, which any decomposition and head allow and
        which cost one pass without gradients.
        """
        latents = [z for call in self._looked for z in call.moving]
        at, along = joined(latents), joined(direction)
        reach = dot(at, at).clamp_min(1).sqrt() / dot(along, along).clamp_min(1e-30).sqrt()
        step = _difference(at) * reach
        nearby = self.execution.values(self._calls(parted(at + step[:, None] * along, latents)))
        total = torch.zeros_like(step)
        for call, here, there in zip(self._looked, self.outcomes, nearby, strict=True):
            slopes = [(b - a) / rows(step, a) for a, b in zip(here.bands, there.bands, strict=True)]
            total = total + _second_derivative(call, here.bands, slopes).abs()
            for a, b in zip(here.whitened, there.whitened, strict=True):
                total = total + ((b - a) / rows(step, a)).square().flatten(1).sum(1)
        return total

    @cached_property
    def preconditioner(self) -> Tensor:
        """Variance of each latent, as :func:`joined`: ``(B, n)``."""
        return joined(self.spread).square()

    def settle(self, latents: list[Tensor], done: int) -> list[Tensor]:
        """Where the latents go on from after ``done`` steps."""
        return latents if self._settle is None else self._settle(self, latents, done)

    def _calls(self, latents: Sequence[Tensor]) -> list[Call]:
        calls, first = [], 0
        for piece, count, held in self.pieces:
            calls.append(Call(piece, list(latents[first : first + count]), held))
            first += count
        return calls


def _difference(like: Tensor) -> float:
    """Relative length of finite differences: well above rounding, also that of convolutions in TF32."""
    if torch.is_autocast_enabled(like.device.type):
        return 0.1
    return 1e-5 if like.dtype == torch.float64 else 1e-2


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """A list of latents as one matrix ``(B, n)``: a few operations on it cost less than many on its parts."""
    return torch.cat([t.flatten(1) for t in tensors], dim=1)


def parted(matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A matrix as latents of the shapes of others, the opposite of :func:`joined`."""
    parts = matrix.split([math.prod(t.shape[1:]) for t in like], dim=1)
    return [part.reshape(t.shape) for part, t in zip(parts, like, strict=True)]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of the rows of two matrices: ``(B,)``."""
    return (a * b).sum(1)


def rows(numbers: Tensor, like: Tensor) -> Tensor:
    """One number for each sample, shaped to scale ``like``."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def _second_derivative(call: Call, bands: list[Tensor], slopes: list[Tensor]) -> Tensor:
    """``d²/dt² data(h + t h')`` at t = 0: ``(B,)``; a loss without curvature gives zero."""
    with torch.enable_grad():
        t = torch.zeros(len(bands[0]), dtype=bands[0].dtype, device=bands[0].device, requires_grad=True)
        moved = [h + rows(t, h) * slope for h, slope in zip(bands, slopes, strict=True)]
        (first,) = torch.autograd.grad(call.piece.data(moved, call.held).sum(), t, create_graph=True)
        if not first.requires_grad:
            return torch.zeros_like(t)
        (second,) = torch.autograd.grad(first.sum(), t)
    return second.detach()
