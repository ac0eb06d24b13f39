r"""Heads: from the context at the end of a subset to the band that its scale emits.

    h_s = m_s + u_s · head_s(ĥ),

where m_s and u_s are the mean and the deviation of band s over the training data (the subset applies
them), so that every head predicts numbers of order one. Residual blocks, then one convolution: what the
latents add to the context reaches the band along a linear path, however deep the blocks are. (A swish
before that convolution doubled the squared error on CIFAR-10 at equal steps, and changed little on digits.)
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import resample, widen
from separable_hvae.nn.blocks import ResidualBlock, conv

EMIT_GAIN = 0.5
"""Initial bands are small against their unit, so that training does not start by unlearning them."""


class ScaleHead(nn.Module, ABC):
    """Map the context ``(B, width, *grid)`` at the end of a subset to a band ``(B, *band_shape)``.

    A subclass gives ``forward``, and may give a cheaper ``read``.
    The model builds one head for each band with these arguments, and a subclass takes the same.

    Args:
        decomp: The bound decomposition.
        scale: The scale whose band is emitted.
        width: Channels of the context.
        bottleneck: Channels inside residual blocks.
        blocks: Residual blocks of the head.
        gain: Factor on the last convolution of each residual branch, ``1/√L``.
    """

    decomp: Decomposition

    def __init__(
        self, decomp: Decomposition, scale: int, *, width: int, bottleneck: int, blocks: int, gain: float
    ) -> None:
        super().__init__()
        # The model's, no submodule: it is moved with the model, and its state counts once.
        self.__dict__["decomp"] = decomp
        self.scale = scale
        self.grid = decomp.grid(scale)
        self.shape = decomp.band_shapes[scale]
        self.blocks = nn.Sequential(*(ResidualBlock(width, bottleneck, self.grid, gain=gain) for _ in range(blocks)))

    @override
    @abstractmethod
    def forward(self, context: Tensor) -> Tensor:
        """Return the standardised band ``(B, *band_shape)``."""

    def read(self, context: Tensor) -> Tensor:
        """The standardised band that a context says on its way, roughly: posteriors are shown what it lacks.

        Every posterior calls it, so it should cost little; by default it is the head itself.
        """
        return self(context)  # type: ignore[no-any-return]


class GridHead(ScaleHead):
    """Predict a small signal on the band's picture grid and take its band (``from_grid``).

    Convolutions think in space, so this is the default.
    """

    def __init__(
        self, decomp: Decomposition, scale: int, *, width: int, bottleneck: int, blocks: int, gain: float
    ) -> None:
        super().__init__(decomp, scale, width=width, bottleneck=bottleneck, blocks=blocks, gain=gain)
        channels, *points = decomp.picture_shape(scale)
        self.points = tuple(points)
        self.emit = conv(width, channels, self.points, gain=EMIT_GAIN)
        if decomp.mean_in_first_band and scale != decomp.band_scales[0]:
            # The band hears nothing of a constant: the bias would get gradients of rounding, which Adam blows up.
            self.emit.bias = None

    @override
    def forward(self, context: Tensor) -> Tensor:
        return self.read(self.blocks(context))

    @override
    def read(self, context: Tensor) -> Tensor:
        picture = self.emit(context if context.shape[2:] == self.points else resample(context, self.points))
        return self.decomp.from_grid(self.scale, picture if picture.dtype == torch.float32 else widen(picture))


class CoefficientHead(ScaleHead):
    """Predict the coefficients directly, as the paper does.

    A band with a grid of its own is predicted there; coefficients without one are laid out over the
    context's grid in order, as many channels as they need.
    """

    def __init__(
        self, decomp: Decomposition, scale: int, *, width: int, bottleneck: int, blocks: int, gain: float
    ) -> None:
        super().__init__(decomp, scale, width=width, bottleneck=bottleneck, blocks=blocks, gain=gain)
        self.on_grid = len(self.shape) == 1 + decomp.dims
        if self.on_grid:
            self.emit = conv(width, self.shape[0], self.shape[1:], gain=EMIT_GAIN)
        else:
            self.rows = math.prod(self.shape[:-1])
            self.columns = -(-self.shape[-1] // math.prod(self.grid))
            self.emit = conv(width, self.rows * self.columns, self.grid, gain=EMIT_GAIN)

    @override
    def forward(self, context: Tensor) -> Tensor:
        return self.read(self.blocks(context))

    @override
    def read(self, context: Tensor) -> Tensor:
        if self.on_grid:
            return self.emit(resample(context, self.shape[1:]))  # type: ignore[no-any-return]
        flat = self.emit(context).reshape(context.shape[0], self.rows, self.columns * math.prod(self.grid))
        return flat[..., : self.shape[-1]].reshape(context.shape[0], *self.shape)  # type: ignore[no-any-return]


HEADS: dict[str, type[ScaleHead]] = {"grid": GridHead, "coefficient": CoefficientHead}


def head_class(head: str | type[ScaleHead]) -> type[ScaleHead]:
    """The class that a name stands for, or that was given.

    Raises:
        TypeError: If it is neither a name nor a subclass of :class:`ScaleHead`.
        ValueError: If the name is unknown.
    """
    if isinstance(head, str):
        if head not in HEADS:
            raise ValueError(f"head must be one of {sorted(HEADS)} or a ScaleHead subclass, got {head!r}")
        return HEADS[head]
    if not (isinstance(head, type) and issubclass(head, ScaleHead)):
        raise TypeError(f"head must be a name or a ScaleHead subclass, got {head!r}")
    return head
