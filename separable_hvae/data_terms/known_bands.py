r"""Known bands: some coefficients of some bands, with the rest left to the prior.

    d(h) = Σ_s ‖m_s ⊙ (ĥ_s − h_s)‖² / 2v,        v = σ² + σ_n²

m_s marks what is known of band s, σ² is the variance of the model's likelihood and σ_n the known values'
deviation. Orthonormal bands make every part local: the paper's deblurring knows all bands up to a scale and
nothing of the finer ones, and undersampled k-space knows some entries of every Fourier band.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae._validation import came_as, check_callable, check_generator, check_instance, check_number
from separable_hvae.data_terms.base import BoundTerm, DataTerm, Misfit
from separable_hvae.data_terms.gaussian_inference import mean_bands, standard
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.distributions.gaussian import gaussian_energy
from separable_hvae.functional import as_plain, check_finite, device_of
from separable_hvae.model.hvae import HVAE
from separable_hvae.nn.decoder import Observation


class KnownBands(DataTerm):
    """Some bands are known, or some coefficients of them.

    The encoder sees the known coefficients, and elsewhere the mean of each coefficient that the model was
    calibrated with.

    Args:
        bands: Bands coarse to fine, ``(B, *band_shape)`` each; ``None``, and what is missing at the end, is
            not known. Values that are not known may be anything.
        masks: For each band, which of its coefficients are known: a bool tensor that broadcasts to
            ``(B, *band_shape)``, or ``None`` for all; ``None`` alone knows all of every band given.
        sigma: Standard deviation of the known values; 0 where they are exact.

    Raises:
        TypeError: If a band or mask is no tensor of its kind, or they come in no sequence.
        ValueError: If no band is given, sizes do not fit, or sigma is negative.
    """

    def __init__(
        self, bands: Sequence[Tensor | None], masks: Sequence[Tensor | None] | None = None, sigma: float = 0.0
    ) -> None:
        self.sigma = check_number("sigma", sigma, "at least 0 and finite")
        for name, part in {"bands": bands, "masks": () if masks is None else masks}.items():
            if not isinstance(part, Sequence):
                raise TypeError(f"{name} must be a sequence of tensors and None, got {type(part).__name__}")
        for i, band in enumerate(bands):
            if band is not None:
                _check_band(i, band)
        given = [band for band in bands if band is not None]
        if not given:
            raise ValueError("bands must hold at least one tensor: nothing is known without")
        if len({len(band) for band in given}) > 1:
            raise ValueError(f"bands must have one batch size, got {[len(band) for band in given]}")
        masks = [None] * len(bands) if masks is None else masks
        if len(masks) != len(bands):
            raise ValueError(f"masks must have one entry for each of the {len(bands)} bands, got {len(masks)}")
        self.bands = [None if band is None else as_plain(band.detach()) for band in bands]
        self.masks = [_mask(i, mask, band) for i, (mask, band) in enumerate(zip(masks, self.bands, strict=True))]

    @classmethod
    def of(cls, x: Tensor, decomp: Decomposition, *, until: int, masks: Sequence[Tensor | None] | None = None) -> Self:
        """The bands of signals ``(B, C, *size)`` up to the scale ``until``."""
        count = decomp.band_index(until) + 1
        return cls(decomp.analysis(x)[:count], masks)

    @override
    def __len__(self) -> int:
        return next(len(band) for band in self.bands if band is not None)

    @override
    def rows(self, rows: slice | Tensor) -> Self:
        part = copy(self)
        part.bands, part.masks = ([None if t is None else t[rows] for t in ts] for ts in (self.bands, self.masks))
        return part

    @override
    def guess(self, model: HVAE) -> Tensor:
        bands, masks = self._read(model)
        parts = zip(masks, bands, mean_bands(model), strict=True)
        return model.decomp.synthesis([torch.where(mask, band, mean) for mask, band, mean in parts])

    @override
    def bind(self, model: HVAE, seen: Observation) -> BoundTerm:
        bands, masks = self._read(model)
        variance = self.sigma**2 + model.likelihood.variance.detach()
        known = tuple(i for i, band in enumerate(self.bands) if band is not None)
        misfit = KnownMisfit(model.decomp, known)

        def targets(index: int, _: Sequence[Tensor | None], data: Sequence[Tensor]) -> list[Tensor]:
            return misfit.target(known.index(index), data) if index in known else []

        values = [t for i in known for t in (bands[i], masks[i].to(bands[i]))]
        return BoundTerm(misfit, [*values, variance], targets, pure=True)

    def correct(self, model: HVAE, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The signals given the latents that decode to ``x`` and what is known: their mean, or a draw.

        The likelihood leaves each coefficient a standard deviation of σ around ``x``, so the mean of a known
        one is ``(σ_n² ĥ + σ² h) / (σ_n² + σ²)``: exact values are put back as they are.

        Args:
            model: The model.
            x: Decoded signals ``(B, C, *size)``.
            generator: Random numbers of a draw; ``None`` gives the mean.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``x`` does not fit the model, or holds another number of signals than are known.
        """
        check_instance("model", model, HVAE)
        check_generator(generator)
        if len(model.decomp.check_signal(x)) != len(self):
            raise ValueError(f"x must hold {len(self)} signals, as many as are known, got {len(x)}")
        bands, masks = self._read(model)
        own, other = float(model.likelihood.variance.detach()), self.sigma**2
        share = own / (own + other)
        found = []
        for h, band, mask in zip(model.decomp.analysis(x.detach()), bands, masks, strict=True):
            mean = torch.lerp(h, torch.where(mask, band, h), share)
            if generator is not None:
                variance = torch.where(mask, mean.new_tensor(own * (1 - share)), own)
                mean = mean + variance.sqrt() * standard(mean, generator)
            found.append(mean)
        return model.decomp.synthesis(found).to(x.dtype)

    def _read(self, model: HVAE) -> tuple[list[Tensor], list[Tensor]]:
        """Every band and mask in the model's precision; zeros and ``False`` where nothing is known."""
        decomp = model.decomp
        if not decomp.orthonormal:
            raise ValueError(
                f"{type(decomp).__name__} is not orthonormal, so its bands are no measurements of a signal: "
                "use Measurement"
            )
        read: list[tuple[Tensor, Tensor]] = []
        masks = [*self.masks, *[None] * (len(decomp.band_shapes) - len(self.masks))]
        for scale, band, mask in zip(decomp.band_scales, decomp.check_bands(self.bands), masks, strict=True):
            if mask is None:
                mask = torch.zeros_like(band, dtype=torch.bool)
            elif band.device != model.device:
                raise ValueError(f"the band at scale {scale} is on {band.device}, the model on {model.device}")
            # Values that are not known may be anything, NaN too.
            band = torch.where(mask, band, 0).to(model.real_dtype)
            check_finite(f"what is known of the band at scale {scale}", band)
            read.append((band.detach(), mask))
        return [band for band, _ in read], [mask for _, mask in read]


