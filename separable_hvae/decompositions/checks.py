"""What decompositions take and give: sizes, scales, signals, bands and pictures, checked.

The functions whose first argument is ``self`` are methods of :class:`Decomposition`.
"""

import itertools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from separable_hvae._validation import came, came_as, is_integer, listed, shown
from separable_hvae.functional import COMPLEX, HALF, REAL, as_plain

if TYPE_CHECKING:
    from separable_hvae.decompositions.base import Decomposition


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


def positive(name: str, value: object) -> int:
    """Return an integer of at least 1.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is smaller.
    """
    if not is_integer(value):
        raise TypeError(f"{name} must be integers, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return int(value)


def check_size(size: int | Sequence[int]) -> tuple[int, ...]:
    """Return the points on each axis of a signal, see :class:`Decomposition`.

    Raises:
        TypeError: If they are no integers.
        ValueError: If they are not positive, or there are more than three axes.
    """
    points = tuple(positive("size", n) for n in sides(size, None))
    if not 1 <= len(points) <= 3:
        raise ValueError(f"size must have one to three axes, got {points}")
    return points


def check_scales(scales: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Return the scales of a hierarchy on signals of a size.

    Raises:
        TypeError: If they are no integers.
        ValueError: If they do not increase or do not end in ``max(size)``.
    """
    scales = cast(Sequence[int], listed(scales))
    if isinstance(scales, str) or not isinstance(scales, Sequence):
        raise TypeError(f"scales must be a sequence of integers, got {shown(scales)}")
    checked = tuple(positive("scales", s) for s in scales)
    if not checked or any(b <= a for a, b in itertools.pairwise(checked)):
        raise ValueError(f"scales must increase, coarse to fine, got {list(scales)}")
    if checked[-1] != max(size):
        raise ValueError(f"scales must end in the signal's largest size, {max(size)}, got {list(scales)}")
    return checked


def check_band_shapes(decomp: "Decomposition") -> dict[int, tuple[int, ...]]:
    """Return the shape of each band, coarse to fine.

    Raises:
        ValueError: If the last scale emits none.
    """
    shapes = {s: tuple(shape) for s in decomp.scales if (shape := decomp.band_shape(s)) is not None}
    if decomp.scales[-1] not in shapes:
        previous = decomp.scales[-2] if len(decomp.scales) > 1 else 0
        raise ValueError(
            f"scales {list(decomp.scales)} leave the last band empty: nothing of a signal of size "
            f"{decomp.size} lies between scale {previous} and scale {decomp.scales[-1]}"
        )
    return shapes


def wrong_bands(decomp: "Decomposition", bands: Sequence[object]) -> tuple[int, str]:
    """How many of the bands that ``analysis`` gives are no real tensors of the shapes promised, and what they are."""
    says = list(decomp.band_shapes.values())
    gives = [tuple(b.shape[1:]) if isinstance(b, Tensor) and not b.is_complex() else came_as(b) for b in bands]
    wrong = sum(a != b for a, b in zip(gives, says, strict=False)) + abs(len(gives) - len(says))
    return wrong, f"analysis gives {gives}, band_shape says {says}"


def checked_analysis(self: "Decomposition", x: Tensor) -> list[Tensor]:
    """``analysis(x)``, once it is known to hold what it promises.

    Raises:
        ValueError: If it does not give one real tensor of the promised shape for each band.
    """
    bands = self.analysis(x)
    wrong, remark = wrong_bands(self, bands)
    if wrong:
        raise ValueError(f"{type(self).__name__} breaks its contract: {remark}")
    return bands


def band_index(self: "Decomposition", scale: int) -> int:
    """Position of a scale's band among the bands.

    Raises:
        ValueError: If the scale emits no band.
    """
    if not isinstance(scale, Hashable) or scale not in self.band_shapes:
        raise ValueError(f"scale {shown(scale)} emits no band; the scales that do are {list(self.band_shapes)}")
    return list(self.band_shapes).index(scale)


def check_signal(self: "Decomposition", x: Tensor, name: str = "x") -> Tensor:
    """Return ``x`` in float32 or float64 (complex64 or complex128) if it is a batch of signals.

    Raises:
        TypeError: If ``x`` is no tensor, or real where signals are complex, or the reverse.
        ValueError: If its shape is not ``(B, C, *size)`` or it holds no signal.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {came(x)}")
    if x.dtype not in (COMPLEX if self.is_complex else REAL):
        kind = "complex" if self.is_complex else "real floating-point"
        hint = "; torch.complex makes signals of two parts" if self.is_complex else ""
        if x.is_complex():
            hint = "; k-space, like any measurement, goes into Measurement(y, operator, noise)"
        raise TypeError(f"{name} must be {kind} for {type(self).__name__}, got {x.dtype}{hint}")
    if x.ndim != len(self.size) + 2 or x.shape[1:] != (self.channels, *self.size):
        hint = ""
        if x.ndim == len(self.size) + 2 and x.shape[2:] == self.size:
            hint = f": these need a decomposition with channels={x.shape[1]}"
        raise ValueError(
            f"{name} must have shape (B, {', '.join(map(str, (self.channels, *self.size)))}), "
            f"got {tuple(x.shape)}{hint}"
        )
    if not x.shape[0]:
        raise ValueError(f"{name} must hold at least one signal, got shape {tuple(x.shape)}")
    return as_plain(x.float() if x.dtype in HALF else x)


def check_band(self: "Decomposition", scale: int, h: Tensor) -> Tensor:
    """Return ``h`` in float32 or float64 if it is a batch of bands ``(B, *band_shape(scale))``.

    Raises:
        TypeError: If ``h`` is complex or no tensor.
        ValueError: If the scale emits no band or ``h`` has the wrong shape.
    """
    band_index(self, scale)
    return _checked(f"the band at scale {scale}", h, self.band_shapes[scale])


def check_picture(self: "Decomposition", scale: int, y: Tensor) -> Tensor:
    """Return ``y`` in float32 or float64 if it is a batch of pictures ``(B, *picture_shape(scale))``.

    Raises:
        TypeError: If ``y`` is complex or no tensor.
        ValueError: If the scale emits no band or ``y`` has the wrong shape.
    """
    return _checked(f"the picture at scale {scale}", y, self.picture_shape(scale))


def check_bands(self: "Decomposition", bands: Sequence[Tensor | None]) -> list[Tensor]:
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
        raise ValueError(f"bands must have at most {len(shapes)} entries (scales {self.band_scales}), got {len(bands)}")
    given = {s: check_band(self, s, h) for s, h in zip(self.band_shapes, bands, strict=False) if h is not None}
    if not given:
        raise ValueError("bands must hold at least one tensor: None alone gives no batch size")
    first = next(iter(given.values()))
    dtype = torch.float64 if any(h.dtype == torch.float64 for h in given.values()) else torch.float32
    full: list[Tensor] = []
    for scale, shape in shapes:
        h = given.get(scale)
        if h is None:
            h = first.new_zeros(first.shape[0], *shape)
        elif h.shape[0] != first.shape[0]:
            raise ValueError(f"the band at scale {scale} must have shape {(len(first), *shape)}, got {tuple(h.shape)}")
        elif h.device != first.device:
            raise ValueError(f"bands must be on one device, got {first.device} and {h.device}")
        full.append(h.to(dtype))
    return full


def _checked(name: str, h: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(h, Tensor) or h.dtype not in REAL:
        raise TypeError(f"{name} must be a real tensor, got {came_as(h)}")
    if not h.ndim or tuple(h.shape[1:]) != tuple(shape):
        raise ValueError(f"{name} must have shape (B, {', '.join(map(str, shape))}), got {tuple(h.shape)}")
    return h.float() if h.dtype in HALF else h
