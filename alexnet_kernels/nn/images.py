"""Convolutions that take images as they are decoded, and AlexNet's first block as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import functional as F
from .._fusion import ORDINARY_TENSORS
from ._layers import lrn_arguments, lrn_options, pool_arguments, refuse_script, weights, why_not_conv, why_not_pool

Channels = Literal["RGB", "BGR"]


class PixelConv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` that takes images as they are decoded too: uint8 RGB, ``[N, 3, H, W]`` in either memory format.

    A pixel becomes ``(pixel - mean) * scale`` on the way in, see ``functional.conv1``; floating-point images are taken as
    prepared already, in the order of channels that the weights were trained with.

    Args:
        in_channels, ..., dtype: of ``torch.nn.Conv2d``.
        mean, scale: three numbers each, of R, G and B. Without them only floating point is taken. They are no part of
            ``state_dict``, whose keys are those of ``torch.nn.Conv2d``, and stay fp32 whatever the module is converted to.
        channels: ``"BGR"`` where the weights were trained with that order (Caffe's): for pixels they are read in reverse.

    >>> conv = PixelConv2d(3, 96, 11, 4, mean=(123.0, 117.0, 104.0), scale=(1.0, 1.0, 1.0))
    >>> conv(torch.zeros(1, 3, 227, 227, dtype=torch.uint8)).shape
    torch.Size([1, 96, 55, 55])
    """

    __prepare_scriptable__ = refuse_script
    ceil_mode: bool = False
    mean: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: F.Pair,
        stride: F.Pair = 1,
        padding: F.Pair | str = 0,
        dilation: F.Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mean: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        channels: Channels = "RGB",
    ) -> None:
        options = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *options)  # type: ignore[arg-type]
        self.channels = channels
        self._numbers = _pixel_numbers(mean, scale, in_channels, channels)
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)
        self._place_numbers()

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._weights_for(input)
        why_not = why_not_image(self)
        if why_not is not None or not ORDINARY_TENSORS.issuperset((type(input), type(weight), type(bias))):
            return super().forward(self._by_torch(input))
        options = {"ceil_mode": self.ceil_mode, **self._pixels_of(input)}
        return F.conv1(input, weight, bias, self.stride, self.padding, **options)  # type: ignore[arg-type]

    def _by_torch(self, input: Tensor) -> Tensor:
        """What torch's convolution is given: a prepared image in the weights' order of channels."""
        if self.mean is None or self.scale is None:
            return input
        return _prepared(input, self.mean, self.scale, self.channels == "BGR", self.weight.dtype)

    def _pixels_of(self, input: Tensor) -> dict[str, Any]:
        """How ``input`` is still to be prepared; floating-point images are."""
        return {"mean": self.mean, "scale": self.scale} if _are_pixels(input) else {}

    def _weights_for(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """``weight, bias``. Pixels are RGB: turning 35 thousand weights round is quicker than turning images."""
        weight, bias = weights(self)
        return (weight.flip(1) if self.channels == "BGR" and _are_pixels(input) else weight), bias

    def _place_numbers(self) -> None:
        if self._numbers is not None:
            self.mean, self.scale = (
                torch.tensor(numbers, dtype=torch.float32, device=self.weight.device) for numbers in self._numbers
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place_numbers()  # afresh: a half type would round them, and only their device is to follow
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if (
            self.mean is not None and self.mean.device != self.weight.device
        ):  # load_state_dict(assign=True) moved the weights
            self._place_numbers()

    def extra_repr(self) -> str:
        if self._numbers is None:
            return super().extra_repr()
        order = f", channels={self.channels!r}" if self.channels != "RGB" else ""
        return f"{super().extra_repr()}, mean={self._numbers[0]}, scale={self._numbers[1]}{order}"


@torch.fx.wrap
def _prepared(image: Tensor, mean: Tensor, scale: Tensor, reverse: bool, dtype: torch.dtype) -> Tensor:
    """One call in a graph of ``torch.fx``, which then takes pixels and floating-point images as the module does."""
    if not _are_pixels(image):
        return image
    image = (image.float() - mean[:, None, None]) * scale[:, None, None]
    return (image.flip(-3) if reverse else image).to(dtype)


def _are_pixels(input: object) -> bool:
    return isinstance(input, Tensor) and input.dtype == torch.uint8


def _pixel_numbers(
    mean: Sequence[float] | None, scale: Sequence[float] | None, channels: int, order: str
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """``mean`` and ``scale`` of pixels, checked."""
    if order not in ("RGB", "BGR"):
        raise ValueError(f"channels={order!r} is no order of channels: 'RGB' or 'BGR', as the weights were trained")
    if mean is None and scale is None:
        return None
    if mean is None or scale is None:
        raise ValueError(f"mean={mean!r}, scale={scale!r}: (pixel - mean) * scale needs both, or neither is given")
    numbers = tuple(map(float, mean)), tuple(map(float, scale))
    if (len(numbers[0]), len(numbers[1])) != (channels, channels):
        raise ValueError(f"mean={mean!r}, scale={scale!r} must be {channels} numbers each, one a channel")
    return numbers


def why_not_image(conv: torch.nn.Conv2d) -> str | None:
    if isinstance(conv.padding, str):
        return f"padding={conv.padding!r}"
    if conv.groups != 1 or set(conv.dilation) != {1}:
        return f"groups={conv.groups}, dilation={conv.dilation}"
    return why_not_conv(conv)


class CeilConv2d(PixelConv2d):
    """``PixelConv2d`` whose output size is rounded up: the last window may hang over the right and bottom edge, onto zeros.

    The 2012 source counts modules so (``layer.py:1004``): 224 pixels, an 11x11 kernel and stride 4 give 55, not 54.
    """

    ceil_mode = True

    def _by_torch(self, input: Tensor) -> Tensor:
        right, bottom = (self._overhang(input.shape[axis], axis) for axis in (-1, -2))
        return torch.nn.functional.pad(super()._by_torch(input), (0, right, 0, bottom))

    def _overhang(self, size: int, axis: int) -> int:
        """Zeros after the last row or column that the last window needs."""
        padding = 0 if isinstance(self.padding, str) else self.padding[axis]
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (reach - size - 2 * padding) % self.stride[axis]


class AlexNetStem(PixelConv2d):
    """AlexNet's first block as one module: convolution, ReLU, response normalisation and max pooling, the last two in either
    order.

    ``[N, 3, H, W]``, floating point or uint8 RGB, to ``[N, out_channels, OH, OW]``; see ``functional.alexnet_stem``. The
    ``state_dict`` is that of the convolution.

    Args:
        out_channels, kernel_size, stride, padding, ceil_mode, bias: of the convolution.
        norm: ``(size, alpha, beta, k)``; ``groups`` and ``alpha_mode`` of ``LocalResponseNorm``.
        pooling: ``(kernel_size, stride, padding, dilation, ceil_mode)``.
        relu: False for the 2012 source's block, whose ReLU comes after it.
        pool_first: CaffeNet's order; otherwise the paper's.
        mean, scale, channels: as for :class:`PixelConv2d`.

    >>> stem = AlexNetStem(mean=(123.0, 117.0, 104.0), scale=(1.0, 1.0, 1.0))
    >>> stem(torch.zeros(1, 3, 227, 227, dtype=torch.uint8)).shape
    torch.Size([1, 96, 27, 27])
    """

    def __init__(
        self,
        out_channels: int = 96,
        kernel_size: F.Pair = 11,
        stride: F.Pair = 4,
        padding: F.Pair = 0,
        *,
        norm: tuple[int, float, float, float] = (5, 1e-4, 0.75, 2.0),
        pooling: F.Pooling = (3, 2, 0, 1, False),
        relu: bool = True,
        pool_first: bool = False,
        groups: int = 1,
        alpha_mode: F.AlphaMode = "mean",
        ceil_mode: bool = False,
        bias: bool = True,
        mean: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        channels: Channels = "RGB",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: Any = {
            "bias": bias,
            "device": device,
            "dtype": dtype,
            "mean": mean,
            "scale": scale,
            "channels": channels,
        }
        super().__init__(3, out_channels, kernel_size, stride, padding, **options)
        self.norm, self.pooling, self.relu, self.pool_first = norm, pooling, relu, pool_first
        self.norm_groups, self.alpha_mode, self.ceil_mode = groups, alpha_mode, ceil_mode

    @classmethod
    def from_layers(
        cls,
        conv: torch.nn.Conv2d,
        norm: torch.nn.LocalResponseNorm,
        pool: torch.nn.MaxPool2d,
        mean: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        *,
        relu: bool = True,
        pool_first: bool = False,
    ) -> AlexNetStem:
        """The same block, with the very parameters of ``conv`` and, where they are not given, its mean and scale.

        Raises:
            ValueError: ``conv`` has not 3 input channels, or has groups, dilation, a padding mode or a padding in words; ``pool``
                returns indices.
            TypeError: one of the three is another kind of layer.
        """
        kinds = {"conv": torch.nn.Conv2d, "norm": torch.nn.LocalResponseNorm, "pool": torch.nn.MaxPool2d}
        for (name, kind), given in zip(kinds.items(), (conv, norm, pool), strict=True):
            if not isinstance(given, kind):
                raise TypeError(
                    f"{name} is a {type(given).__name__}, a stem needs a {kind.__name__}; leave the layers as they are"
                )
        why = f"in_channels={conv.in_channels}" if conv.in_channels != 3 else why_not_image(conv) or why_not_pool(pool)
        if why is not None:
            raise ValueError(f"{why}: a stem cannot have that; leave the layers as they are")
        if mean is None and scale is None:
            mean, scale = getattr(conv, "_numbers", None) or (None, None)
        pixels = {"mean": mean, "scale": scale, "channels": getattr(conv, "channels", "RGB")}
        options: Any = {"ceil_mode": getattr(conv, "ceil_mode", False), **lrn_options(norm), **pixels}
        block: Any = {"norm": lrn_arguments(norm), "pooling": pool_arguments(pool)}
        block |= {"relu": relu, "pool_first": pool_first}
        size, stride, padding = conv.kernel_size, conv.stride, conv.padding
        made = cls(conv.out_channels, size, stride, padding, **block, **options, device="meta")  # type: ignore[arg-type]
        made.weight, made.bias = conv.weight, conv.bias
        made._place_numbers()
        return made.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._weights_for(input)
        conv: Any = (self.stride, self.padding, self.ceil_mode)
        options: Any = {"relu": self.relu, "pool_first": self.pool_first}
        options |= {"groups": self.norm_groups, "alpha_mode": self.alpha_mode}
        return F.alexnet_stem(input, weight, bias, conv, self.norm, self.pooling, **options, **self._pixels_of(input))

    def extra_repr(self) -> str:
        ceil = ", ceil_mode=True" if self.ceil_mode else ""
        groups = f", norm_groups={self.norm_groups}" if self.norm_groups != 1 else ""
        mode = f", alpha_mode={self.alpha_mode!r}" if self.alpha_mode != "mean" else ""
        order = (", relu=False" if not self.relu else "") + (", pool_first=True" if self.pool_first else "")
        return f"{super().extra_repr()}{ceil}, norm={self.norm}{groups}{mode}, pooling={self.pooling}{order}"
