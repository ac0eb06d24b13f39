"""The hierarchical VAE: what users build, train, sample and encode with."""

from separable_hvae.model.hvae import HVAE
from separable_hvae.model.result import Result

__all__ = ["HVAE", "Result"]
