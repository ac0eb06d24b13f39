"""Networks: blocks, the encoder, stochastic layers, the subset of one band, and heads."""

from separable_hvae.nn.blocks import Bottleneck, ResidualBlock, conv
from separable_hvae.nn.encoder import Encoder
from separable_hvae.nn.heads import HEADS, CoefficientHead, GridHead, ScaleHead
from separable_hvae.nn.stochastic_layer import LayerPass, StochasticLayer
from separable_hvae.nn.subset import Evidence, Subset, SubsetPass

__all__ = [
    "HEADS",
    "Bottleneck",
    "CoefficientHead",
    "Encoder",
    "Evidence",
    "GridHead",
    "LayerPass",
    "ResidualBlock",
    "ScaleHead",
    "StochasticLayer",
    "Subset",
    "SubsetPass",
    "conv",
]
