r"""Measurement operators: y = A(x), any callable, with the adjoint of its linear part.

    A*            given, or the vector-Jacobian product that autograd takes of A
    laws          ⟨A x, y⟩ = ⟨x, A* y⟩        A(x + y) − A(0) = (A(x) − A(0)) + (A(y) − A(0))
    conditioning  x̂ = m + C A* (A C A* + V)⁻¹ (y − A m)

The last line is the mean of a Gaussian N(m, C) on signals once y = A x + noise of variance V is known, by
conjugate gradients. Inner products are real, ⟨a, b⟩ = Re Σ ā b.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from separable_hvae._float32 import full_precision
from separable_hvae.functional import check_finite, pack, per_sample, unpack

Map = Callable[..., Tensor]

_PER_SAMPLE = "put what differs by sample into given="


@dataclass(frozen=True)
class Operator:
    """A measurement operator.

    Attributes:
        forward: ``(x, *given) -> y``, batch first.
        adjoint: ``(y, *given) -> x``, the adjoint of its linear part; ``None`` takes autograd's.
        stacked: Whether it takes and gives complex signals as real ones, real and imaginary part as
            channels ``(B, 2C, *size)``.
        linear: Whether it is linear up to an offset. Otherwise its derivative is, which has autograd's adjoint.
    """

    forward: Map
    adjoint: Map | None = None
    stacked: bool = False
    linear: bool = True

    def predict(self, x: Tensor, y: Tensor, given: Sequence[Tensor]) -> Tensor:
        """``A(x)``, checked against measurements ``y``.

        Raises:
            TypeError: If the operator fails on such signals, or gives another kind of numbers than ``y``.
            ValueError: If it gives another shape than that of ``y``.
        """
        with full_precision(x.device):
            signal = pack(x) if self.stacked else x
            predicted = _called("operator", self.forward, signal, given)
        if predicted.shape != y.shape:
            hint = f"; {_PER_SAMPLE}" if predicted.shape[:1] != x.shape[:1] else ""
            if predicted.shape[1:] == y.shape:
                hint = "; y[None] adds the batch axis that it lacks"
            raise ValueError(
                f"operator gives shape {tuple(predicted.shape)} for signals {tuple(signal.shape)}, "
                f"but y has {tuple(y.shape)}{hint}"
            )
        if predicted.is_complex() != y.is_complex():
            raise TypeError(
                f"operator gives {predicted.dtype} for signals of {signal.dtype}, but y is {y.dtype}: "
                "both must be real or both complex"
            )
        return predicted

    def transposed(self, y: Tensor, like: Tensor, given: Sequence[Tensor]) -> Tensor:
        """``A* y``, with the shape and dtype of signals ``like``; of the derivative there, if A is not linear.

        Raises:
            TypeError: If the adjoint fails on ``y``, or gives another kind of numbers than signals are.
            ValueError: If it gives another shape.
        """
        if self.adjoint is None:
            with torch.inference_mode(False), torch.enable_grad():
                at = like.clone().detach().requires_grad_()
                predicted = self.predict(at, y, given)
                if not predicted.requires_grad:
                    raise TypeError(
                        "operator is not differentiable: its output does not depend on signals for autograd"
                    )
                (found,) = torch.autograd.grad(predicted, at, y.contiguous())
            return found
        with full_precision(y.device):
            found = _called("adjoint", self.adjoint, y, given)
        wanted = pack(like).shape if self.stacked else like.shape
        if found.shape != wanted:
            raise ValueError(f"adjoint must give signals of shape {tuple(wanted)}, got {tuple(found.shape)}")
        if found.is_complex() != (like.is_complex() and not self.stacked):
            raise TypeError(f"adjoint must give {'real' if self.stacked else like.dtype} signals, got {found.dtype}")
        return unpack(found, is_complex=like.is_complex()) if self.stacked else found

    def require_laws(self, like: Tensor, y: Tensor, given: Sequence[Tensor]) -> None:
        """Measure on random signals whether the operator is linear and its adjoint is one.

        Raises:
            ValueError: If a law does not hold, and by how much, or the operator gives NaN or infinity.
        """
        # Rounding in float32, through transforms of some thousand points, stays a hundred times below this.
        tolerance = 1e-3
        generator = torch.Generator().manual_seed(0)
        a, b, w = (_noise(t, generator) for t in (like, like, y))
        offset = self.predict(torch.zeros_like(like), y, given)
        of_a, of_b, of_sum = (self.predict(x, y, given) - offset for x in (a, b, a + b))
        check_finite("the operator's output, on zeros and on random signals,", of_sum)
        size = (norm(of_a) + norm(of_b)).clamp_min(torch.finfo(size_type(y)).tiny)
        if not (defect := float((norm(of_sum - of_a - of_b) / size).max())) <= tolerance:
            raise ValueError(
                f"operator is not linear: A(a + b) differs from A(a) + A(b) by {defect:.2g} of their size; "
                "pass linear=False and start=, the signals that the encoder sees"
            )
        back = self.transposed(w, like, given)
        size = (norm(of_a) * norm(w)).clamp_min(torch.finfo(size_type(y)).tiny)
        if not (defect := float(((inner(of_a, w) - inner(a, back)).abs() / size).max())) <= tolerance:
            raise ValueError(
                f"adjoint is not the operator's: ⟨A x, y⟩ and ⟨x, A* y⟩ differ by {defect:.2g} of ‖A x‖ ‖y‖; "
                "leave it out to have autograd's"
            )

    def gain(self, like: Tensor, y: Tensor, given: Sequence[Tensor]) -> Tensor:
        """The eigenvalue of ``A A*`` where it has one beside 0, else a mean of them: ``(B, 1, …)``, like ``y``.

        That of the derivative at signals ``like``, if A is not linear.
        """
        generator, small = torch.Generator().manual_seed(0), torch.finfo(size_type(y)).tiny
        back = self.transposed(_noise(y, generator), like, given)
        if self.linear:
            through = self.predict(back, y, given) - self.predict(torch.zeros_like(like), y, given)
        else:
            # A difference asks less of an operator than a second derivative would.
            at = norm(like)
            size = torch.finfo(size_type(y)).eps ** (1 / 3) * torch.where(at > 0, at, 1) / norm(back).clamp_min(small)
            ahead, behind = (self.predict(like + per_sample(step, like) * back, y, given) for step in (size, -size))
            through = (ahead - behind) / per_sample(2 * size, y)
        found = norm(through).square() / norm(back).square().clamp_min(small)
        return found.reshape(-1, *[1] * (y.ndim - 1))


def condition(
    mean: Tensor,
    covariance: Callable[[Tensor], Tensor],
    operator: Operator,
    y: Tensor,
    given: Sequence[Tensor],
    variance: Tensor,
    *,
    iterations: int = 200,
    tolerance: float = 1e-4,
) -> Tensor:
    """Mean of a Gaussian on signals, given measurements.

    Args:
        mean: Its mean before, ``(B, C, *size)``.
        covariance: Applies its covariance to signals.
        operator: A, linear up to an offset.
        y: What was measured.
        given: What the operator takes besides signals.
        variance: Variance of the measurements' noise, broadcastable to ``y`` as real numbers; 0 where they
            have none and are consistent.
        iterations: Most steps of conjugate gradients.
        tolerance: Relative residual at which a sample is done.
    """
    offset = operator.predict(torch.zeros_like(mean), y, given)

    def spread(w: Tensor) -> Tensor:
        through = operator.predict(covariance(operator.transposed(w, mean, given)), y, given) - offset
        return through + variance * w

    weights = torch.zeros_like(y)
    residual = y - operator.predict(mean, y, given)
    direction, energy = residual, norm(residual).square()
    least = energy * tolerance**2
    for _ in range(iterations):
        # A sample that is done stands still, so that no neighbour changes it.
        going = energy > least
        if not bool(going.any()):
            break
        moved = spread(direction)
        curvature = inner(direction, moved)
        size = torch.where(going & (curvature > 0), energy / curvature, 0)
        weights = weights + per_sample(size, y) * direction
        residual = residual - per_sample(size, y) * moved
        new = norm(residual).square()
        direction = residual + per_sample(torch.where(going, new / energy, 0), y) * direction
        energy = torch.where(going, new, energy)
    return mean + covariance(operator.transposed(weights, mean, given))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Real inner product of each sample: ``(B,)``."""
    product = a.conj() * b
    return (product.real if product.is_complex() else product).flatten(1).sum(1)


def norm(a: Tensor) -> Tensor:
    """Norm of each sample: ``(B,)``."""
    return inner(a, a).sqrt()


def size_type(y: Tensor) -> torch.dtype:
    """The real dtype of a tensor's parts."""
    return y.real.dtype if y.is_complex() else y.dtype


def _called(name: str, function: Map, x: Tensor, given: Sequence[Tensor]) -> Tensor:
    try:
        # A copy, since operators may work in place. Expanded signals are hard on them, too: the MKL of torch 2.6
        # transforms none.
        found: Any = function(x.clone(memory_format=torch.contiguous_format), *(t.clone() for t in given))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (x, *given))
        hint = f"; {_PER_SAMPLE}"
        hint += "; an operator on real and imaginary parts as channels needs stacked=True" if x.is_complex() else ""
        raise TypeError(f"{name} cannot take {shapes}: {error}{hint}") from error
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} must give a tensor, got {type(found).__name__}")
    return found


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """One random draw, the same for every sample."""
    drawn = torch.randn(like[:1].shape, generator=generator, device=generator.device, dtype=like.dtype)
    return drawn.to(like.device).expand_as(like)
