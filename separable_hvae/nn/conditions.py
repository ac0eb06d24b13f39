r"""Conditions: what priors and posteriors see beside their context.

    p(z_l | z_<l, c),   q(z_l | x, z_<l, c):        ĥ_s ← ĥ_s + a_s(c)        where a scale s begins
    h_s = B⁻¹_s m(c) + u_s · head_s(ĥ)                                        where the condition gives a mean m(c)

A condition maps what the user gives, a label, a vector, another signal, to one activation a_s for each scale.
With ``dropout`` it is replaced in training by a learned "unknown", now and then, which ``None`` stands for afterwards.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae._validation import (
    came,
    came_as,
    check_flag,
    check_integer,
    check_number,
    constructor_arguments,
    is_integer,
    shown,
)
from separable_hvae.decompositions import Decomposition
from separable_hvae.functional import COMPLEX, REAL, check_finite, pack, per_sample, resample, unpack, widen
from separable_hvae.nn.encoder import Encoder


class ConditionFeatures(NamedTuple):
    """What a model makes of the conditions of a batch.

    Attributes:
        activations: For each scale, coarse to fine, ``(B, width, *grid)``, or with axes of one that broadcast.
        mean: Signals ``(B, C, *size)`` that bands are predicted around; ``None`` for the mean of the training data.
        known: Which samples have a condition, ``(B,)`` bool; ``None`` where all have.
    """

    activations: list[Tensor]
    mean: Tensor | None = None
    known: Tensor | None = None


class Condition(nn.Module, ABC):
    """Map what the user gives to one activation for each scale.

    A subclass gives ``build``, ``check`` and ``forward``, and may give ``mean``. Its constructor takes settings alone
    and keeps each under its own name: a model copies the condition and lets it build its networks.

    Args:
        dropout: Share of the samples whose condition is replaced by a learned "unknown" in training, in [0, 1).
            Without it, a condition is always needed.

    Raises:
        TypeError: If ``dropout`` is no number.
        ValueError: If it is not in [0, 1).
    """

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = check_number("dropout", dropout, "in [0, 1)")

    @abstractmethod
    def build(self, decomp: Decomposition, *, width: int, bottleneck: int, blocks: int, gain: float) -> None:
        """Make the networks for a model.

        Args:
            decomp: The model's bound decomposition, with ``scales`` and ``grid(scale)``.
            width: Channels of the context.
            bottleneck: Channels inside residual blocks.
            blocks: Residual blocks at each scale of an encoder.
            gain: Factor on the last convolution of each residual branch, ``1/√L``.
        """

    @abstractmethod
    def check(self, condition: Any, batch: int) -> Any:
        """Return the condition of ``batch`` samples as :meth:`forward` takes it, on the networks' device.

        Raises:
            TypeError: If it has the wrong type.
            ValueError: If its shape or a value is not allowed.
        """

    @override
    @abstractmethod
    def forward(self, condition: Any) -> list[Tensor]:
        """Return the activation of each scale, coarse to fine: ``(B, width, *grid)``, or axes of one in its place."""

    def mean(self, condition: Any) -> Tensor | None:
        """Signals ``(B, C, *size)`` that bands are predicted around; ``None`` leaves them around the data's mean."""
        return None

    def config(self) -> dict[str, Any]:
        """Arguments that build this condition again; by default the attributes that the constructor's names have."""
        return constructor_arguments(self)

    def build_unknown(self, decomp: Decomposition, width: int) -> None:
        """Make what stands for a condition that is not known: zero at first."""
        ones = [1] * decomp.dims
        count = len(decomp.scales) if self.dropout else 0
        self.unknown = nn.ParameterList(nn.Parameter(torch.zeros(1, width, *ones)) for _ in range(count))

    def embed(self, condition: Any, batch: int, generator: torch.Generator | None = None) -> ConditionFeatures:
        """What the networks see of the conditions of ``batch`` samples, dropped at random in training.

        Raises:
            TypeError: If the condition has the wrong type.
            ValueError: If it is missing where there is no "unknown", or its shape or a value is not allowed.
        """
        if condition is None:
            if not self.dropout:
                raise ValueError(
                    "condition must be given, got None: only a model whose condition was trained with dropout= "
                    "knows what stands for an unknown one"
                )
            return ConditionFeatures([u.expand(batch, *u.shape[1:]) for u in self.unknown])
        condition = self.check(condition, batch)
        activations, mean, known = self(condition), self.mean(condition), None
        if self.training and self.dropout:
            device = activations[0].device
            drawn = torch.rand(batch, generator=generator, device=device if generator is None else generator.device)
            known = (drawn >= self.dropout).to(device)
            rows = per_sample(known, activations[0])
            activations = [torch.where(rows, a, u.to(a)) for a, u in zip(activations, self.unknown, strict=True)]
        return ConditionFeatures(activations, mean, known)


