r"""Data terms: what is known of a batch of signals, and how far bands are from it.

A data term d is summed over a sample's entries and never over the batch, so a sample's result does not
depend on its neighbours. Known signals are compared by the model's own likelihood, see
:mod:`separable_hvae.data_terms.signal`; if it is Gaussian, orthonormal bands split it exactly, band by band.
Other decompositions have one data term on the signal, and each subset's target is what its coarser bands leave
it: what its band adds to the signal is compared with what that target would.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from separable_hvae.decompositions.base import Decomposition
from separable_hvae.model.hvae import HVAE
from separable_hvae.nn.decoder import Observation


class Misfit(ABC):
    """How far bands are from what is known, as a pure function of tensors and of the settings that it holds."""

    @abstractmethod
    def local(self, index: int, band: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """The part of subset ``index``, in nats: ``(B,)``.

        Args:
            index: Number of the subset.
            band: Its band ``(B, *band_shape)``.
            targets: What it is compared with, see :class:`BoundTerm`.
        """

    @abstractmethod
    def total(self, bands: Sequence[Tensor], data: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """The whole misfit in nats, as pairs of the scale whose guidance weighs it and ``(B,)``."""


@dataclass(frozen=True)
class BoundTerm:
    """A data term for one model and one batch.

    Attributes:
        misfit: The pure function.
        data: The tensors that :meth:`Misfit.total` compares with.
        targets: A function of a subset's number, the bands of all subsets and the data, see :meth:`target`.
        pure: Whether ``targets`` reads no tensors but those given, and the model's, and looks at no values: whole
            inferences that were recorded with one batch then serve others.
    """

    misfit: Misfit
    data: list[Tensor]
    targets: Callable[[int, Sequence[Tensor | None], Sequence[Tensor]], list[Tensor]]
    pure: bool = False

    def target(self, index: int, bands: Sequence[Tensor | None]) -> list[Tensor]:
        """The tensors that :meth:`Misfit.local` compares a subset's band with.

        Args:
            index: Number of the subset.
            bands: The bands of all subsets, ``None`` where one is not known yet.
        """
        return self.targets(index, bands, self.data)


class DataTerm(ABC):
    """What is known of a batch of signals."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def rows(self, rows: slice | Tensor) -> "DataTerm":
        """The same of some samples: a slice, or their numbers ``(N,)``, which may repeat."""

    @abstractmethod
    def guess(self, model: HVAE) -> Tensor:
        """Signals ``(B, C, *size)`` for the encoder to look at, on the model's device.

        Raises:
            TypeError: If what is known has a dtype that does not fit the model.
            ValueError: If its shape does not fit.
        """

    @abstractmethod
    def bind(self, model: HVAE, seen: Observation) -> BoundTerm:
        """Make ready for a model, whose encoder has seen the guess."""


def piece(decomp: Decomposition, index: int, band: Tensor) -> Tensor:
    """What one band adds to the signal, ``(B, C, *size)``."""
    return decomp.synthesis([*[None] * index, band])
