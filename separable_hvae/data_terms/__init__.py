"""Data terms: what is known of signals, and how far bands are from it."""

from separable_hvae.data_terms.base import BoundTerm, DataTerm, Misfit
from separable_hvae.data_terms.known_bands import KnownBands, masks_of
from separable_hvae.data_terms.measurement import Fill, Measurement
from separable_hvae.data_terms.signal import Loss, Signal

__all__ = ["BoundTerm", "DataTerm", "Fill", "KnownBands", "Loss", "Measurement", "Misfit", "Signal", "masks_of"]