@dataclass(frozen=True)
class KnownMisfit(Misfit):
    """Squared error of the known coefficients.

    Attributes:
        decomp: The decomposition.
        known: Numbers of the bands of which something is known.
    """

    decomp: Decomposition
    known: tuple[int, ...]

    @override
    def local(self, index: int, band: Tensor, targets: Sequence[Tensor]) -> Tensor:
        if not targets:
            return band.new_zeros(len(band))
        target, mask, variance = targets
        return gaussian_energy(mask * (band - target), variance)

    @override
    def total(self, bands: Sequence[Tensor], data: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        scales = self.decomp.band_scales
        return [(scales[i], self.local(i, bands[i], self.target(n, data))) for n, i in enumerate(self.known)]

    @staticmethod
    def target(number: int, data: Sequence[Tensor]) -> list[Tensor]:
        """Values, mask and variance of a known band, by its number among these."""
        return [*data[2 * number : 2 * number + 2], data[-1]]


def masks_of(decomp: Decomposition, project: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The masks of the coefficients that a projection of signals keeps, ``(1, *band_shape)`` for each band.

    Args:
        decomp: The decomposition, as the model has it (``model.decomp``).
        project: Maps signals ``(B, C, *size)`` to the part of them that is known, as a k-space mask does.

    Raises:
        ValueError: If it mixes coefficients, in which case its knowledge is no mask in these bands, as of a
            pixel mask in Fourier bands; the message says by how much.
        TypeError: If an argument has the wrong type.
    """
    check_instance("decomp", decomp, Decomposition)
    check_callable("project", project, "(signals) -> signals")
    generator = torch.Generator().manual_seed(0)
    device = device_of(decomp)
    drawn = (
        torch.randn(1, *shape, generator=generator, device="cpu", dtype=torch.float64)
        for shape in decomp.band_shapes.values()
    )
    bands = [band.to(device) for band in drawn]
    kept = decomp.analysis(project(decomp.synthesis(bands)))
    masks = [(k / h) > 0.5 for k, h in zip(kept, bands, strict=True)]
    pairs = list(zip(kept, bands, masks, strict=True))
    wrong = sum(float((k - torch.where(m, h, 0)).square().sum()) for k, h, m in pairs)
    defect = (wrong / sum(float(h.square().sum()) for h in bands)) ** 0.5
    if not defect < 1e-4:
        raise ValueError(
            f"project keeps no set of coefficients of {type(decomp).__name__}: it mixes them, with a relative error "
            f"of {defect:.2g}; use Measurement"
        )
    return masks


def _check_band(index: int, band: Tensor) -> None:
    if not isinstance(band, Tensor) or not band.is_floating_point():
        raise TypeError(f"bands[{index}] must be a real tensor or None, got {came_as(band)}")
    if not band.ndim or not len(band):
        raise ValueError(f"bands[{index}] must hold at least one sample, batch first, got shape {tuple(band.shape)}")


def _mask(index: int, mask: Tensor | None, band: Tensor | None) -> Tensor | None:
    """The mask of a band with a batch axis; ``None`` where nothing is known."""
    if band is None:
        if mask is not None:
            raise ValueError(f"masks[{index}] is given for a band that is not")
        return None
    if mask is None:
        return torch.ones_like(band, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"masks[{index}] must be a bool tensor, got {came_as(mask)}")
    try:
        return as_plain(mask).to(band.device).expand_as(band)
    except RuntimeError:
        raise ValueError(
            f"masks[{index}] must broadcast to its band's shape {tuple(band.shape)}, got {tuple(mask.shape)}"
        ) from None
