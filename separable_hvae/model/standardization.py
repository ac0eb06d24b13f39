r"""Standardised bands.

    h_s = m_s + u_s · head_s(ĥ),        m_s = mean of band s,  u_s² = mean of (h_s − m_s)²

over the training data: m_s for each coefficient, u_s one number for the band. Natural spectra span
orders of magnitude and have a mean far from zero; networks see and predict numbers of order one.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import as_plain, finest, is_recomputing, pack, widen
from separable_hvae.model.batches import Batch, checked_batches
from separable_hvae.nn import Observation, Subset, TopDown

AT_MOST = 4096
"""Signals that are read of data that may have no end."""
_OTHER_UNITS = 10.0
_WARM_UP_BATCHES = 16


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
        band = finest(as_plain(band.detach()))
        return cls(len(band), band.mean(0), float(band.square().mean()))

    def __add__(self, other: "BandMoments") -> "BandMoments":
        count = self.count + other.count
        share = other.count / count
        return BandMoments(
            count, torch.lerp(self.mean, other.mean, share), self.square + share * (other.square - self.square)
        )

    @property
    def std(self) -> float:
        """Root mean square of ``h − m``; exactly 0 where only rounding is left of it."""
        centre = float(self.mean.square().mean())
        return math.sqrt(max(self.square - centre, 0.0)) if self.square - centre > 1e-14 * centre else 0.0


class Standardization(nn.Module):
    """What a model knows of its data before any training: how they are scaled, and whether that is settled.

    The moments of the bands themselves are buffers of the subsets, ``centre`` and ``unit``.

    Attributes:
        calibrated: Batches that the moments were taken of, up to the number that settles them: a scalar.
        offset: What the encoder sees signals without, ``(real channels,)``: the mean of each channel where the data
            are far from zero, as Kelvin or counts are, so that a constant costs nothing; zero otherwise.
        magnitude: Root mean square of the data without it: a scalar. The encoder sees signals in this unit where it
            exceeds one: it learns badly from large numbers, and well from small ones.
    """

    calibrated: Tensor
    magnitude: Tensor
    offset: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.int64))
        self.register_buffer("magnitude", widen(torch.ones(())))
        self.register_buffer("offset", widen(torch.zeros(channels)))
        self._moments: list[BandMoments] | None = None
        self._settled = False

    @property
    def is_settled(self) -> bool:
        """Whether the moments no longer change."""
        # Read as seldom as can be: code that is traced cannot, and an accelerator would be waited for.
        self._settled = self._settled or self._reads_as_settled()
        return self._settled

    def _reads_as_settled(self) -> bool:
        return not self.calibrated.is_meta and int(self.calibrated) >= _WARM_UP_BATCHES

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._settled = self._reads_as_settled()

    def scaled(self, x: Tensor) -> Tensor:
        """Packed signals ``(B, C, *size)`` as the encoder sees them."""
        offset = self.offset.reshape(-1, *[1] * (x.ndim - 2)).to(x.dtype)
        return (x - offset) / self.magnitude.clamp_min(1).to(x.dtype)

    @torch.no_grad()
    def calibrate(self, subsets: Sequence[Subset], bands: Sequence[BandMoments], signals: BandMoments) -> None:
        """Settle on moments of the bands and of the signals, see :func:`moments_of`."""
        self._take(subsets, bands, signals)
        self.calibrated.fill_(_WARM_UP_BATCHES)
        self._settled = True

    @torch.no_grad()
    def follow(self, decoder: TopDown, seen: Observation) -> None:
        """Until settled, follow the moments over the first training batches."""
        if is_recomputing():  # A batch whose activations were checkpointed comes twice.
            return
        bands = decoder.decomp.checked_analysis(seen.x) if seen.targets is None else seen.targets
        batches = int(self.calibrated)
        moments = [BandMoments.of(part) for part in (*bands, pack(seen.x))]
        if batches and self._moments is not None:
            moments = [a + b for a, b in zip(self._moments, moments, strict=True)]
        self._moments = moments if batches + 1 < _WARM_UP_BATCHES else None
        self._take(decoder.subsets, moments[:-1], moments[-1])
        self.calibrated.fill_(batches + 1)

    def _take(self, subsets: Sequence[Subset], bands: Sequence[BandMoments], signals: BandMoments) -> None:
        # New tensors: an earlier pass may still need the old ones for its gradients, and a later one
        # could not use tensors made in inference mode.
        with torch.inference_mode(False):
            offset = signals.mean.flatten(1).mean(1)
            constant = float(offset.square().mean())
            centred = max(signals.square - constant, 0.0)
            if constant <= centred:
                offset, centred = torch.zeros_like(offset), signals.square
            self.offset = offset.to(self.offset, copy=True)
            self.magnitude = torch.full_like(self.magnitude, math.sqrt(centred) or 1.0)
            for subset, moment, unit in zip(subsets, bands, units(bands), strict=True):
                subset.centre = moment.mean.to(subset.centre, copy=True)
                subset.unit = torch.full_like(subset.unit, unit)


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
        here = [BandMoments.of(part) for part in (*decomp.checked_analysis(x), pack(x))]
        moments = [a + b for a, b in zip(moments, here, strict=True)] if moments else here
        if moments[-1].count >= at_most and not isinstance(data, (Tensor, tuple, list)):
            break
    return moments


def units(moments: Sequence[BandMoments]) -> list[float]:
    """The unit of each band; one for a band that does not vary, against all bands together."""
    entries = sum(m.mean.numel() for m in moments)
    rounding = 1e-6 * math.sqrt(sum(m.square * m.mean.numel() for m in moments) / entries)
    return [m.std if m.std > rounding else 1.0 for m in moments]


def warn_of_other_units(settled: Standardization, signals: BandMoments) -> None:
    """Warn if signals are in other units than those that a model was calibrated with.

    Args:
        settled: What these were.
        signals: Moments of the signals as real numbers.
    """
    magnitude, offset = float(settled.magnitude), finest(settled.offset)
    mean = signals.mean.flatten(1).mean(1).to(offset)
    found = math.sqrt(max(signals.square + float((offset * (offset - 2 * mean)).mean()), 0.0))
    if found and not magnitude <= _OTHER_UNITS * found <= _OTHER_UNITS**2 * magnitude:
        warnings.warn(
            f"the data's root mean square is {found:.2g}, that of the data which the model was calibrated with "
            f"{magnitude:.2g}: rescale the data to the units of those, or calibrate the model anew",
            stacklevel=7,
        )
