"""Maximum a posteriori inference: the refiner whose step is an update rule."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor
from typing_extensions import Unpack, override

from separable_hvae._validation import instance_of
from separable_hvae.data_terms.signal import Loss, absolute_error
from separable_hvae.refine.by_scale import ByScale, by_scale, check_by_scale
from separable_hvae.refine.execution.base import Execution
from separable_hvae.refine.problem import Problem
from separable_hvae.refine.refiner import Precision, Refiner
from separable_hvae.refine.rules import RULES, Rule
from separable_hvae.refine.schedules import Latent, Schedule
from separable_hvae.refine.state import Init


class Options(TypedDict, total=False):
    """Options that every refiner shares, see :class:`Refiner`."""

    tolerance: float | None
    budget: float | None
    batch_size: int | None
    execution: str | Execution
    precision: Precision | None


class MAPRefiner(Refiner):
    """Maximum a posteriori inference by gradient steps on each latent (Algorithm 1, eqs. 6 and 7).

    Args:
        steps: Steps N, one number or by scale; 0 everywhere is amortized inference.
        step_size: Step size λ, one number or by scale; ``None`` takes the rule's own.
        guidance: Weight β of the data term, one number or by scale.
        loss: ``"likelihood"``, ``"l2"``, ``"l1"`` or a callable, see :class:`Refiner`.
        schedule: ``"latent"``, ``"scale"``, ``"parallel"``, ``"joint"``, ``"combined"``, or a :class:`Schedule`.
        rule: ``"adam"``, ``"gd"``, ``"gauss-newton"`` (joint problems alone: elsewhere its steps are Adam's, of
            their own size), or a :class:`Rule`.
        init: ``"posterior"``, ``"prior"`` or a list of latents, see :class:`Refiner`.
        sample: Start from a draw instead of the mean.
        **options: ``tolerance``, ``budget``, ``batch_size``, ``execution`` and ``precision``, see :class:`Refiner`.
    """

    def __init__(
        self,
        steps: int | Mapping[int, int] | Sequence[int] = 25,
        step_size: ByScale | None = None,
        guidance: ByScale = 1.0,
        loss: Loss = "likelihood",
        schedule: str | Schedule = "scale",
        rule: str | Rule = "adam",
        init: Init | Sequence[Tensor] = "posterior",
        sample: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(steps, guidance=guidance, loss=loss, schedule=schedule, init=init, sample=sample, **options)
        if step_size is not None:
            check_by_scale("step_size", step_size)
        self.step_size = step_size
        self.rule = instance_of("rule", rule, RULES, Rule)  # type: ignore[type-abstract]
        if step_size is None and not (hasattr(self.rule, "default_step") and hasattr(self.rule, "default_joint_step")):
            raise ValueError(
                f"{type(self.rule).__name__} has no default_step and default_joint_step: set them, or pass step_size"
            )

    @classmethod
    def paper(cls, steps: int = 25, init: Init = "posterior", **options: Unpack[Options]) -> "MAPRefiner":
        """The paper's literal setting.

        Algorithm 1 with each latent's own prior, L1 on orthonormal bands in the data's units, gradient
        descent with λ = 0.001, β = 1, started from a sample of the posterior (or of the prior).

        Args:
            steps: Steps N.
            init: ``"posterior"`` or ``"prior"``.
            **options: How the steps run, see :class:`Refiner`.
        """
        return cls(steps, 1e-3, 1.0, absolute_error, Latent(own_prior=True), "gd", init, sample=True, **options)

    @override
    def step(self, problem: Problem, latents: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        return self.rule.step(problem, latents, self._sizes(problem), state)

    def _sizes(self, problem: Problem) -> list[float]:
        if self.step_size is None:
            size = self.rule.default_joint_step if problem.joint else self.rule.default_step
            return [size] * len(problem.scales)
        sizes = by_scale("step_size", self.step_size, problem.all_scales)
        return [sizes[s] for s in problem.scales]
