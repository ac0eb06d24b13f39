r"""A problem: some latents move, everything else stands still.

A refiner's schedule turns inference into a sequence of problems; its update rule sees nothing of a
problem but its latents, its objective J(z), in nats for each sample, and the gradient of J.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from separable_hvae.objective import Terms


class Problem:
    """Minimise an objective over some latents, each sample on its own.

    Args:
        latents: Where they start, tensors ``(B, latent_channels, *grid)``.
        scales: The scale of each.
        all_scales: Every scale of the model, coarse to fine.
        steps: Number of steps to take.
        objective: Maps latents to the terms of their objective.
        joint: Whether the objective spans the whole hierarchy.
        settle: Maps latents and the number of steps done to where they go on from.
    """

    def __init__(
        self,
        latents: Sequence[Tensor],
        scales: Sequence[int],
        all_scales: Sequence[int],
        steps: int,
        objective: Callable[[list[Tensor]], Terms],
        *,
        joint: bool = False,
        settle: Callable[[list[Tensor], int], list[Tensor]] | None = None,
    ) -> None:
        self.latents = [z.detach() for z in latents]
        self.scales = list(scales)
        self.all_scales = list(all_scales)
        self.steps = steps
        self.joint = joint
        self.settle = settle or (lambda latents, _: latents)
        self._objective = objective
        self.terms: Terms | None = None

    def gradient(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Gradient of every sample's objective; its terms are kept in ``self.terms``."""
        moving = [z.detach().requires_grad_() for z in latents]
        terms = self._objective(moving)
        self.terms = Terms(terms.nll.detach(), terms.data.detach())
        # Samples do not interact, so the gradient of the sum holds each sample's own.
        return list(torch.autograd.grad(terms.objective.sum(), moving))
