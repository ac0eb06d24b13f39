r"""Measurements y ≈ A(x) of signals, with A any linear or differentiable operator.

    d(h) = −log p(y | A(Σ_s B_s h_s))                                    nats

under Gaussian, Laplace or Poisson noise. A decoder leaves each signal a standard deviation of σ, so the
variance of y around A(Σ B h) is σ_n² + σ² A A*, where A A* counts by its eigenvalue (one number; exact
for masks, averages over blocks and whatever else has A A* = g I on its range; if A is not linear, that of
its derivative at what the encoder sees). A subset sees

    d_s(h_s) = −log p(y | A(B_s h_s + Σ_{s'≠s} B_s' h_s'))

with the other bands as they are. While finer ones are not known yet, their mean stands for them, and the
variance that they would add to y for that of what is not predicted: the subset listens to y where the
finer bands do not speak.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae._float32 import full_precision
from separable_hvae._validation import (
    came,
    came_as,
    check_callable,
    check_flag,
    check_generator,
    check_instance,
    is_number,
)
from separable_hvae.data_terms.base import BoundTerm, DataTerm, Misfit, piece
from separable_hvae.data_terms.gaussian_inference import covariance, draws, mean_bands, standard, white
from separable_hvae.data_terms.operator import Map, Operator, condition
from separable_hvae.data_terms.physics import Physics, noise_of
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.distributions.noise import GaussianNoise, Noise
from separable_hvae.functional import as_plain, check_finite, real
from separable_hvae.model.hvae import HVAE
from separable_hvae.nn.decoder import Observation

Fill = Literal["bands", "mean"]
FILLS: dict[Fill, Callable[[HVAE, Tensor], Tensor]] = {"bands": covariance, "mean": white}
_DRAWS = 32


class Measurement(DataTerm):
    """Measurements of signals.

    Unless ``start`` says otherwise, the encoder sees the best linear estimate under what the model was
    calibrated with: the mean and the deviation of each band (``fill="bands"``), or one deviation for all,
    which leaves what was not measured at the mean (``fill="mean"``, the pseudo-inverse). The first does more
    for missing pixels, the second for missing k-space samples of a model with wavelet bands.

    Args:
        y: Measurements, batch first, real or complex.
        operator: A callable ``(x, *given) -> y`` on signals ``(B, C, *size)``, or an object with methods ``A``
            and perhaps ``A_adjoint``, such as a deepinv physics.
        noise: A :class:`Noise`, or the standard deviation of Gaussian noise (of real and imaginary part
            alike; 0 for none; a tensor that broadcasts to y where samples or entries differ). ``None`` reads
            the ``noise_model`` of a deepinv physics.
        adjoint: A callable ``(y, *given) -> x``, of a linear operator; ``None`` takes the physics' own, or autograd's.
        given: Tensors, batch first, that the operator takes besides signals: masks, coil sensitivities.
        linear: Whether the operator is linear up to an offset.
        stacked: Whether the operator takes real and imaginary part as channels ``(B, 2C, *size)``, as
            deepinv's MRI does.
        start: Signals ``(B, C, *size)`` for the encoder to see; needed where the operator is not linear.
        fill: How the encoder's first look completes what was not measured, see above.

    Raises:
        TypeError: If an argument has the wrong type, or there is no noise level.
        ValueError: If sizes do not fit, or the noise cannot give such measurements.
    """

    def __init__(
        self,
        y: Tensor,
        operator: Map | Physics,
        noise: Noise | Tensor | float | None = None,
        *,
        adjoint: Map | None = None,
        given: Sequence[Tensor] = (),
        linear: bool = True,
        stacked: bool = False,
        start: Tensor | None = None,
        fill: Fill = "bands",
    ) -> None:
        if not isinstance(y, Tensor) or not (y.is_floating_point() or y.is_complex()):
            raise TypeError(f"y must be a real or complex tensor, got {came_as(y)}")
        if y.ndim < 2 or not len(y):
            raise ValueError(f"y must hold at least one sample, batch first, got shape {tuple(y.shape)}")
        if isinstance(operator, Physics) and callable(operator.A):
            noise = noise_of(operator) if noise is None else noise
            adjoint, operator = adjoint or getattr(operator, "A_adjoint", None), operator.A
        elif not callable(operator):
            raise TypeError(f"operator must be a callable or have a method A, got {type(operator).__name__}")
        if adjoint is not None:
            check_callable("adjoint", adjoint, "(y, *given) -> x")
        check_flag("linear", linear)
        check_flag("stacked", stacked)
        if start is not None:
            check_instance("start", start, Tensor)
        if isinstance(given, Tensor) or not isinstance(given, Sequence):
            raise TypeError(f"given must be a sequence of tensors, got {type(given).__name__}")
        if noise is None:
            raise TypeError("noise must be a Noise or a standard deviation, 0 where y has none, got None")
        for i, tensor in enumerate(given):
            if not isinstance(tensor, Tensor) or tensor.ndim < 1 or len(tensor) != len(y):
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else came(tensor)
                raise ValueError(f"given[{i}] must be a tensor of {len(y)} samples, batch first, got {got}")
        if start is None and not linear:
            raise ValueError("start must be given where the operator is not linear: the encoder has to see signals")
        if fill not in list(FILLS):
            raise ValueError(f"fill must be one of {sorted(FILLS)}, got {fill!r}")
        if not isinstance(noise, (Noise, Tensor)) and not is_number(noise):
            raise TypeError(f"noise must be a Noise or a standard deviation, got {noise!r}")
        self.noise = noise if isinstance(noise, Noise) else GaussianNoise(noise)
        self.noise.check(y)
        self.y, self.given = as_plain(y.detach()), tuple(as_plain(t.detach()) for t in given)
        self.start = None if start is None else as_plain(start.detach())
        self.fill: Fill = fill
        self.operator = Operator(operator, adjoint if linear else None, stacked, linear)
        if not linear and not bool((self._variance(self.y) > 0).all()):
            raise ValueError("noise must have a positive standard deviation where the operator is not linear, got 0")

    @override
    def __len__(self) -> int:
        return len(self.y)

    @override
    def rows(self, rows: slice | Tensor) -> Self:
        part = copy(self)
        part.y, part.noise, part.given = self.y[rows], self.noise.rows(rows), tuple(t[rows] for t in self.given)
        part.start = None if self.start is None else self.start[rows]
        return part

    @override
    def guess(self, model: HVAE) -> Tensor:
        y, given = self._read(model)
        mean = self._mean(model)
        self.operator.predict(mean, y, given)
        if self.operator.linear:
            self.operator.require_laws(mean, y, given)
        if self.start is not None:
            x = model.decomp.check_signal(self.start, "start")
            if len(x) != len(y) or x.device != y.device:
                raise ValueError(
                    f"start must hold {len(y)} signals on {y.device}, as y does, got {len(x)} on {x.device}"
                )
            return x.detach().to(mean.dtype)
        return condition(mean, partial(FILLS[self.fill], model), self.operator, y, given, self._variance(y))

    @override
    def bind(self, model: HVAE, seen: Observation) -> BoundTerm:
        y, given = self._read(model)
        with torch.no_grad():
            means = [mean.expand(len(y), *mean.shape[1:]) for mean in mean_bands(model)]
            own = self._decoder_variance(model, seen.x, y, given)
            found: dict[tuple[int, ...], Tensor] = {}
            drawn = cache(partial(draws, model, _DRAWS))

        def targets(index: int, bands: Sequence[Tensor | None], _: Sequence[Tensor]) -> list[Tensor]:
            unknown = tuple(i for i, band in enumerate(bands) if band is None and i > index)
            full = [mean if band is None else band.detach() for mean, band in zip(means, bands, strict=True)]
            full[index] = torch.zeros_like(full[index])
            with torch.no_grad():
                if unknown and unknown not in found:
                    unsaid = [h if i in unknown else None for i, h in enumerate(drawn())]
                    found[unknown] = self._unexplained_variance(model, unsaid, seen.x, y, given)
                return [model.decomp.synthesis(full), y, own + found[unknown] if unknown else own, *given]

        misfit = MeasurementMisfit(model.decomp, self.operator, self.noise)
        return BoundTerm(misfit, [y, own, *given], targets, pure=False)

    def correct(self, model: HVAE, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The signals given the latents that decode to ``x`` and the measurements: their mean, or a draw.

        The likelihood is a Gaussian of deviation σ around ``x``; measurements without noise are met as far as
        the solver goes.

        Args:
            model: The model.
            x: Decoded signals ``(B, C, *size)``.
            generator: Random numbers of a draw; ``None`` gives the mean.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the operator is not linear, or ``x`` does not fit the model or the measurements.
        """
        check_instance("model", model, HVAE)
        check_generator(generator)
        if not self.operator.linear:
            raise ValueError("correct needs an operator that is linear")
        if len(model.decomp.check_signal(x)) != len(self):
            raise ValueError(f"x must hold {len(self)} signals, as many as were measured, got {len(x)}")
        check_finite("x", x)
        y, given = self._read(model)
        own, variance, dtype = model.likelihood.variance.detach(), self._variance(y), x.dtype
        x = as_plain(x.detach()).to(self._mean(model).dtype)
        if generator is not None:
            # Perturb both sides, then condition: the result is a draw of the conditional Gaussian.
            x = x + own.sqrt() * standard(x, generator)
            y = y + variance.sqrt() * standard(y, generator)
        with torch.no_grad():
            return condition(x, lambda r: own * r, self.operator, y, given, variance).to(dtype)

    def _read(self, model: HVAE) -> tuple[Tensor, list[Tensor]]:
        """Measurements and what the operator takes besides signals, in the model's precision."""
        for name, tensor in {"y": self.y, **{f"given[{i}]": t for i, t in enumerate(self.given)}}.items():
            if tensor.device != model.device:
                raise ValueError(f"{name} is on {tensor.device}, the model on {model.device}")
        wanted = model.real_dtype

        def cast(t: Tensor) -> Tensor:
            # Tensors from inference mode could not be used with autograd.
            t = t.clone() if t.is_inference() else t
            if not (t.is_floating_point() or t.is_complex()):
                return t
            return t.to(wanted.to_complex() if t.is_complex() else wanted)

        with torch.inference_mode(False):
            return cast(self.y), [cast(t) for t in self.given]

    def _mean(self, model: HVAE) -> Tensor:
        """The mean signal of the training data, for each sample."""
        mean = model.decomp.synthesis(mean_bands(model))
        return mean.expand(len(self), *mean.shape[1:]).contiguous()

    def _variance(self, y: Tensor) -> Tensor:
        """Variance of the noise, broadcastable to ``y``."""
        return self.noise.variance(y.real if y.is_complex() else y)

    def _decoder_variance(self, model: HVAE, like: Tensor, y: Tensor, given: Sequence[Tensor]) -> Tensor:
        """Variance that the decoder's own σ adds to real measurements, ``(B, 1, …)``."""
        gain = self.operator.gain(like, y, given).clamp_min(1e-12)  # Samples of which nothing is measured.
        return model.likelihood.variance.detach() * (gain[..., None] if y.is_complex() else gain)

    def _unexplained_variance(
        self, model: HVAE, unknown: Sequence[Tensor | None], like: Tensor, y: Tensor, given: Sequence[Tensor]
    ) -> Tensor:
        """Variance that unknown bands, given as draws, add to real measurements."""
        mean = model.decomp.synthesis(mean_bands(model)).expand_as(like)
        middle = self.operator.predict(mean, y, given)
        total = torch.zeros_like(real(y))
        for drawn in model.decomp.synthesis(unknown).split(1):
            total += real(self.operator.predict(mean + drawn, y, given) - middle).square()
        return total / _DRAWS


@dataclass(frozen=True)
class MeasurementMisfit(Misfit):
    """Negative log-likelihood of measurements.

    Attributes:
        decomp: The decomposition.
        operator: What measures a signal.
        noise: How measurements scatter.
    """

    decomp: Decomposition
    operator: Operator
    noise: Noise

    @override
    def local(self, index: int, band: Tensor, targets: Sequence[Tensor]) -> Tensor:
        others, y, unexplained, *given = targets
        return self._compare(piece(self.decomp, index, band) + others, y, unexplained, given)

    @override
    def total(self, bands: Sequence[Tensor], data: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        y, unexplained, *given = data
        x = self.decomp.synthesis(bands)
        return [(self.decomp.scales[-1], self._compare(x, y, unexplained, given))]

    def _compare(self, x: Tensor, y: Tensor, unexplained: Tensor, given: Sequence[Tensor]) -> Tensor:
        with full_precision(x.device):  # A noise model may be a user's.
            return self.noise.misfit(real(self.operator.predict(x, y, given)), real(y), unexplained)
