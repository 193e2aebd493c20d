"""What each function of ``functional`` would run, without running it: one explainer a function, with its arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, empty_like

from . import reference
from ._arguments import (
    Channels,
    Norm,
    Number,
    Pooling,
    Precision,
    Stem,
    are_numbers,
    block_of,
    lrn_scale,
    overhanging,
    require_block,
    require_convolution,
    require_image,
    require_maps,
    require_precision,
    require_probability,
    require_tensor,
    stem_image,
)
from .ops import _stem_arguments as _image
from .ops import composite as _composite
from .ops import conv as _conv
from .ops import conv_chain as _conv_chain
from .ops import fused as _fused
from .ops import linear as _linear
from .ops import lrn as _lrn
from .ops import pool as _pool
from .ops import stem as _stem
from .ops._library import Explanation

WHY_LEARNED = "alpha, beta or k is a tensor; kernels take numbers, only plain torch differentiates by them"
WHY_EMPTY = "an empty input is returned as it is"


def _meta(*values: Any) -> tuple[Any, ...]:
    """The same shapes and dtypes without data: torch's own errors come from them, and nothing is computed."""
    return tuple(empty_like(value, device="meta") if isinstance(value, Tensor) else value for value in values)


def explain_lrn(
    x: Tensor, size: int, alpha: Number, beta: Number, k: Number, *, groups: int, alpha_mode: str
) -> Explanation:
    scale = lrn_scale(x, size, alpha, groups, alpha_mode)
    if x.numel() == 0:
        return Explanation.of_one("lrn", "reference", WHY_EMPTY)
    if isinstance(scale, Tensor) or isinstance(beta, Tensor) or isinstance(k, Tensor):
        return _composite.explain("lrn", WHY_LEARNED)
    return _lrn.explain(x, size, scale, beta, k, groups)


def explain_spatial(x: Tensor, size: int, *_: float) -> Explanation:
    require_maps(x, size)
    return _composite.explain("spatial_response_norm")


def explain_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, precision: Precision | None, relu: bool = True
) -> Explanation:
    require_tensor("input", x)
    require_tensor("weight", weight)
    require_precision(precision)
    reference.conv2d_relu(*_meta(x, weight, bias, *args))
    return _conv.explain("conv2d_relu" if relu else "conv2d", x, weight, bias, relu, *args, precision=precision)


def explain_conv_chain(x: Tensor, layers: Any) -> Explanation:
    require_tensor("input", x)
    (y,) = _meta(x)
    for weight, bias, conv in layers:
        require_tensor("weight", weight)
        require_convolution(conv)
        y = reference.conv2d_relu(y, *_meta(weight, bias), *conv)
    return _conv_chain.explain(x, layers)


def explain_conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *conv: Any, precision: Precision | None = None
) -> Explanation:
    require_tensor("input", x)
    require_tensor("weight", weight)
    image, why = _image.image_of(x, weight, bias, *conv) if precision is None else None, None
    if image is not None:
        said = _stem.explain("conv2d_relu", image, (conv[0],), True, None)
        if isinstance(said, Explanation):
            return said
        why = said
    return _because(why, explain_conv(x, weight, bias, *conv, precision=precision))


def _because(why: str | None, explanation: Explanation) -> Explanation:
    """``explanation``, and why the kernel for images does not run the whole of it."""
    if why is None or "cuda" not in explanation.why_not:
        return explanation
    return replace(explanation, why_not=explanation.why_not | {"cuda": why})


def _taken(image: _image.Image) -> _image.Image:
    """What ``stem.taken`` makes of it, without its memory."""
    if image.mean is None or image.x.dtype == torch.uint8:
        return image
    return image._replace(x=_like(image.weight, image.x.shape), mean=None, scale=None)


def _plain_image(image: _image.Image) -> tuple[Tensor, tuple[int, int]]:
    """What ``stem.prepared`` makes of it, without its memory."""
    x, padding = _image.prepared(_image.Image(*_meta(*image)))
    return _like(image.weight, x.shape), padding


def explain_image(
    op: str,
    relu: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    *,
    ceil_mode: bool,
    **numbers: Any,
) -> Explanation:
    image = require_image(x, weight, bias, padding, **numbers)
    image = _taken(overhanging(image, stride) if ceil_mode else image)
    said = _stem.explain(op, image, (stride,), relu, None)
    if isinstance(said, Explanation):
        return said
    x, left = _plain_image(image)
    general = explain_conv(x, weight, bias, stride, left, 1, 1, precision=None, relu=relu)
    return _because(said, replace(general, op=op))


def explain_conv1(*args: Any, **options: Any) -> Explanation:
    return explain_image("conv1", False, *args, **options)


def explain_conv1_relu(*args: Any, **options: Any) -> Explanation:
    return explain_image("conv1_relu", True, *args, **options)


