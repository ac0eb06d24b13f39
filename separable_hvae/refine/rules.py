r"""Update rules: one small step on the latents of a problem.

    gradient descent    z ← z − λ g
    Adam                z ← z − λ m̂ / (√v̂ + ε)
    Gauss–Newton        z ← z + λ α d,   d ← −P g + β d,   α = −gᵀd / κ(d),   P = σ_q²

The last is a nonlinear conjugate gradient with the posterior's variance as preconditioner and the step
length of the Gauss–Newton model along d. All act on each sample alone, so that its path does not
depend on its neighbours.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae._validation import check_instance, check_number
from separable_hvae.functional import per_sample
from separable_hvae.refine.problem import Problem, dot, joined, parted


class Rule(ABC):
    """One step on the latents of a problem.

    A subclass sets ``default_step`` and ``default_joint_step``, or is used with a step size.
    """

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

    Raises:
        TypeError: If ``betas`` is no pair of numbers or ``eps`` no number.
        ValueError: If a beta is not in [0, 1) or ``eps`` not positive.
    """

    default_step = 0.01
    default_joint_step = 0.03

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, got {betas!r}")
        for beta in betas:
            check_number("betas", beta, "in [0, 1)")
        check_number("eps", eps, "positive and finite")
        self.betas, self.eps = betas, eps

    @override
    def step(
        self, problem: Problem, latents: list[Tensor], sizes: Sequence[float], state: Any
    ) -> tuple[list[Tensor], Any]:
        gradient = joined(problem.gradient(latents))
        if state is None:
            state = 0, torch.zeros_like(gradient), torch.zeros_like(gradient)
        count, mean, square = state
        b1, b2 = self.betas
        count += 1
        mean = torch.lerp(mean, gradient, 1 - b1)
        square = torch.lerp(square, gradient.square(), 1 - b2)
        moves = parted(mean / ((square / (1 - b2**count)).sqrt() + self.eps), latents)
        scaled = torch._foreach_mul(moves, [-size / (1 - b1**count) for size in sizes])
        return list(torch._foreach_add(latents, scaled)), (count, mean, square)


class GaussNewton(Rule):
    """Preconditioned conjugate gradient with Gauss–Newton step lengths, for joint problems.

    A step costs one pass more than a gradient and needs no step size: λ damps it, and falls to a quarter
    for each sample whose objective rose, which goes back to where it came from.

    Args:
        local: Rule for problems that do not span the hierarchy, at its own step size: there, strong
            rules drive the later latents' priors up.
    """

    default_step = 1.0
    default_joint_step = 1.0

    def __init__(self, local: Rule | None = None) -> None:
        if local is not None:
            check_instance("local", local, Rule)
        self.local = local or Adam()

    @override
    def step(
        self, problem: Problem, latents: list[Tensor], sizes: Sequence[float], state: Any
    ) -> tuple[list[Tensor], Any]:
        if not problem.joint:
            return self.local.step(problem, latents, [self.local.default_step] * len(latents), state)
        here = _Point.at(problem, latents, state)
        if state is not None:
            rose = ~(here.objective <= state.objective)
            here = _Point(*(torch.where(per_sample(rose, new), old, new) for old, new in zip(state, here, strict=True)))
            # A sample that went back tries the same direction again, a quarter as far.
            here = here._replace(trust=torch.where(rose, state.trust / 4, (2 * state.trust).clamp_max(1)))
        moves = parted((here.trust * here.length)[:, None] * here.direction, latents)
        starts = parted(here.latents, latents)
        return [z + size * move for z, move, size in zip(starts, moves, sizes, strict=True)], here


class _Point(NamedTuple):
    """Where each sample stands and which way it looks; its latents are one row of a matrix ``(B, n)``."""

    latents: Tensor
    objective: Tensor
    gradient: Tensor
    preconditioned: Tensor
    direction: Tensor
    length: Tensor
    trust: Tensor

    @classmethod
    def at(cls, problem: Problem, latents: list[Tensor], before: "_Point | None") -> "_Point":
        gradient = joined(problem.gradient(latents))
        assert problem.value is not None
        preconditioned = problem.preconditioner * gradient
        direction = -preconditioned
        if before is not None:
            # Polak–Ribière, and steepest descent where that would not descend.
            change = dot(gradient - before.gradient, preconditioned)
            beta = (change / dot(before.gradient, before.preconditioned).clamp_min(1e-30)).clamp_min(0)
            conjugate = direction + beta[:, None] * before.direction
            direction = torch.where((dot(gradient, conjugate) < 0)[:, None], conjugate, direction)
        slope = dot(gradient, direction)
        length = -slope / problem.curvature(parted(direction, latents)).clamp_min(1e-30)
        objective, trust = problem.value.objective, torch.ones_like(length)
        return cls(joined(latents), objective, gradient, preconditioned, direction, length, trust)


RULES: dict[str, type[Rule]] = {"gd": GradientDescent, "adam": Adam, "gauss-newton": GaussNewton}
