r"""Decompositions: invertible linear maps between a signal and its bands.

A decomposition writes a signal as a sum of linear pieces, one for each scale,

    x = Σ_s B_s h_s,        h = B⁻¹ x,

and promises ``synthesis(analysis(x)) == x`` with both maps linear. Where it declares itself
*orthonormal*, ‖x‖² = Σ_s ‖h_s‖², so squared error in the bands is squared error in the signal,
and the bands have as many entries as the signal has real degrees of freedom.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from inspect import getattr_static, isfunction
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae._float32 import in_full_precision
from separable_hvae._validation import check_flag, constructor_arguments
from separable_hvae.decompositions import checks, laws
from separable_hvae.functional import pack, resample, unpack


class _Ready(nn.Module):
    """A module that takes tensors from the first line of a subclass's constructor on."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        nn.Module.__init__(made)
        return made

    def __init__(self) -> None:
        """Leave what is there: a module's own constructor would drop its tensors."""


class Decomposition(_Ready, ABC):
    """Invertible linear map between a signal ``(B, C, *size)`` and its bands, coarse to fine.

    A subclass gives :meth:`analysis`, :meth:`synthesis` and :meth:`band_shape`; everything else has
    a default that follows from them. Set ``orthonormal = True`` where the map is an isometry:
    refinement then measures data terms band by band. :meth:`check` measures every law.

    A subclass's constructor sets what the maps need and calls ``super().__init__`` last. Parameters, buffers
    and modules among it are trained, moved, copied and saved with the model. The maps and pictures run in
    float32 or float64, whatever autocast says.

    >>> class Halves(Decomposition):  # The left half of a signal, then the right one.
    ...     orthonormal = True
    ...     def band_shape(self, scale):
    ...         return (self.channels, self.size[0] // 2)
    ...     def analysis(self, x):
    ...         return list(self.check_signal(x).chunk(2, dim=2))
    ...     def synthesis(self, bands):
    ...         return torch.cat(self.check_bands(bands), dim=2)
    >>> report = Halves([8], channels=1, scales=[4, 8]).check()  # Raises an error where a law is broken.
    >>> report.errors["reconstruction"]
    0.0

    Args:
        size: Points on each axis of the signal, one to three axes; an int is a square.
        channels: Channels of the signal, complex ones counted once.
        scales: Resolutions of the hierarchy, increasing, the last one ``max(size)``;
            ``None`` takes :meth:`default_scales`.
        is_complex: Whether signals are complex.

    Attributes:
        size: Points on each axis, a tuple.
        real_channels: Channels of the signal as real numbers.
        numel: Real degrees of freedom of one signal, the dimension that "nats per dimension" divides by.
        band_shapes: Shape of one sample's band for each scale that emits one, coarse to fine.
        band_scales: These scales.

    Raises:
        TypeError: If a size, a channel count or a scale is no integer, or ``is_complex`` no flag.
        ValueError: If sizes or channels are not positive, or scales do not increase or do not end
            in ``max(size)``.
    """

    orthonormal: bool = False
    mean_in_first_band: bool = False
    """Whether the first band alone hears of a constant signal: heads of the others then have no bias."""

    @override
    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("analysis", "synthesis", "project", "to_grid", "from_grid"):
            if isfunction(method := getattr_static(cls, name)) and not hasattr(method, "in_full_precision"):
                setattr(cls, name, in_full_precision(method))

    def __init__(
        self, size: int | Sequence[int], channels: int, scales: Sequence[int] | None = None, *, is_complex: bool = False
    ) -> None:
        super().__init__()
        self.size = checks.check_size(size)
        self.channels = checks.positive("channels", channels)
        check_flag("is_complex", is_complex)
        self.is_complex = is_complex
        self.real_channels = self.channels * (2 if is_complex else 1)
        self.numel = self.real_channels * math.prod(self.size)
        self._set_scales(self.default_scales() if scales is None else scales)

    def _set_scales(self, scales: Sequence[int]) -> None:
        self.scales = checks.check_scales(scales, self.size)
        # Tensors made in inference mode could not be used with autograd later.
        with torch.inference_mode(False):
            self.build()
        self.band_shapes = checks.check_band_shapes(self)
        self.band_scales = tuple(self.band_shapes)

    # What a subclass gives.

    @abstractmethod
    @in_full_precision
    def analysis(self, x: Tensor) -> list[Tensor]:
        """Split signals ``(B, C, *size)``, real or complex as the decomposition says, into bands.

        Returns:
            One real tensor ``(B, *band_shape(s))`` for each scale that emits a band, coarse to fine.
        """

    @abstractmethod
    @in_full_precision
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        """Sum bands into signals ``(B, C, *size)``, ``Σ_s B_s h_s``.

        Args:
            bands: Bands coarse to fine, as :meth:`analysis` gives them; ``None`` and bands missing
                at the end count as zero. At least one is a tensor.
        """

    @abstractmethod
    def band_shape(self, scale: int) -> Sequence[int] | None:
        """Shape of one sample's band at ``scale``; ``None`` where the scale emits no band."""

    # What follows from it, and may be overridden.

    def build(self) -> None:
        """Make what depends on ``self.scales``; called by the constructor and, for other scales, by :meth:`bind`.

        What is learned is made in the constructor: here, other scales would make it anew.
        """

    def default_scales(self) -> tuple[int, ...]:
        """Scales where none are given: the largest size, halved (rounding up) down to 1."""
        scales = [max(self.size)]
        while scales[-1] > 1:
            scales.append(-(-scales[-1] // 2))
        return tuple(reversed(scales))

    @in_full_precision
    def project(self, scale: int, r: Tensor) -> Tensor:
        """Return the band ``(B, *band_shape(scale))`` that explains most of a residual signal ``r``."""
        return self.checked_analysis(r)[self.band_index(scale)]

    def picture_shape(self, scale: int) -> tuple[int, ...]:
        """Shape ``(channels, *points)`` of one sample's picture of a band (see :meth:`to_grid`)."""
        self.band_index(scale)
        return (self.real_channels, *(min(2 * scale, n) for n in self.size))

    @in_full_precision
    def to_grid(self, scale: int, h: Tensor) -> Tensor:
        """Show a band ``(B, *band_shape(scale))`` as a small real signal near its scale's resolution.

        Returns:
            Picture ``(B, *picture_shape(scale))``; complex channels stand as real and imaginary part.
        """
        alone: list[Tensor | None] = [None] * len(self.band_shapes)
        alone[self.band_index(scale)] = self.check_band(scale, h)
        return resample(pack(self.synthesis(alone)), self.picture_shape(scale)[1:])

    @in_full_precision
    def from_grid(self, scale: int, y: Tensor) -> Tensor:
        """Return the band ``(B, *band_shape(scale))`` of a small real signal ``(B, *picture_shape(scale))``."""
        y = self.check_picture(scale, y)
        return self.project(scale, unpack(resample(y, self.size), is_complex=self.is_complex))

    # What is the same for all.

    def bind(self, scales: Sequence[int]) -> Self:
        """Return a copy of this decomposition with these scales.

        Raises:
            ValueError: If the scales do not fit the signal (see the class).
        """
        with torch.inference_mode(False):
            bound = copy.deepcopy(self)
        if checks.check_scales(scales, self.size) != bound.scales:
            bound._set_scales(scales)
        return bound

    checked_analysis = checks.checked_analysis
    band_index = checks.band_index
    check_signal = checks.check_signal
    check_band = checks.check_band
    check_bands = checks.check_bands
    check_picture = checks.check_picture

    @property
    def dims(self) -> int:
        """Number of axes of the signal."""
        return len(self.size)

    def grid(self, scale: int) -> tuple[int, ...]:
        """Points ``min(s, n_d)`` on each axis of the latents at ``scale``."""
        return tuple(min(scale, n) for n in self.size)

    def config(self) -> dict[str, Any]:
        """Arguments that build this decomposition again: what JSON can hold.

        The default reads, for each argument of the constructor, the attribute of the same name. Override
        it where the two differ, as where one number makes the tuple ``size``. Tensors are no arguments:
        keep them as buffers or parameters, which are saved by themselves, of a shape that the arguments give.

        Raises:
            TypeError: If an attribute is missing or JSON cannot hold it.
        """
        return constructor_arguments(self)

    check = laws.check

    @override
    def extra_repr(self) -> str:
        kind = ", complex" if self.is_complex else ""
        return f"size={self.size}, channels={self.channels}, scales={list(self.scales)}{kind}"
