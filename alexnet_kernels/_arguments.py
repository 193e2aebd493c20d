"""Checks of arguments that ``functional`` shares with ``_explain``; every error about an argument is raised in these."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import SymInt, Tensor

from . import reference
from .ops import _stem_arguments as _image
from .ops import stem as _stem

AlphaMode = Literal["mean", "sum"]
Pair = int | tuple[int, int]
Number = float | Tensor
Norm = tuple[int, Number, Number, Number]
Pooling = tuple[Pair, Pair | None, Pair, Pair, bool]
Convolution = tuple[Pair, Pair | str, Pair, int]
Sides = tuple[int, int, int, int]
Stem = tuple[Pair, Pair | Sides, bool]
Channels = Sequence[float] | Tensor
Precision = Literal["ieee", "tf32", "tf32x3"]


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def require_integer(name: str, value: object) -> None:
    if type(value) is not int and not isinstance(value, (Integral, SymInt)):
        raise TypeError(f"{name}={value!r} must be an integer, got {type(value).__name__}; convert with int({name})")


def lrn_scale(x: Tensor, size: int, alpha: Number, groups: int, alpha_mode: str) -> Number:
    """Check the arguments of a response normalisation; the factor of the plain sum of squares."""
    require_tensor("input", x)
    if x.dim() < 3:
        raise ValueError(
            f"input has {x.dim()} dimensions, shape {tuple(x.shape)}: response normalisation runs over dim 1 of "
            "[N, C, ...] with 3 or more (Expected 3D or higher dimensionality); add the missing ones with unsqueeze"
        )
    if x.is_complex():
        raise TypeError(
            f"input is {x.dtype}: response normalisation is defined on real numbers; pass input.abs() or real and imag"
        )
    require_integer("size", size)
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 (the number of neighbouring channels; the paper's is 5)")
    require_integer("groups", groups)
    if groups != 1 and (groups < 1 or x.shape[1] % groups):
        raise ValueError(f"groups={groups} does not divide the {x.shape[1]} channels of input {tuple(x.shape)}")
    return _factor(size, alpha, alpha_mode)


def _factor(size: int, alpha: Number, alpha_mode: str) -> Number:
    if alpha_mode == "mean":
        return alpha / size
    if alpha_mode == "sum":
        return alpha
    raise ValueError(
        f"alpha_mode={alpha_mode!r} is unknown: 'mean' divides alpha by size (torch, Caffe), 'sum' does not (paper)"
    )


def require_maps(x: Tensor, size: int) -> None:
    require_tensor("input", x)
    if not x.is_floating_point():
        raise TypeError(
            f"input is {x.dtype}: spatial normalisation needs a floating-point tensor; convert with .float()"
        )
    if x.dim() not in (3, 4):
        raise ValueError(f"input has {x.dim()} dimensions, shape {tuple(x.shape)}: [N, C, H, W] or [C, H, W] is needed")
    require_integer("size", size)
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size} must be odd and at least 1, so that the window has a centre")


_CONVOLUTION = ("stride", "padding", "dilation", "groups")
_STEM = ("stride", "padding", "ceil_mode")
_NORM = ("size", "alpha", "beta", "k")
_POOLING = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def require_convolution(conv: object) -> None:
    _require_parts("conv", conv, _CONVOLUTION)


def require_block(norm: object, pooling: object) -> None:
    """What comes after a convolution in one operation, complete."""
    _require_parts("norm", norm, _NORM)
    _require_parts("pooling", pooling, _POOLING)


def _require_parts(name: str, value: object, parts: tuple[str, ...]) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != len(parts):
        raise ValueError(f"{name}={value!r} must be the {len(parts)} values ({', '.join(parts)})")


def are_numbers(*coefficients: Number) -> bool:
    return not any(isinstance(value, Tensor) for value in coefficients)


def require_precision(value: str | None) -> None:
    if value is not None and value not in get_args(Precision):
        known = ", ".join(map(repr, get_args(Precision)))
        raise ValueError(f"precision={value!r} is unknown; use {known}, or None for what torch's flags say")


def require_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} must lie between 0 and 1: the share of the elements that dropout sets to 0")


def block_of(
    weight: Tensor, norm: Norm, pooling: Pooling, groups: int, alpha_mode: AlphaMode, *, pool_first: bool
) -> _stem.Block | None:
    """Norm and pooling as the operation takes them; None where they would be refused, which the operations by themselves say."""
    size, alpha, beta, k = norm
    if not are_numbers(*norm) or type(size) is not int or size < 1 or groups < 1 or weight.shape[0] % groups:
        return None
    return (size, _factor(size, alpha, alpha_mode), beta, k, groups), pooling, pool_first  # type: ignore[return-value]


def _pixel_numbers(x: Tensor, name: str, value: Channels) -> Tensor:
    """``mean`` or ``scale`` as a tensor on the image's device, one number a channel."""
    work = reference.arithmetic_dtype(x.dtype) if x.is_floating_point() else torch.float32
    if isinstance(value, Tensor):
        if value.device != x.device:
            raise ValueError(
                f"{name} is on {value.device}, input on {x.device}: pass numbers, or {name}.to(input.device)"
            )
        numbers = value.to(work)
    else:
        if isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r} must be one number for each channel: {name}=({value!r},) * 3")
        numbers = torch.tensor(tuple(value), dtype=work, device=x.device)
    if x.dim() == 4 and numbers.shape == x.shape[3:] != x.shape[1:2]:
        raise ValueError(
            f"input has the shape {tuple(x.shape)} with its channels last, where [N, C, H, W] is needed: pass "
            "input.permute(0, 3, 1, 2), which copies nothing"
        )
    if numbers.dim() != 1 or x.dim() < 3 or numbers.shape[0] != x.shape[-3]:
        raise ValueError(
            f"{name} has the shape {tuple(numbers.shape)}: it must be one number for each of the channels of input "
            f"{tuple(x.shape)}, such as (123.0, 117.0, 104.0)"
        )
    return numbers


