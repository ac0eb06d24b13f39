r"""Update rules: one small step on the latents of a problem.

    gradient descent    z ← z − λ g
    Adam                z ← z − λ m̂ / (√v̂ + ε)

Both act on each entry alone, so a sample's path does not depend on its neighbours.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae.refine.problem import Problem


class Rule(ABC):
    """One step on the latents of a problem."""

    default_step: float
    """Step size on local problems."""
    default_joint_step: float
    """Step size where the objective spans the whole hierarchy."""

    @abstractmethod
    def step(
        self, problem: Problem, latents: list[Tensor], sizes: Sequence[float], state: Any
    ) -> tuple[list[Tensor], Any]:
        """Move the latents.

        Args:
            problem: The problem, which gives gradients.
            latents: Where the latents are.
            sizes: Step size of each.
            state: What the previous step returned; ``None`` on the first.

        Returns:
            The new latents and the state of the next step. The tensors given are left as they were.
        """


class GradientDescent(Rule):
    """Plain gradient descent, the paper's rule. It diverges once ``λ > 2 σ_p²``."""

    default_step = 1e-3
    default_joint_step = 1e-3

    @override
    def step(
        self, problem: Problem, latents: list[Tensor], sizes: Sequence[float], state: Any
    ) -> tuple[list[Tensor], Any]:
        gradients = problem.gradient(latents)
        return [z - size * g for z, g, size in zip(latents, gradients, sizes, strict=True)], None


class Adam(Rule):
    """Adam on the latents.

    Args:
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment.
    """

    default_step = 0.01
    default_joint_step = 0.03

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas, self.eps = betas, eps

    @override
    def step(
        self, problem: Problem, latents: list[Tensor], sizes: Sequence[float], state: Any
    ) -> tuple[list[Tensor], Any]:
        gradients = problem.gradient(latents)
        if state is None:
            state = 0, [torch.zeros_like(z) for z in latents], [torch.zeros_like(z) for z in latents]
        count, means, squares = state
        b1, b2 = self.betas
        count += 1
        means = torch._foreach_lerp(means, gradients, 1 - b1)
        squares = torch._foreach_add(
            torch._foreach_mul(squares, b2), torch._foreach_mul(gradients, gradients), alpha=1 - b2
        )
        moved = [
            z - size / (1 - b1**count) * m / ((v / (1 - b2**count)).sqrt() + self.eps)
            for z, m, v, size in zip(latents, means, squares, sizes, strict=True)
        ]
        return moved, (count, means, squares)


RULES: dict[str, type[Rule]] = {"gd": GradientDescent, "adam": Adam}
