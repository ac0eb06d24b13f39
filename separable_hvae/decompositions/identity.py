"""One band, the signal itself: no separation at all, and the vanilla HVAE."""

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import pack, unpack


class Identity(Decomposition):
    """One band, the signal itself, at the last scale: the vanilla HVAE with one decoder.

    Its only subset is the whole hierarchy, so that refining it latent by latent is eq. 4.

    >>> decomp = Identity(8, channels=1)
    >>> decomp.scales, decomp.band_shapes
    ((1, 2, 4, 8), {8: (1, 8, 8)})

    Args:
        size: Points on each axis; an int is a square, a tuple any number of axes.
        channels: Channels of the signal.
        scales: Resolutions of the hierarchy, see :class:`Decomposition`.
        is_complex: Whether signals are complex.
    """

    orthonormal = True

    def __init__(
        self,
        size: int | Sequence[int],
        channels: int = 3,
        scales: Sequence[int] | None = None,
        is_complex: bool = False,
    ) -> None:
        super().__init__(size, channels, scales, is_complex=is_complex)

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [pack(self.check_signal(x))]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        return unpack(self.check_bands(bands)[0], is_complex=self.is_complex)

    @override
    def band_shape(self, scale: int) -> tuple[int, ...] | None:
        return (self.real_channels, *self.size) if scale == self.scales[-1] else None

    @override
    def to_grid(self, scale: int, h: Tensor) -> Tensor:
        return self.check_band(scale, h)

    @override
    def from_grid(self, scale: int, y: Tensor) -> Tensor:
        return self.check_picture(scale, y)
