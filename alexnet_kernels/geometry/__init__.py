"""What AlexNet is: every published variant as frozen data (``variants``), and everything that can be counted from it.

The only place where 11, 4, 96 or 55 are written. Shapes are ``(channels, height, width)`` of one image; a flattened
map is ``(features, 1, 1)``. Nothing here is a stored total: parameters, neurons, connections, MACs, bytes, ownership on
two devices and exchanged bytes are all computed, for any number of classes and any input size.

Counting rules, those of the paper: a *neuron* is one output value of a convolution or fully connected layer; a
*connection* is one multiply-accumulate of a neuron plus its bias; ``macs`` leaves the bias out.
"""

from .layers import (
    LRN,
    TOWERS,
    AdaptiveAvgPool,
    Conv,
    Dropout,
    Flatten,
    Linear,
    MaxPool,
    Op,
    ReLU,
    Scope,
    Shape,
    SpatialNorm,
)
from .network import Exchange, Group, LayerFacts, Preprocess, Variant, check_fc8
from .variants import VARIANTS, variant

__all__ = [
    "LRN",
    "TOWERS",
    "VARIANTS",
    "AdaptiveAvgPool",
    "Conv",
    "Dropout",
    "Exchange",
    "Flatten",
    "Group",
    "LayerFacts",
    "Linear",
    "MaxPool",
    "Op",
    "Preprocess",
    "ReLU",
    "Scope",
    "Shape",
    "SpatialNorm",
    "Variant",
    "check_fc8",
    "variant",
]
