"""What a call brings to the operations of ``stem.py``: images with their weights, whether the kernel may be offered them, and
what is done to them in front of torch's convolution where it is not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, channels_last

from .. import reference
from ._library import dense, wants_gradient, why_transformed
from ._stem_ways import STRIDE, WINDOW, Padding


class Image(NamedTuple):
    """What the operations read, in their order: images, weights, and how pixels are prepared."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None
    scale: Tensor | None
    padding: Padding


def out_size(
    x: Tensor, weight: Tensor, padding: Padding, stride: tuple[int, int] = (STRIDE, STRIDE)
) -> tuple[int, int]:
    """Rows and columns of the convolution's map; below 1 where an image is smaller than the window."""
    top, bottom, left, right = padding
    rows, columns = x.shape[-2] + top + bottom - weight.shape[-2], x.shape[-1] + left + right - weight.shape[-1]
    return rows // stride[0] + 1, columns // stride[1] + 1


def taken(image: Image) -> Image:
    """``image`` as the operations take it: what is not 8-bit pixels, or is differentiated by mean or scale, prepared already."""
    x, _, _, mean, scale, _ = image
    if mean is None or scale is None or (x.dtype == torch.uint8 and not wants_gradient(mean, scale)):
        return image
    return image._replace(x=reference.pixels(x, mean, scale, _dtype(image.weight)), mean=None, scale=None)


def sides(padding: Any) -> tuple[int, int, int, int] | None:
    """Top, bottom, left, right of a number, of rows and columns, or of all four; None of what torch alone understands."""
    if padding == "valid":
        return 0, 0, 0, 0
    four = (padding,) * 4 if not isinstance(padding, (tuple, list)) else tuple(padding)
    if len(four) == 2:
        four = (four[0], four[0], four[1], four[1])
    return four if len(four) == 4 and all(isinstance(p, (int, torch.SymInt)) and p >= 0 for p in four) else None


def image_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Image | None:
    """What the kernel may be offered of a convolution with torch's arguments; None where torch runs it, or refuses it."""
    if weight.dim() != 4 or tuple(weight.shape[1:]) != WINDOW:  # first, because it is quick: every convolution asks
        return None
    around = sides(padding)
    if around is None or not (x.dtype == weight.dtype or (_is_autocast(weight) and x.is_floating_point())):
        return None
    image = Image(x, weight, bias, None, None, around)
    return image if why_plain(image, stride, dilation, groups) is None else None


def why_plain(image: Image, stride: Any, dilation: Any = 1, groups: int = 1) -> str | None:
    """What the kernel is never asked: other convolutions, and what torch answers itself or says what is wrong with."""
    x, weight, bias, _, _, padding = image
    if weight.dim() != 4 or tuple(weight.shape[1:]) != WINDOW or not _is(stride, STRIDE):
        return "written for 11x11 windows over 3 channels with stride 4"
    if not _is(dilation, 1) or groups != 1:
        return "written for one group, without dilation"
    if x.dim() != 4 or x.shape[1] != 3 or x.numel() == 0:
        return f"written for images [N, 3, H, W], not {tuple(x.shape)}"
    if bias is not None and (bias.dtype != weight.dtype or tuple(bias.shape) != tuple(weight.shape[:1])):
        return f"written for a bias of the weight's dtype, a number for each map, not {bias.dtype} {tuple(bias.shape)}"
    if any(t is not None and t.device != x.device for t in image[1:5]):
        return "written for tensors on one device"
    rows, columns = out_size(x, weight, padding)
    if min(rows, columns) < 1:
        return f"no 11x11 window fits into {tuple(x.shape)}"
    if max(3 * x.shape[2] * x.shape[3], 4 * weight.shape[0] * rows * columns) >= 2**31 or max(padding) >= 2**16:
        return "written for images of less than 2^31 numbers, and maps of less than 2^31 bytes"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's own operations"
    return why_transformed()


def _is(value: Any, number: int) -> bool:
    """Whether ``value`` is ``number``, or that for rows and columns."""
    return value == number or (isinstance(value, (tuple, list)) and list(value) == [number, number])


def _is_autocast(weight: Tensor) -> bool:
    kind = weight.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def _dtype(weight: Tensor) -> torch.dtype:
    """What torch's convolution would compute in: the dtype of the autocast in force, which leaves fp64 alone."""
    if weight.dtype == torch.float64 or not _is_autocast(weight):
        return weight.dtype
    return torch.get_autocast_dtype(weight.device.type)


def cast(image: Image) -> Image:
    dtype = _dtype(image.weight)
    if dtype == image.weight.dtype:
        return image
    return image._replace(weight=image.weight.to(dtype), bias=None if image.bias is None else image.bias.to(dtype))


def prepared(image: Image) -> tuple[Tensor, tuple[int, int]]:
    """The image as torch's convolution takes it, and its padding: what is done in front of that where no kernel runs."""
    x, weight, _, mean, scale, padding = image
    dtype = _dtype(weight)
    if x.dtype == torch.uint8 and x.dim() == 4:
        x = dense(x, channels_last)
    if mean is not None and scale is not None:
        x = reference.pixels(x, mean, scale, dtype)
    elif dtype == weight.dtype:  # autocast casts by itself
        x = x.to(dtype)
    return reference.even_padding(x, padding)
