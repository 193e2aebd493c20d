"""Modules for ``torch.nn`` users: subclasses with torch's constructors and ``state_dict``s, running our operations.

A tensor subclass or a tracer's proxy, as input or as weight, gets torch's own calls: it is there to see them.
"""

from .fused import ConvReLU2d, LinearReLU
from .images import AlexNetStem, CeilConv2d, PixelConv2d
from .normalisation import LocalResponseNorm, LRNMaxPool2d, MaxPool2d, MaxPoolLRN2d, SpatialResponseNorm
from .sequential import FusedSequential, fused_step

__all__ = [
    "AlexNetStem",
    "CeilConv2d",
    "ConvReLU2d",
    "FusedSequential",
    "LRNMaxPool2d",
    "LinearReLU",
    "LocalResponseNorm",
    "MaxPool2d",
    "MaxPoolLRN2d",
    "PixelConv2d",
    "SpatialResponseNorm",
    "fused_step",
]
