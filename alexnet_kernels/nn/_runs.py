"""Runs of modules that one function stands for: which there are, and how its arguments are read from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .._fusion import Known, Run
from ._layers import lrn_arguments, lrn_options, pool_arguments, weights, why_not_conv, why_not_pool
from .fused import ConvReLU2d, LinearReLU
from .images import AlexNetStem, CeilConv2d, PixelConv2d, why_not_image
from .normalisation import LocalResponseNorm, MaxPool2d

Children = tuple[Any, ...]


def conv1_relu(input: Tensor, children: Children) -> Tensor:
    conv, _ = children
    weight, bias = conv._weights_for(input)
    options = {"ceil_mode": conv.ceil_mode, **conv._pixels_of(input)}
    return F.conv1_relu(input, weight, bias, conv.stride, conv.padding, **options)


def alexnet_stem(input: Tensor, children: Children) -> Tensor:
    if input.dim() != 4:  # one image by itself, which the parts take
        for child in children:
            input = child(input)
        return input
    conv, *_, first, second = children
    pool_first = isinstance(first, torch.nn.MaxPool2d)
    pool, norm = (first, second) if pool_first else (second, first)
    options: dict[str, Any] = {"relu": len(children) == 4, "pool_first": pool_first}
    options |= {**lrn_options(norm), **conv._pixels_of(input)}
    weight, bias = conv._weights_for(input)
    geometry = (conv.stride, conv.padding, conv.ceil_mode)
    return F.alexnet_stem(input, weight, bias, geometry, lrn_arguments(norm), pool_arguments(pool), **options)


def conv2d_relu(input: Tensor, children: Children) -> Tensor:
    conv, _ = children
    return F.conv2d_relu(input, *weights(conv), conv.stride, conv.padding, conv.dilation, conv.groups)


def conv2d_relu_chain(input: Tensor, children: Children) -> Tensor:
    layers = [(*weights(c), (c.stride, c.padding, c.dilation, c.groups)) for c in children[::2]]
    return F.conv2d_relu_chain(input, layers)


def linear_relu(input: Tensor, children: Children) -> Tensor:
    linear, _ = children
    return F.linear_relu(input, *weights(linear))


def linear_relu_dropout(input: Tensor, children: Children) -> Tensor:
    linear, _, dropout = children
    return F.linear_relu_dropout(input, *weights(linear), dropout.p, dropout.training)


def lrn_max_pool2d(input: Tensor, children: Children) -> Tensor:
    norm, pool = children
    return F.lrn_max_pool2d(input, *lrn_arguments(norm), *pool_arguments(pool), **lrn_options(norm))


def max_pool2d_lrn(input: Tensor, children: Children) -> Tensor:
    pool, norm = children
    return F.max_pool2d_lrn(input, *lrn_arguments(norm), *pool_arguments(pool), **lrn_options(norm))


def _conv_lrn_pool_arguments(conv: torch.nn.Conv2d, norm: Any, pool: Any) -> tuple[Any, ...]:
    convolution = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return *weights(conv), convolution, lrn_arguments(norm), pool_arguments(pool)


def conv2d_relu_lrn_max_pool2d(input: Tensor, children: Children) -> Tensor:
    conv, _, norm, pool = children
    arguments = _conv_lrn_pool_arguments(conv, norm, pool)
    return F.conv2d_relu_lrn_max_pool2d(input, *arguments, **lrn_options(norm))


def conv2d_relu_max_pool2d_lrn(input: Tensor, children: Children) -> Tensor:
    conv, _, pool, norm = children
    arguments = _conv_lrn_pool_arguments(conv, norm, pool)
    return F.conv2d_relu_max_pool2d_lrn(input, *arguments, **lrn_options(norm))


_CONV, _LINEAR, _RELU = (torch.nn.Conv2d,), (torch.nn.Linear,), (torch.nn.ReLU,)
_IMAGE = (PixelConv2d, CeilConv2d)
_LRN, _POOL = (torch.nn.LocalResponseNorm, LocalResponseNorm), (torch.nn.MaxPool2d, MaxPool2d)

KNOWN = Known(  # a new run is a row; the function's name is what a report prints
    runs=(
        Run((_CONV, _RELU), conv2d_relu),
        Run((_CONV, _RELU) * 2, conv2d_relu_chain),
        Run((_CONV, _RELU) * 3, conv2d_relu_chain),
        Run((_CONV, _RELU, _LRN, _POOL), conv2d_relu_lrn_max_pool2d),
        Run((_CONV, _RELU, _POOL, _LRN), conv2d_relu_max_pool2d_lrn),
        Run((_IMAGE, _RELU), conv1_relu),
        Run((_IMAGE, _RELU, _LRN, _POOL), alexnet_stem),
        Run((_IMAGE, _RELU, _POOL, _LRN), alexnet_stem),
        Run((_IMAGE, _LRN, _POOL), alexnet_stem),
        Run((_IMAGE, _POOL, _LRN), alexnet_stem),
        Run((_LINEAR, _RELU), linear_relu),
        Run((_LINEAR, _RELU, (torch.nn.Dropout,)), linear_relu_dropout),
        Run((_LRN, _POOL), lrn_max_pool2d),
        Run((_POOL, _LRN), max_pool2d_lrn),
    ),
    conditions={
        torch.nn.Conv2d: why_not_conv,
        PixelConv2d: why_not_image,
        CeilConv2d: why_not_image,
        torch.nn.MaxPool2d: why_not_pool,
        MaxPool2d: why_not_pool,
    },
    whole=(ConvReLU2d, LinearReLU, AlexNetStem),
)