def require_image(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair | Sides, mean: Channels | None, scale: Channels | None
) -> _image.Image:
    """The arguments of an operation on images, checked, in the form that its operation takes."""
    require_tensor("input", x)
    require_tensor("weight", weight)
    if weight.device != x.device:
        raise ValueError(f"input is on {x.device}, weight on {weight.device}: move one, as in input.to(weight.device)")
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise TypeError(f"input is {x.dtype}: images are floating point, or 8-bit pixels (torch.uint8); convert it")
    if (mean is None) != (scale is None):
        given, other, neutral = ("mean", "scale", 1) if scale is None else ("scale", "mean", 0)
        raise ValueError(
            f"{given} without {other}: (input - mean) * scale needs both; {other}={(neutral,) * 3} changes nothing"
        )
    if mean is None and x.dtype == torch.uint8:
        raise ValueError(
            "input is torch.uint8, pixels of an image, and mean and scale are missing: pass what the weight was trained "
            "with, (input - mean) * scale; mean=(0, 0, 0), scale=(1, 1, 1) for the pixels as they are"
        )
    around = _image.sides(padding)
    if around is None:
        raise ValueError(
            f"padding={padding!r} must be a number, (rows, columns) or (top, bottom, left, right), none of them below 0"
        )
    numbers: tuple[Tensor | None, Tensor | None] = (None, None)
    if mean is not None and scale is not None:
        numbers = _pixel_numbers(x, "mean", mean), _pixel_numbers(x, "scale", scale)
    return _image.Image(x, weight, bias, *numbers, around)


def overhanging(image: _image.Image, stride: Pair) -> _image.Image:
    """As much more zeros below and on the right as the last window needs: ``ceil_mode`` of a convolution."""
    top, bottom, left, right = image.padding
    (height, width), (rows, columns) = image.x.shape[-2:], image.weight.shape[-2:]
    down, across = (stride, stride) if isinstance(stride, (int, SymInt)) else stride
    if down < 1 or across < 1:
        return image  # torch says what is wrong with it
    below, beside = (rows - height - top - bottom) % down, (columns - width - left - right) % across
    return image._replace(padding=(top, bottom + below, left, right + beside))


def stem_image(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: Stem, mean: Channels | None, scale: Channels | None
) -> tuple[Pair, _image.Image]:
    _require_parts("conv", conv, _STEM)
    stride, padding, ceil_mode = conv
    image = require_image(x, weight, bias, padding, mean, scale)
    if x.dim() != 4:
        raise ValueError(
            f"input has {x.dim()} dimensions, shape {tuple(x.shape)}: [N, C, H, W] is needed; unsqueeze(0)"
        )
    return stride, overhanging(image, stride) if ceil_mode else image