def explain_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Stem,
    norm: Norm,
    pooling: Pooling,
    *,
    mean: Channels | None,
    scale: Channels | None,
    relu: bool,
    **options: Any,
) -> Explanation:
    require_block(norm, pooling)
    stride, image = stem_image(x, weight, bias, conv, mean, scale)
    image = _taken(image)
    block = block_of(weight, norm, pooling, **options)
    why: Explanation | str = "a kernel takes numbers, and groups that divide the channels"
    if block is not None:
        why = _stem.explain("alexnet_stem", image, (stride,), relu, block)
    if isinstance(why, Explanation):
        return why
    plain, left = _plain_image(image)
    explainer = explain_conv_pool_lrn if options.pop("pool_first") else explain_conv_lrn_pool
    said = explainer(plain, weight, bias, (stride, left, 1, 1), norm, pooling, relu=relu, **options)
    return _because(why, replace(said, op="alexnet_stem"))


def explain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Explanation:
    require_tensor("input", x)
    require_tensor("weight", weight)
    reference.linear_relu(*_meta(x, weight, bias))
    return _linear.explain("linear_relu", x, weight, bias)


def explain_linear_dropout(x: Tensor, weight: Tensor, bias: Tensor | None, p: float, training: bool) -> Explanation:
    require_tensor("input", x)
    require_tensor("weight", weight)
    require_probability(p)
    reference.linear_relu(*_meta(x, weight, bias))
    return _linear.explain("linear_relu_dropout", x, weight, bias, p if training else 0.0)


def explain_pool(x: Tensor, *args: Any) -> Explanation:
    require_tensor("input", x)
    *pooling, return_indices = args
    reference.max_pool2d(*_meta(x), *pooling)
    return _composite.explain("max_pool2d", _composite.WHY_INDICES) if return_indices else _pool.explain(x, *pooling)


def _like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Another shape on the device and in the dtype of ``x``, without its memory."""
    return x.new_empty(1).expand(shape)


def explain_lrn_and_pool(
    op: str, x: Tensor, *args: Any, pool_first: bool, relu: bool = False, **options: Any
) -> Explanation:
    require_tensor("input", x)
    (size, alpha, beta, k), pooling = args[:4], args[4:]
    if x.dim() == 4 and x.numel() and are_numbers(alpha, beta, k):
        norm = (size, lrn_scale(x, size, alpha, **options), beta, k, options["groups"])
        reference.max_pool2d(*_meta(x), *pooling)
        whole = _fused.explain(op, x, norm, pooling, pool_first, relu)  # type: ignore[arg-type]
        if whole.backend != "reference":
            return whole
        why_not = whole.why_not
    else:
        why_not = Explanation.of_one(op, "reference", "a kernel takes [N, C, H, W] and numbers").why_not
    if not pool_first:
        return Explanation.of_parts(op, why_not, explain_lrn(x, *args[:4], **options), explain_pool(x, *pooling, False))
    pooled = _like(x, reference.max_pool2d(*_meta(x), *pooling).shape)
    return Explanation.of_parts(
        op, why_not, explain_pool(x, *pooling, False), explain_lrn(pooled, *args[:4], **options)
    )


def explain_lrn_pool(x: Tensor, *args: Any, **options: Any) -> Explanation:
    return explain_lrn_and_pool("lrn_max_pool2d", x, *args, pool_first=False, **options)


def explain_pool_lrn(x: Tensor, *args: Any, **options: Any) -> Explanation:
    return explain_lrn_and_pool("max_pool2d_lrn", x, *args, pool_first=True, **options)


def explain_conv_and_rest(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Any,
    norm: Any,
    pooling: Any,
    *,
    relu: bool = True,
    **options: Any,
) -> Explanation:
    require_tensor("input", x)
    require_tensor("weight", weight)
    require_convolution(conv)
    require_block(norm, pooling)
    image, block = _image.image_of(x, weight, bias, *conv), block_of(weight, norm, pooling, **options)
    why = None
    if image is not None and block is not None:
        whole = _stem.explain(op, image, (conv[0],), relu, block)
        if isinstance(whole, Explanation):
            return whole
        why = whole
    a = _like(x, reference.conv2d_relu(*_meta(x, weight, bias, *conv)).shape)
    rest = explain_lrn_and_pool(op.removeprefix("conv2d_relu_"), a, *norm, *pooling, relu=relu, **options)
    in_one = not rest.parts  # then that operation has bias and ReLU too
    left = None if in_one and x.device.type in _fused.BIAS_APART else bias
    first = explain_conv(x, weight, left, *conv, precision=None, relu=relu and not in_one)
    parts = rest.parts or (rest,)
    return _because(why, Explanation.of_parts(op, first.why_not | rest.why_not, first, *parts))


def explain_conv_lrn_pool(*args: Any, **options: Any) -> Explanation:
    return explain_conv_and_rest("conv2d_relu_lrn_max_pool2d", *args, pool_first=False, **options)


def explain_conv_pool_lrn(*args: Any, **options: Any) -> Explanation:
    return explain_conv_and_rest("conv2d_relu_max_pool2d_lrn", *args, pool_first=True, **options)
