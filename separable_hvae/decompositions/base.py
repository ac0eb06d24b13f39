r"""Decompositions: invertible linear maps between a signal and its bands.

A decomposition writes a signal as a sum of linear pieces, one for each scale,

    x = Σ_s B_s h_s,        h = B⁻¹ x,

and promises ``synthesis(analysis(x)) == x`` with both maps linear. Where it declares itself
*orthonormal*, ‖x‖² = Σ_s ‖h_s‖², so squared error in the bands is squared error in the signal,
and the bands have as many entries as the signal has real degrees of freedom.
"""

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae._float32 import full_precision
from separable_hvae._validation import (
    came,
    came_as,
    check_flag,
    check_instance,
    check_number,
    constructor_arguments,
    is_integer,
    listed,
    shown,
)
from separable_hvae.decompositions.laws import LawReport, measure_laws, wrong_bands
from separable_hvae.functional import COMPLEX, REAL, pack, resample, unpack, widen

P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D", bound="Decomposition")


def transform(method: Callable[Concatenate[D, P], R]) -> Callable[Concatenate[D, P], R]:
    """Run a decomposition's method in float32 or float64, whatever autocast says."""

    @wraps(method)
    def wrapped(self: D, *args: P.args, **kwargs: P.kwargs) -> R:
        given = [*args, *kwargs.values()]
        tensors = [t for a in given for t in (a if isinstance(a, Sequence) else [a]) if isinstance(t, Tensor)]
        if not tensors:
            return method(self, *args, **kwargs)
        with full_precision(tensors[0].device):
            return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[D, P], R], wrapped)


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
    and modules among it are trained, moved, copied and saved with the model.

    Args:
        size: Points on each axis of the signal, one to three axes; an int is a square.
        channels: Channels of the signal, complex ones counted once.
        scales: Resolutions of the hierarchy, increasing, the last one ``max(size)``;
            ``None`` takes :meth:`default_scales`.
        is_complex: Whether signals are complex.

    Raises:
        TypeError: If a size, a channel count or a scale is no integer, or ``is_complex`` no flag.
        ValueError: If sizes or channels are not positive, or scales do not increase or do not end
            in ``max(size)``.
    """

    orthonormal: bool = False
    mean_in_first_band: bool = False
    """Whether the first band alone hears of a constant signal: heads of the others then have no bias."""

    def __init__(
        self, size: int | Sequence[int], channels: int, scales: Sequence[int] | None = None, *, is_complex: bool = False
    ) -> None:
        super().__init__()
        self.size = tuple(_positive("size", n) for n in sides(size, None))
        if not 1 <= len(self.size) <= 3:
            raise ValueError(f"size must have one to three axes, got {self.size}")
        self.channels = _positive("channels", channels)
        check_flag("is_complex", is_complex)
        self.is_complex = is_complex
        self._set_scales(scales)

    def _set_scales(self, scales: Sequence[int] | None) -> None:
        self.scales = self._checked_scales(self.default_scales() if scales is None else scales)
        # Tensors made in inference mode could not be used with autograd later.
        with torch.inference_mode(False):
            self.build()
        self.band_shapes = {s: tuple(shape) for s in self.scales if (shape := self.band_shape(s)) is not None}
        if self.scales[-1] not in self.band_shapes:
            previous = self.scales[-2] if len(self.scales) > 1 else 0
            raise ValueError(
                f"scales {list(self.scales)} leave the last band empty: nothing of a signal of size "
                f"{self.size} lies between scale {previous} and scale {self.scales[-1]}"
            )

    def _checked_scales(self, scales: Sequence[int]) -> tuple[int, ...]:
        scales = cast(Sequence[int], listed(scales))
        if isinstance(scales, str) or not isinstance(scales, Sequence):
            raise TypeError(f"scales must be a sequence of integers, got {shown(scales)}")
        checked = tuple(_positive("scales", s) for s in scales)
        if not checked or any(b <= a for a, b in itertools.pairwise(checked)):
            raise ValueError(f"scales must increase, coarse to fine, got {list(scales)}")
        if checked[-1] != max(self.size):
            raise ValueError(f"scales must end in the signal's largest size, {max(self.size)}, got {list(scales)}")
        return checked

    # What a subclass gives.

    @abstractmethod
    def analysis(self, x: Tensor) -> list[Tensor]:
        """Split signals into bands.

        Args:
            x: Signals ``(B, C, *size)``, real or complex as the decomposition says.

        Returns:
            One real tensor ``(B, *band_shape(s))`` for each scale that emits a band, coarse to fine.
        """

    @abstractmethod
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        """Sum bands into signals, ``Σ_s B_s h_s``.

        Args:
            bands: Bands coarse to fine, as :meth:`analysis` gives them; ``None`` and bands missing
                at the end count as zero. At least one is a tensor.

        Returns:
            Signals ``(B, C, *size)``.
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

    def project(self, scale: int, r: Tensor) -> Tensor:
        """Return the band ``(B, *band_shape(scale))`` that explains most of a residual signal ``r``."""
        return self.checked_analysis(r)[self.band_index(scale)]

    def picture_shape(self, scale: int) -> tuple[int, ...]:
        """Shape ``(channels, *points)`` of one sample's picture of a band (see :meth:`to_grid`)."""
        self.band_index(scale)
        return (self.real_channels, *(min(2 * scale, n) for n in self.size))

    def to_grid(self, scale: int, h: Tensor) -> Tensor:
        """Show a band as a small real signal near its scale's resolution.

        Args:
            scale: The band's scale.
            h: Band ``(B, *band_shape(scale))``.

        Returns:
            Picture ``(B, *picture_shape(scale))``; complex channels stand as real and imaginary part.
        """
        alone: list[Tensor | None] = [None] * len(self.band_shapes)
        alone[self.band_index(scale)] = self.check_band(scale, h)
        return resample(pack(self.synthesis(alone)), self.picture_shape(scale)[1:])

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
        if bound._checked_scales(scales) != bound.scales:
            bound._set_scales(scales)
        return bound

    def checked_analysis(self, x: Tensor) -> list[Tensor]:
        """``analysis(x)``, once it is known to hold what it promises.

        Raises:
            ValueError: If it does not give one real tensor of the promised shape for each band.
        """
        bands = self.analysis(x)
        wrong, remark = wrong_bands(self, bands)
        if wrong:
            raise ValueError(f"{type(self).__name__} breaks its contract: {remark}")
        return bands

    @property
    def dims(self) -> int:
        """Number of axes of the signal."""
        return len(self.size)

    @property
    def real_channels(self) -> int:
        """Channels of the signal as real numbers."""
        return self.channels * (2 if self.is_complex else 1)

    @property
    def numel(self) -> int:
        """Real degrees of freedom of one signal, the dimension that "nats per dimension" divides by."""
        return self.real_channels * math.prod(self.size)

    @property
    def band_scales(self) -> tuple[int, ...]:
        """The scales that emit a band, coarse to fine."""
        return tuple(self.band_shapes)

    def grid(self, scale: int) -> tuple[int, ...]:
        """Points ``min(s, n_d)`` on each axis of the latents at ``scale``."""
        return tuple(min(scale, n) for n in self.size)

    def band_index(self, scale: int) -> int:
        """Position of a scale's band among the bands.

        Raises:
            ValueError: If the scale emits no band.
        """
        if not isinstance(scale, Hashable) or scale not in self.band_shapes:
            raise ValueError(f"scale {shown(scale)} emits no band; the scales that do are {list(self.band_shapes)}")
        return list(self.band_shapes).index(scale)

    def check_signal(self, x: Tensor, name: str = "x") -> Tensor:
        """Return ``x`` in float32 or float64 (complex64 or complex128) if it is a batch of signals.

        Raises:
            TypeError: If ``x`` is no tensor, or real where signals are complex, or the reverse.
            ValueError: If its shape is not ``(B, C, *size)`` or it holds no signal.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {came(x)}")
        if x.dtype not in (COMPLEX if self.is_complex else REAL):
            kind = "complex" if self.is_complex else "real floating-point"
            raise TypeError(f"{name} must be {kind} for {type(self).__name__}, got {x.dtype}")
        if x.ndim != self.dims + 2 or x.shape[1:] != (self.channels, *self.size):
            hint = ""
            if x.ndim == self.dims + 2 and x.shape[2:] == self.size:
                hint = f": these need a decomposition with channels={x.shape[1]}"
            raise ValueError(
                f"{name} must have shape (B, {', '.join(map(str, (self.channels, *self.size)))}), "
                f"got {tuple(x.shape)}{hint}"
            )
        if not len(x):
            raise ValueError(f"{name} must hold at least one signal, got shape {tuple(x.shape)}")
        return widen(x)

    def check_band(self, scale: int, h: Tensor) -> Tensor:
        """Return ``h`` in float32 or float64 if it is a batch of bands ``(B, *band_shape(scale))``.

        Raises:
            TypeError: If ``h`` is complex or no tensor.
            ValueError: If the scale emits no band or ``h`` has the wrong shape.
        """
        self.band_index(scale)
        return _checked(f"the band at scale {scale}", h, self.band_shapes[scale])

    def check_picture(self, scale: int, y: Tensor) -> Tensor:
        """Return ``y`` in float32 or float64 if it is a batch of pictures ``(B, *picture_shape(scale))``.

        Raises:
            TypeError: If ``y`` is complex or no tensor.
            ValueError: If the scale emits no band or ``y`` has the wrong shape.
        """
        return _checked(f"the picture at scale {scale}", y, self.picture_shape(scale))

    def check_bands(self, bands: Sequence[Tensor | None]) -> list[Tensor]:
        """Return one real tensor for each band, zeros where ``bands`` has none.

        Raises:
            TypeError: If ``bands`` is no sequence, or a band is complex or no tensor.
            ValueError: If there are too many bands, none at all, one has the wrong shape, or they are on
                several devices.
        """
        if not isinstance(bands, Sequence):
            raise TypeError(f"bands must be a sequence of tensors and None, got {type(bands).__name__}")
        shapes = list(self.band_shapes.items())
        if len(bands) > len(shapes):
            raise ValueError(
                f"bands must have at most {len(shapes)} entries (scales {self.band_scales}), got {len(bands)}"
            )
        given = {s: self.check_band(s, h) for s, h in zip(self.band_shapes, bands, strict=False) if h is not None}
        if not given:
            raise ValueError("bands must hold at least one tensor: None alone gives no batch size")
        first = next(iter(given.values()))
        dtype = torch.float64 if any(h.dtype == torch.float64 for h in given.values()) else torch.float32
        full: list[Tensor] = []
        for scale, shape in shapes:
            h = given.get(scale)
            if h is None:
                h = first.new_zeros(len(first), *shape)
            elif len(h) != len(first):
                raise ValueError(
                    f"the band at scale {scale} must have shape {(len(first), *shape)}, got {tuple(h.shape)}"
                )
            elif h.device != first.device:
                raise ValueError(f"bands must be on one device, got {first.device} and {h.device}")
            full.append(h.to(dtype))
        return full

    def config(self) -> dict[str, Any]:
        """Arguments that build this decomposition again: what JSON can hold.

        The default reads, for each argument of the constructor, the attribute of the same name. Override
        it where the two differ, as where one number makes the tuple ``size``. Tensors are no arguments:
        keep them as buffers or parameters, which are saved by themselves, of a shape that the arguments give.

        Raises:
            TypeError: If an attribute is missing or JSON cannot hold it.
        """
        return constructor_arguments(self)

    def check(self, *, tolerance: float | None = None, dtype: torch.dtype = torch.float64) -> LawReport:
        """Measure every law on random signals and bands.

        Args:
            tolerance: Largest relative error allowed; ``None`` takes 1e-10 in float64, 1e-4 in float32.
            dtype: Real dtype to measure in.

        Returns:
            The measured errors and, for each scale, the condition numbers of ``to_grid`` and ``from_grid``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a law does not hold; the message names each failing law and by how much.
        """
        check_instance("dtype", dtype, torch.dtype)
        if tolerance is not None:
            check_number("tolerance", tolerance, "at least 0 and finite")
        report = measure_laws(self, dtype)
        report.require(tolerance if tolerance is not None else (1e-10 if dtype == torch.float64 else 1e-4))
        return report

    @override
    def extra_repr(self) -> str:
        kind = ", complex" if self.is_complex else ""
        return f"size={self.size}, channels={self.channels}, scales={list(self.scales)}{kind}"


def sides(size: int | Sequence[int], dims: int | None) -> tuple[int, ...]:
    """Read a ``size`` argument: an int is the same on every one of ``dims`` axes (2 where ``None``).

    Raises:
        TypeError: If it is neither an int nor a sequence.
        ValueError: If a sequence has another number of axes than ``dims``.
    """
    size = cast("int | Sequence[int]", listed(size))
    if is_integer(size):
        return (int(size),) * (dims or 2)
    if isinstance(size, str) or not isinstance(size, Sequence):
        raise TypeError(f"size must be an int or a sequence of ints, got {shown(size)}")
    if dims is not None and len(size) != dims:
        raise ValueError(f"size must have {dims} axes, got {tuple(size)}")
    return tuple(size)


def _positive(name: str, value: object) -> int:
    if not is_integer(value):
        raise TypeError(f"{name} must be integers, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return int(value)


def _checked(name: str, h: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(h, Tensor) or h.dtype not in REAL:
        raise TypeError(f"{name} must be a real tensor, got {came_as(h)}")
    if not h.ndim or tuple(h.shape[1:]) != tuple(shape):
        raise ValueError(f"{name} must have shape (B, {', '.join(map(str, shape))}), got {tuple(h.shape)}")
    return widen(h)
