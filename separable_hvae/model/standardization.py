r"""Standardised bands.

    h_s = m_s + u_s · head_s(ĥ),        m_s = mean of band s,  u_s² = mean of (h_s − m_s)²

over the training data: m_s for each coefficient, u_s one number for the band. Natural spectra span
orders of magnitude and have a mean far from zero; networks see and predict numbers of order one.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from separable_hvae._float32 import full_precision
from separable_hvae._validation import came
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import check_finite, finest, pack

_OTHER_UNITS = 10.0


@dataclass
class BandMoments:
    """Running moments of one band.

    Attributes:
        count: Signals seen.
        mean: Mean of each coefficient, ``band_shape``.
        square: Mean square over all coefficients.
    """

    count: int
    mean: Tensor
    square: float

    @classmethod
    def of(cls, band: Tensor) -> "BandMoments":
        """Moments of a batch of bands ``(B, *band_shape)``."""
        band = finest(band.detach())
        return cls(len(band), band.mean(0), float(band.square().mean()))

    def __add__(self, other: "BandMoments") -> "BandMoments":
        count = self.count + other.count
        share = other.count / count
        return BandMoments(
            count, torch.lerp(self.mean, other.mean, share), self.square + share * (other.square - self.square)
        )

    @property
    def deviation(self) -> float:
        """Root mean square of ``h − m``; exactly 0 where only rounding is left of it."""
        centre = float(self.mean.square().mean())
        return math.sqrt(max(self.square - centre, 0.0)) if self.square - centre > 1e-14 * centre else 0.0


def batches_of(
    data: Tensor | Iterable[Tensor],
    decomp: Decomposition,
    device: torch.device,
    batch_size: int = 256,
    name: str = "data",
) -> Iterator[Tensor]:
    """Signals in batches ``(B, C, *size)`` that have been checked.

    Args:
        data: Signals ``(N, C, *size)``, or batches of them, which stay as they are.
        decomp: The decomposition.
        device: Where they go.
        batch_size: Signals in each batch of a tensor.
        name: What errors call the data.

    Raises:
        TypeError: If ``data`` are of another kind.
        ValueError: If they do not fit the decomposition, are none or not finite.
    """
    if isinstance(data, Tensor):
        data = data.split(batch_size) if data.ndim else [data]
    try:
        batches = iter(data)
    except TypeError:
        raise TypeError(
            f"{name} must be a tensor (N, C, *size) or an iterable of such batches, got {came(data)}"
        ) from None
    count = 0
    for batch in batches:
        x = decomp.check_signal(batch, name).to(device)
        check_finite(name, x)
        count += len(x)
        yield x
    if not count:
        raise ValueError(f"{name} must hold at least one signal")


def moments_of(data: Tensor | Iterable[Tensor], decomp: Decomposition, device: torch.device) -> list[BandMoments]:
    """Moments of each band, coarse to fine, and last of the signals as real numbers, see :func:`batches_of`."""
    moments: list[BandMoments] = []
    for x in batches_of(data, decomp, device):
        with full_precision(x.device):
            here = [BandMoments.of(part) for part in (*decomp.checked_analysis(x), pack(x))]
        moments = [a + b for a, b in zip(moments, here, strict=True)] if moments else here
    return moments


def units(moments: Sequence[BandMoments]) -> list[float]:
    """The unit of each band; one for a band that does not vary, against all bands together."""
    entries = sum(m.mean.numel() for m in moments)
    rounding = 1e-6 * math.sqrt(sum(m.square * m.mean.numel() for m in moments) / entries)
    return [m.deviation if m.deviation > rounding else 1.0 for m in moments]


def warn_of_other_units(magnitude: float, signals: BandMoments) -> None:
    """Warn if signals are in other units than those that a model was calibrated with.

    Args:
        magnitude: Root mean square of these.
        signals: Moments of the signals as real numbers.
    """
    found = math.sqrt(signals.square)
    if found and not magnitude <= _OTHER_UNITS * found <= _OTHER_UNITS**2 * magnitude:
        warnings.warn(
            f"the data's root mean square is {found:.2g}, that of the data which the model was calibrated with "
            f"{magnitude:.2g}: rescale the data to the units of those, or calibrate the model anew",
            stacklevel=6,
        )
