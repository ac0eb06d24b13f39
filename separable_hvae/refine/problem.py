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

from separable_hvae.functional import per_sample
from separable_hvae.refine.execution.base import Eager, Execution, Point
from separable_hvae.refine.objective import FullObjective, Objective, ObjectiveValue


class Problem:
    """Minimise a sum of objectives over some latents, each sample on its own.

    Schedules make problems by :meth:`InferenceState.problem`.

    Args:
        latents: Where they start, tensors ``(B, latent_channels, *grid)``.
        objectives: What is minimised is their sum; each takes the latents of its own layers, in order.
        steps: Number of steps to take.
        execution: How objectives are evaluated.
        generator: Random numbers for steps that draw, the ones that the refiner was called with.
        std: Gives the standard deviation of the posterior of each of the model's layers; of its prior where there
            is none.

    Attributes:
        values: Each objective where the gradient was taken last; empty before.
    """

    def __init__(
        self,
        latents: Sequence[Tensor],
        objectives: Sequence[Objective],
        steps: int,
        *,
        execution: Execution | None = None,
        generator: torch.Generator | None = None,
        std: Callable[[], Sequence[Tensor]] = tuple,
    ) -> None:
        self.latents = [z.detach() for z in latents]
        self.objectives, self.steps = list(objectives), steps
        self.execution, self.generator, self._std = execution or Eager(), generator, std
        self._layers = [objective.layers for objective in objectives]
        layer_scales = objectives[0].model.layer_scales
        self.scales = [layer_scales[layer] for layers in self._layers for layer in layers]
        self.joint = any(isinstance(objective, FullObjective) for objective in objectives)
        self.values: list[ObjectiveValue] = []
        self._points: list[Point] = []

    @property
    def all_scales(self) -> tuple[int, ...]:
        """Every scale of the model, coarse to fine."""
        return self.objectives[0].model.scales

    @property
    def value(self) -> ObjectiveValue | None:
        """The two terms of the sum where the gradient was taken last; ``None`` before."""
        if len(self.values) < 2:
            return self.values[0] if self.values else None
        nll, data = (torch.stack(terms).sum(0) for terms in list(zip(*self.values, strict=True))[:2])
        return ObjectiveValue(nll, data)

    def gradient(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Gradient of every sample's objective; what it is there is kept in ``self.value``."""
        self._points = self._points_at(latents)
        found = self.execution.gradients(self._points)
        self.values = [value for value, _ in found]
        return [g for _, gradients in found for g in gradients]

    def curvature(self, direction: Sequence[Tensor]) -> Tensor:
        """Gauss–Newton curvature along a direction, where the gradient was taken last: ``(B,)``.

        The directional derivatives are finite differences, which any decomposition and head allow and
        which cost one pass without gradients.
        """
        latents = [z for _, moving in self._points for z in moving]
        at, along = joined(latents), joined(direction)
        reach = dot(at, at).clamp_min(1).sqrt() / dot(along, along).clamp_min(1e-30).sqrt()
        step = _difference(at) * reach
        nearby = self.execution.values(self._points_at(parted(at + step[:, None] * along, latents)))
        total = torch.zeros_like(step)
        for objective, here, there in zip(self.objectives, self.values, nearby, strict=True):
            slopes = [(b - a) / per_sample(step, a) for a, b in zip(here.bands, there.bands, strict=True)]
            total = total + _second_derivative(objective, here.bands, slopes).abs()
            for a, b in zip(here.whitened, there.whitened, strict=True):
                total = total + ((b - a) / per_sample(step, a)).square().flatten(1).sum(1)
        return total

    @cached_property
    def preconditioner(self) -> Tensor:
        """Variance of each latent, as :func:`joined`: ``(B, n)``."""
        std = self._std()
        return joined([std[layer].detach() for layers in self._layers for layer in layers]).square()

    def _points_at(self, latents: Sequence[Tensor]) -> list[Point]:
        rest = iter(latents)
        return [(o, [next(rest) for _ in layers]) for o, layers in zip(self.objectives, self._layers, strict=True)]


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


def _second_derivative(objective: Objective, bands: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """``d²/dt² data(h + t h')`` at t = 0: ``(B,)``; a loss without curvature gives zero."""
    with torch.enable_grad():
        t = torch.zeros(len(bands[0]), dtype=bands[0].dtype, device=bands[0].device, requires_grad=True)
        moved = [h + per_sample(t, h) * slope for h, slope in zip(bands, slopes, strict=True)]
        (first,) = torch.autograd.grad(objective.data(moved).sum(), t, create_graph=True)
        if not first.requires_grad:
            return torch.zeros_like(t)
        (second,) = torch.autograd.grad(first.sum(), t)
    return second.detach()
