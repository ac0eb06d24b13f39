"""Networks: blocks, the encoder, stochastic layers, the subset of one band, and heads."""

from separable_hvae.nn.blocks import Bottleneck, ResidualBlock, conv
from separable_hvae.nn.conditions import CONDITIONS, ClassCondition, Condition, SignalCondition, VectorCondition
from separable_hvae.nn.decoder import Observation, TopDown
from separable_hvae.nn.encoder import Encoder
from separable_hvae.nn.heads import HEADS, CoefficientHead, GridHead, ScaleHead
from separable_hvae.nn.stochastic_layer import LayerPass, StochasticLayer
from separable_hvae.nn.subset import Evidence, Subset, SubsetCondition, SubsetPass

__all__ = [
    "CONDITIONS",
    "HEADS",
    "Bottleneck",
    "ClassCondition",
    "CoefficientHead",
    "Condition",
    "Encoder",
    "Evidence",
    "GridHead",
    "LayerPass",
    "Observation",
    "ResidualBlock",
    "ScaleHead",
    "SignalCondition",
    "StochasticLayer",
    "Subset",
    "SubsetCondition",
    "SubsetPass",
    "TopDown",
    "VectorCondition",
    "conv",
]