class ClassCondition(Condition):
    """A class of each sample: an embedding for each scale.

    A condition is a tensor ``(B,)`` of integers in ``[0, classes)``, or one integer for all samples.

    Args:
        classes: Number of classes.
        dropout: See :class:`Condition`.
    """

    def __init__(self, classes: int, *, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        self.classes = check_integer("classes", classes, 1)

    @override
    def build(self, decomp: Decomposition, *, width: int, bottleneck: int, blocks: int, gain: float) -> None:
        self.dims = decomp.dims
        self.embeddings = nn.ModuleList(nn.Embedding(self.classes, width) for _ in decomp.scales)
        for embedding in self.embeddings:
            nn.init.zeros_(cast(nn.Embedding, embedding).weight)

    @override
    def check(self, condition: Any, batch: int) -> Tensor:
        device = cast(nn.Embedding, self.embeddings[0]).weight.device
        if is_integer(condition):
            condition = torch.full((batch,), int(condition), device=device)
        if not isinstance(condition, Tensor) or condition.dtype not in _INTEGERS:
            raise TypeError(f"condition must be a tensor of integers, the classes, got {came_as(condition)}")
        _check_batch(condition, (), batch)
        if not torch.compiler.is_compiling() and not bool(((condition >= 0) & (condition < self.classes)).all()):
            low, high = int(condition.min()), int(condition.max())
            raise ValueError(f"condition must hold classes from 0 to {self.classes - 1}, got {low} to {high}")
        return condition.to(device, torch.int64)

    @override
    def forward(self, condition: Tensor) -> list[Tensor]:
        return [embedding(condition)[(...,) + (None,) * self.dims] for embedding in self.embeddings]


class VectorCondition(Condition):
    """A vector of each sample: a small network with one output for each scale.

    A condition is a real tensor ``(B, features)``. Vectors of order one are learned best.

    Args:
        features: Length of the vector.
        dropout: See :class:`Condition`.
    """

    def __init__(self, features: int, *, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        self.features = check_integer("features", features, 1)

    @override
    def build(self, decomp: Decomposition, *, width: int, bottleneck: int, blocks: int, gain: float) -> None:
        self.dims = decomp.dims
        self.enter = nn.Linear(self.features, width)
        self.leave = nn.ModuleList(nn.Linear(width, width) for _ in decomp.scales)
        for layer in self.leave:
            nn.init.normal_(cast(nn.Linear, layer).weight, std=gain / math.sqrt(width))
            nn.init.zeros_(cast(nn.Linear, layer).bias)

    @override
    def check(self, condition: Any, batch: int) -> Tensor:
        if not isinstance(condition, Tensor) or condition.dtype not in REAL:
            raise TypeError(f"condition must be a real floating-point tensor, the vectors, got {came_as(condition)}")
        _check_batch(condition, (self.features,), batch)
        check_finite("condition", condition)
        return condition.to(self.enter.weight)

    @override
    def forward(self, condition: Tensor) -> list[Tensor]:
        hidden = nn.functional.silu(self.enter(condition))
        return [layer(hidden)[(...,) + (None,) * self.dims] for layer in self.leave]


class SignalCondition(Condition):
    """Another signal of each sample, such as the previous frame or a low-resolution one: an encoder for it.

    A condition is a tensor ``(B, channels, *points)`` with as many axes as the model's signals; another number of
    points is resampled to theirs.

    Args:
        channels: Channels of the signal, complex ones counted once.
        is_complex: Whether it is complex.
        around: Whether bands are predicted around this signal, in place of the mean of the training data: it then
            is a first estimate, in the units of the model's signals.
        dropout: See :class:`Condition`.

    Raises:
        ValueError: In a model, if bands shall be predicted around a signal that has other channels than the model's.
    """

    def __init__(self, channels: int, *, is_complex: bool = False, around: bool = False, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        self.channels = check_integer("channels", channels, 1)
        check_flag("is_complex", is_complex)
        check_flag("around", around)
        self.is_complex, self.around = is_complex, around

    @override
    def build(self, decomp: Decomposition, *, width: int, bottleneck: int, blocks: int, gain: float) -> None:
        if self.around and (self.channels, self.is_complex) != (decomp.channels, decomp.is_complex):
            kinds = {True: "complex", False: "real"}
            raise ValueError(
                f"condition must have the {decomp.channels} {kinds[decomp.is_complex]} channels of the model's signals "
                f"where bands are predicted around it, got {self.channels} {kinds[self.is_complex]}"
            )
        self.size = decomp.size
        channels = self.channels * (2 if self.is_complex else 1)
        grids = [decomp.grid(s) for s in decomp.scales]
        self.encoder = Encoder(channels, grids, width=width, bottleneck=bottleneck, blocks=blocks, gain=gain)

    @override
    def check(self, condition: Any, batch: int) -> Tensor:
        if not isinstance(condition, Tensor) or condition.dtype not in (COMPLEX if self.is_complex else REAL):
            kind = "complex" if self.is_complex else "real floating-point"
            raise TypeError(f"condition must be a {kind} tensor, the signals, got {came_as(condition)}")
        if condition.ndim != 2 + len(self.size) or condition.shape[1] != self.channels or not condition.numel():
            wanted = f"({batch}, {self.channels}, {', '.join('*' * len(self.size))})"
            raise ValueError(f"condition must have shape {wanted}, got {tuple(condition.shape)}")
        _check_batch(condition, condition.shape[1:], batch)
        check_finite("condition", condition)
        return resample(widen(pack(condition)).to(self.encoder.stem.weight.device), self.size)

    @override
    def forward(self, condition: Tensor) -> list[Tensor]:
        return self.encoder(condition.to(self.encoder.stem.weight.dtype))  # type: ignore[no-any-return]

    @override
    def mean(self, condition: Tensor) -> Tensor | None:
        return unpack(condition, is_complex=self.is_complex) if self.around else None


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_batch(condition: Tensor, shape: Sequence[int], batch: int) -> None:
    wanted = (batch, *shape)
    if tuple(condition.shape) != wanted:
        raise ValueError(f"condition must have shape {wanted}, one for each sample, got {tuple(condition.shape)}")


def built(condition: object, decomp: Decomposition, *, width: int, **sizes: Any) -> Condition | None:
    """A copy of a condition with its networks, see :meth:`Condition.build`; ``None`` for none.

    Raises:
        TypeError: If it is no :class:`Condition`.
    """
    if condition is None:
        return None
    if not isinstance(condition, Condition):
        raise TypeError(f"condition must be a Condition, such as ClassCondition(10), or None, got {came(condition)}")
    copy = deepcopy(condition)
    copy.build(decomp, width=width, **sizes)
    copy.build_unknown(decomp, width)
    return copy


def embedded(
    module: Condition | None, condition: Any, batch: int, generator: torch.Generator | None
) -> ConditionFeatures | None:
    """What the networks see of a condition, see :meth:`Condition.embed`; ``None`` for a model without.

    Raises:
        ValueError: If a condition is given to a model without.
    """
    if module is not None:
        return module.embed(condition, batch, generator)
    if condition is not None:
        kind = shown(condition) if isinstance(condition, (Tensor, int)) else came(condition)
        raise ValueError(f"condition must be None for a model without one, got {kind}")
    return None


CONDITIONS: dict[str, type[Condition]] = {c.__name__: c for c in (ClassCondition, VectorCondition, SignalCondition)}
"""The library's own conditions, by the name that a saved configuration calls them."""
