"""The same network in nothing but ``torch.nn``: what a user has without this package, with the same ``state_dict``."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import geometry, models
from ..convert import revert
from ..geometry import LayerFacts, Variant
from ..models.alexnet import layer
from ..reference import arithmetic_dtype


class TowerLRN(torch.nn.LocalResponseNorm):
    """torch's LRN inside each of G towers, which become images: ``[N, C, H, W]`` -> ``[G·N, C/G, H, W]`` and back."""

    def __init__(self, op: geometry.LRN) -> None:
        alpha = op.alpha * op.size if op.alpha_mode == "sum" else op.alpha
        super().__init__(op.size, alpha, op.beta, op.k)
        self.groups = op.groups

    def forward(self, input: Tensor) -> Tensor:
        n, c = input.shape[:2]
        towers = input.reshape(n * self.groups, c // self.groups, *input.shape[2:])
        if input.device.type == "cpu":  # torch has no LRN in half types on a CPU: fp32 stands in there
            towers = towers.to(arithmetic_dtype(input.dtype))
        return super().forward(towers).reshape(input.shape).to(input.dtype)


class StockSpatialNorm(torch.nn.Module):
    """The spatial norm of the 2012 source in torch's own operations."""

    def __init__(self, op: geometry.SpatialNorm) -> None:
        super().__init__()
        self.op = op

    def forward(self, input: Tensor) -> Tensor:
        mean = F.avg_pool2d(input.square(), self.op.size, stride=1, padding=self.op.size // 2)
        return input / mean.mul(self.op.alpha).add(self.op.k).pow(self.op.beta)


def stock_layer(facts: LayerFacts, towers: int = 1) -> torch.nn.Module:
    """As ``models.alexnet.layer``, without any operation of this package."""
    match facts.op:
        case geometry.LRN():
            return TowerLRN(facts.op)
        case geometry.SpatialNorm():
            return StockSpatialNorm(facts.op)
    return layer(replace(facts, preprocess=None), towers)  # torch's convolution knows of no pixels


def stock_alexnet(variant: str | Variant, num_classes: int | None = None, **overrides: object) -> models.AlexNet:
    """``models.alexnet`` in stock ``torch.nn``, its containers too: they would run our operations on torch's modules."""
    return revert(models.alexnet(variant, num_classes, layers=stock_layer, **overrides))
