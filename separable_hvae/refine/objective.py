r"""What refinement minimises: the negative log of the joint density, sample by sample.

    J(z) = −Σ_l log N(z_l; μ_p, σ_p) + Σ_s β_s d(h_s(z), t_s)                  nats, (B,)

Eq. 7 of the paper prints the first term without its minus; its text, and MAP, need it. The data term d
is one of :mod:`separable_hvae.data_terms.base`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from separable_hvae.data_terms.base import Misfit
from separable_hvae.model.hvae import HVAE
from separable_hvae.nn.subset import SubsetPass


@dataclass(frozen=True)
class Terms:
    """The two parts of an objective, in nats: ``(B,)`` each.

    Attributes:
        nll: ``−Σ log p(z)`` of the latents concerned.
        data: Data term, guidance included.
    """

    nll: Tensor
    data: Tensor

    @property
    def objective(self) -> Tensor:
        """``nll + data``."""
        return self.nll + self.data


@dataclass(frozen=True)
class Objective:
    """The MAP objective, as a pure function of a pass and of what it is compared with.

    Attributes:
        model: The model.
        misfit: The data term.
        guidance: β of each scale, coarse to fine.
    """

    model: HVAE
    misfit: Misfit
    guidance: tuple[float, ...]

    def subset(self, index: int, step: SubsetPass, aim: Sequence[Tensor]) -> Terms:
        """The part of one subset, everything coarser fixed and everything finer ignored (eq. 6)."""
        return Terms(-step.log_prior().sum(1), self.local(index, step.band, aim))

    def total(self, passes: Sequence[SubsetPass], data: Sequence[Tensor]) -> Terms:
        """The full MAP objective of a pass through every subset."""
        nll = -torch.cat([step.log_prior() for step in passes], dim=1).sum(1)
        return Terms(nll, self.whole([step.band for step in passes], data))

    def local(self, index: int, band: Tensor, aim: Sequence[Tensor]) -> Tensor:
        """The data term of one subset's band, guidance included, in nats: ``(B,)``."""
        return self._weight(self.model.subsets[index].scale) * self.misfit.local(index, band, aim)

    def whole(self, bands: Sequence[Tensor], data: Sequence[Tensor]) -> Tensor:
        """The data term of all bands, guidance included, in nats: ``(B,)``."""
        return torch.stack([self._weight(scale) * d for scale, d in self.misfit.total(bands, data)]).sum(0)

    def _weight(self, scale: int) -> float:
        return self.guidance[self.model.scales.index(scale)]
