"""The kinds of layer AlexNet is made of, as frozen data: what each turns a shape into, and how its map's side follows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, int, int]
Scope = Literal["tower", "global"]
TOWERS = 2


@dataclass(frozen=True)
class Conv:
    """Convolution; ``ceil_mode`` pads zeros right and bottom until the last stride fits (the 2012 source, ``layer.py:1004``)."""

    out_channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    towered: bool = False  # stays inside a tower where the network has towers: conv2, conv4, conv5
    ceil_mode: bool = False
    std: float | None = None  # weights ~ N(0, std); None: torch's default initialisation
    bias: float | None = None
    prefix = "conv"

    def extra(self, size: int) -> int:
        """Zeros that ``ceil_mode`` adds after the last row (or column) of a side of ``size``."""
        return -(size + 2 * self.padding - self.kernel) % self.stride if self.ceil_mode else 0

    def output(self, shape: Shape) -> Shape:
        h, w = ((s + 2 * self.padding + self.extra(s) - self.kernel) // self.stride + 1 for s in shape[1:])
        return self.out_channels, h, w

    def macs_per_neuron(self, shape: Shape) -> int:
        return self.kernel**2 * shape[0] // self.groups

    def formula(self, size: int) -> str:
        pad = f"+2·{self.padding}" if self.padding else ""
        extra = f"+{self.extra(size)}" if self.extra(size) else ""
        return f"({size}{pad}{extra}-{self.kernel})/{self.stride}+1"


@dataclass(frozen=True)
class MaxPool:
    """Overlapping max-pooling: window 3, step 2. Floor and ceil rounding coincide at 55, 27 and 13."""

    kernel: int = 3
    stride: int = 2
    prefix = "pool"

    def output(self, shape: Shape) -> Shape:
        h, w = ((s - self.kernel) // self.stride + 1 for s in shape[1:])
        return shape[0], h, w

    def formula(self, size: int) -> str:
        return f"({size}-{self.kernel})/{self.stride}+1"


@dataclass(frozen=True)
class ReLU:
    prefix = "relu"


@dataclass(frozen=True)
class LRN:
    """Response normalisation across channels, ``a / (k + c·Σa²)^beta``; c is ``alpha`` ("sum", the paper's formula,
    TensorFlow) or ``alpha/size`` ("mean": the 2012 source, Caffe, cuDNN, PyTorch)."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 2.0
    alpha_mode: Literal["mean", "sum"] = "mean"
    scope: Scope = "tower"
    prefix = "norm"

    @property
    def groups(self) -> int:
        return TOWERS if self.scope == "tower" else 1


@dataclass(frozen=True)
class SpatialNorm:
    """Response normalisation inside a map over a size x size neighbourhood (``rnorm`` of the 2012 source), alpha/size²."""

    size: int = 5
    alpha: float = 1e-3
    beta: float = 0.75
    k: float = 1.0
    prefix = "cnorm"


@dataclass(frozen=True)
class AdaptiveAvgPool:
    size: int
    prefix = "avgpool"

    def output(self, shape: Shape) -> Shape:
        return shape[0], self.size, self.size


@dataclass(frozen=True)
class Flatten:
    prefix = "flatten"

    def output(self, shape: Shape) -> Shape:
        return math.prod(shape), 1, 1


@dataclass(frozen=True)
class Dropout:
    p: float = 0.5
    prefix = "drop"


@dataclass(frozen=True)
class Linear:
    """Fully connected layer; ``out_features=None`` is the classifier and takes the variant's ``num_classes``."""

    out_features: int | None
    std: float | None = None
    bias: float | None = None
    prefix = "fc"

    def output(self, shape: Shape) -> Shape:
        if self.out_features is None:
            raise ValueError("out_features of the classifier are its variant's num_classes; ask a Variant's layers")
        return self.out_features, 1, 1

    def macs_per_neuron(self, shape: Shape) -> int:
        return math.prod(shape)


Op = Conv | MaxPool | ReLU | LRN | SpatialNorm | AdaptiveAvgPool | Flatten | Dropout | Linear
