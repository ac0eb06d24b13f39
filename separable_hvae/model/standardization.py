r"""Standardised bands.

    h_s = m_s + u_s · head_s(ĥ),        m_s = mean of band s,  u_s² = mean of (h_s − m_s)²

over the training data: m_s for each coefficient, u_s one number for the band. Natural spectra span
orders of magnitude and have a mean far from zero; networks see and predict numbers of order one.

Against the mean signal, whatever latents say can raise log p(x | z) of a signal by no more than

    E ‖x − m‖² / 2σ²                                                          nats on average,

which they have to pay for with their KL. Where it is a few nats for a whole signal, none will be used.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from separable_hvae._float32 import full_precision
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import finest, pack
from separable_hvae.model.batches import Batch, checked_batches

AT_MOST = 4096
"""Signals that are read of data that may have no end."""

_FAR_ABOVE, _FAR_BELOW = 10.0, 200.0
_OTHER_UNITS = 10.0
_WORTH_LEARNING = 10.0  # Nats.


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


def moments_of(
    data: Batch | Iterable[Any], decomp: Decomposition, device: torch.device, at_most: int = AT_MOST
) -> list[BandMoments]:
    """Moments of each band, coarse to fine, and last of the signals as real numbers.

    Args:
        data: Signals or batches of them, with or without conditions, see :func:`checked_batches`.
        decomp: The decomposition.
        device: Where it computes.
        at_most: Signals after which no more batches are read of data that may have no end; tensors have one.
    """
    moments: list[BandMoments] = []
    for x, _ in checked_batches(data, decomp, device):
        with full_precision(x.device):
            here = [BandMoments.of(part) for part in (*decomp.checked_analysis(x), pack(x))]
        moments = [a + b for a, b in zip(moments, here, strict=True)] if moments else here
        if moments[-1].count >= at_most and not isinstance(data, (Tensor, tuple, list)):
            break
    return moments


def units(moments: Sequence[BandMoments]) -> list[float]:
    """The unit of each band; one for a band that does not vary, against all bands together."""
    entries = sum(m.mean.numel() for m in moments)
    rounding = 1e-6 * math.sqrt(sum(m.square * m.mean.numel() for m in moments) / entries)
    return [m.deviation if m.deviation > rounding else 1.0 for m in moments]


def warn_of_sigma(least: float, most: float, signals: BandMoments) -> None:
    """Warn if the likelihood's deviation hides all that signals have to say, or hangs on their every trifle.

    To hide it, it has to be ten times the signals' own, *and* leave less than ten nats for a whole signal: a few
    bright points on black, or one smooth offset, deviate little on average and can be learnt all the same. Below
    a two-hundredth of the signals' own, it is finer than half a grey level of most 8-bit images.

    Args:
        least: Least standard deviation of the likelihood: it may be learned.
        most: Greatest standard deviation of the likelihood.
        signals: Moments of the signals as real numbers.
    """
    deviation = signals.deviation
    worth = 0.5 * signals.mean.numel() * (deviation / least) ** 2
    if 0 < _FAR_ABOVE * deviation < least and worth < _WORTH_LEARNING:
        warnings.warn(
            f"sigma is {least:.2g}, but the data deviate from their mean by only {deviation:.2g}: latents could tell "
            f"at most {worth:.2g} nats of a signal, so that next to nothing will be learnt; rescale the data to a "
            "deviation near 1, or pass a smaller sigma, a tenth of their deviation to begin with",
            stacklevel=4,
        )
    if most * _FAR_BELOW < deviation:
        warnings.warn(
            f"sigma is {most:.2g}, but the data deviate from their mean by {deviation:.2g}: errors of a tenth of that "
            f"cost {0.5 * (0.1 * deviation / most) ** 2:.2g} nats in each dimension, beside which the KL, and so the "
            "priors, hardly count; rescale the data to a deviation near 1, or pass a larger sigma, a tenth of their "
            "deviation to begin with",
            stacklevel=4,
        )


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
            stacklevel=7,
        )
