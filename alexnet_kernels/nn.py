"""Modules for ``torch.nn`` users: subclasses with torch's constructors and ``state_dict``s, running our operations.

A tensor subclass or a tracer's proxy, as input or as weight, gets torch's own calls: it is there to see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from . import functional as F
from ._fusion import ORDINARY_TENSORS, Known, Run, RunsAsOne, why_nowhere

Channels = Literal["RGB", "BGR"]


def _refuse_script(self: torch.nn.Module) -> NoReturn:
    name = type(self).__name__
    torchs = {"FusedSequential": "Sequential", "PixelConv2d": "Conv2d"}.get(name, name)
    if hasattr(torch.nn, torchs):
        raise RuntimeError(
            f"{name} cannot be scripted: revert first; alexnet_kernels.revert(model) makes it torch.nn.{torchs} again, "
            "and torch.jit.script(model) then works. torch.jit.trace, torch.export and torch.compile need no revert"
        )
    raise RuntimeError(
        f"{name} cannot be scripted and has no class in torch.nn to revert to; use torch.jit.trace, torch.export or "
        "torch.compile, or build the model from torch.nn's modules, convert it, and revert first"
    )


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """``torch.nn.LocalResponseNorm`` with ``groups`` and ``alpha_mode``; see ``functional.local_response_norm``.

    >>> LocalResponseNorm(5, k=2.0, groups=2)
    LocalResponseNorm(5, alpha=0.0001, beta=0.75, k=2.0, groups=2)
    """

    __prepare_scriptable__ = _refuse_script

    groups: int = 1  # class attributes, so that an instance of torch's class can change into this one
    alpha_mode: F.AlphaMode = "mean"

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        groups: int = 1,
        alpha_mode: F.AlphaMode = "mean",
    ) -> None:
        super().__init__(size, alpha, beta, k)
        self.groups = groups
        self.alpha_mode = alpha_mode

    def forward(self, input: Tensor) -> Tensor:
        return F.local_response_norm(
            input, self.size, self.alpha, self.beta, self.k, groups=self.groups, alpha_mode=self.alpha_mode
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _scope(self)


def _scope(norm: LocalResponseNorm | _LRNAndPool) -> str:
    groups = f", groups={norm.groups}" if norm.groups != 1 else ""
    mode = f", alpha_mode={norm.alpha_mode!r}" if norm.alpha_mode != "mean" else ""
    return groups + mode


class SpatialResponseNorm(torch.nn.Module):
    """Response normalisation over size x size neighbours inside a map; see ``functional.spatial_response_norm``."""

    def __init__(self, size: int, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, input: Tensor) -> Tensor:
        return F.spatial_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


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

    __prepare_scriptable__ = _refuse_script
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
        why_not = _why_not_image(self)
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
        weight, bias = _weights(self)
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


def _why_not_image(conv: torch.nn.Conv2d) -> str | None:
    if isinstance(conv.padding, str):
        return f"padding={conv.padding!r}"
    if conv.groups != 1 or set(conv.dilation) != {1}:
        return f"groups={conv.groups}, dilation={conv.dilation}"
    return _why_not_conv(conv)


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
        why = (
            f"in_channels={conv.in_channels}" if conv.in_channels != 3 else _why_not_image(conv) or _why_not_pool(pool)
        )
        if why is not None:
            raise ValueError(f"{why}: a stem cannot have that; leave the layers as they are")
        if mean is None and scale is None:
            mean, scale = getattr(conv, "_numbers", None) or (None, None)
        pixels = {"mean": mean, "scale": scale, "channels": getattr(conv, "channels", "RGB")}
        options: Any = {"ceil_mode": getattr(conv, "ceil_mode", False), **_lrn_options(norm), **pixels}
        block: Any = {"norm": _lrn_arguments(norm), "pooling": _pool_arguments(pool)}
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


class ConvReLU2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` and the ReLU after it in one; constructor, ``state_dict`` and errors of ``torch.nn.Conv2d``.

    ``[N, C, H, W]`` or ``[C, H, W]`` to the same with ``out_channels`` maps, in the input's dtype; any ``padding_mode``.

    >>> ConvReLU2d(3, 8, 3, padding=1)(torch.randn(1, 3, 5, 5)).min() >= 0
    tensor(True)
    """

    __prepare_scriptable__ = _refuse_script

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _weights(self)
        if self.padding_mode != "zeros" or not ORDINARY_TENSORS.issuperset((type(input), type(weight), type(bias))):
            return torch.nn.functional.relu(super().forward(input))
        return F.conv2d_relu(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


class LinearReLU(torch.nn.Linear):
    """``torch.nn.Linear`` and the ReLU after it in one; constructor, ``state_dict`` and errors of ``torch.nn.Linear``.

    ``[..., in_features]`` to ``[..., out_features]`` in the input's dtype.

    >>> LinearReLU(4, 2)
    LinearReLU(in_features=4, out_features=2, bias=True)
    """

    __prepare_scriptable__ = _refuse_script

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _weights(self)
        if not ORDINARY_TENSORS.issuperset((type(input), type(weight), type(bias))):
            return torch.nn.functional.relu(super().forward(input))
        return F.linear_relu(input, weight, bias)


class MaxPool2d(torch.nn.MaxPool2d):
    """``torch.nn.MaxPool2d``: constructor, shapes, dtypes (integers too), ``return_indices`` and errors.

    >>> MaxPool2d(3, stride=2)
    MaxPool2d(kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False)
    """

    __prepare_scriptable__ = _refuse_script

    def forward(self, input: Tensor) -> Any:
        if type(input) not in ORDINARY_TENSORS:
            return super().forward(input)
        return F.max_pool2d(input, *_pool_arguments(self), self.return_indices)


class _LRNAndPool(torch.nn.Module):
    """What ``LRNMaxPool2d`` and ``MaxPoolLRN2d`` share: the arguments of both operations, no parameters."""

    __prepare_scriptable__ = _refuse_script

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        kernel_size: F.Pair = 3,
        stride: F.Pair | None = 2,
        padding: F.Pair = 0,
        dilation: F.Pair = 1,
        ceil_mode: bool = False,
        *,
        groups: int = 1,
        alpha_mode: F.AlphaMode = "mean",
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.dilation, self.ceil_mode = padding, dilation, ceil_mode
        self.groups, self.alpha_mode = groups, alpha_mode

    def extra_repr(self) -> str:
        norm = torch.nn.LocalResponseNorm.extra_repr(self)  # type: ignore[arg-type]
        return f"{norm}{_scope(self)}, {torch.nn.MaxPool2d.extra_repr(self)}"  # type: ignore[arg-type]


class LRNMaxPool2d(_LRNAndPool):
    """``LocalResponseNorm``, then ``MaxPool2d`` (the paper's order), in one; see ``functional.lrn_max_pool2d``.

    ``[N, C, H, W]`` to the same with smaller maps, in the input's dtype and layout. LRN's arguments come first, then the
    pool's; ``stride=None`` is ``kernel_size``, as in torch.

    >>> LRNMaxPool2d(5, k=2.0)(torch.ones(1, 8, 13, 13)).shape
    torch.Size([1, 8, 6, 6])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.lrn_max_pool2d(input, *_lrn_arguments(self), *_pool_arguments(self), **_lrn_options(self))


class MaxPoolLRN2d(_LRNAndPool):
    """``MaxPool2d``, then ``LocalResponseNorm`` (CaffeNet's order), in one; see ``functional.max_pool2d_lrn``.

    Arguments, shapes and dtypes of :class:`LRNMaxPool2d`.

    >>> MaxPoolLRN2d(5)
    MaxPoolLRN2d(5, alpha=0.0001, beta=0.75, k=1.0, kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False)
    """

    def forward(self, input: Tensor) -> Tensor:
        if type(input) in ORDINARY_TENSORS:
            return F.max_pool2d_lrn(input, *_lrn_arguments(self), *_pool_arguments(self), **_lrn_options(self))
        pooled = torch.nn.functional.max_pool2d(input, *_pool_arguments(self))
        return F.local_response_norm(pooled, *_lrn_arguments(self), **_lrn_options(self))


def _pool_arguments(pool: torch.nn.MaxPool2d | _LRNAndPool) -> tuple[Any, Any, Any, Any, Any]:
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode


def _lrn_arguments(norm: torch.nn.LocalResponseNorm | _LRNAndPool) -> tuple[int, float, float, float]:
    return norm.size, norm.alpha, norm.beta, norm.k


def _lrn_options(norm: torch.nn.LocalResponseNorm | _LRNAndPool) -> dict[str, Any]:
    """What ours has and torch's has not."""
    if type(norm) is torch.nn.LocalResponseNorm:
        return {}
    return {"groups": norm.groups, "alpha_mode": norm.alpha_mode}


def _why_not_conv(conv: torch.nn.Conv2d) -> str | None:
    return None if conv.padding_mode == "zeros" else f"padding_mode={conv.padding_mode}"


def _why_not_pool(pool: torch.nn.MaxPool2d) -> str | None:
    return "return_indices=True" if pool.return_indices else None


Children = tuple[Any, ...]


def _weights(layer: Any) -> tuple[Tensor, Tensor | None]:
    """``weight, bias``, past ``Module.__getattr__``, which takes most of a microsecond for each."""
    parameters = layer._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return layer.weight, layer.bias


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
    options |= {**_lrn_options(norm), **conv._pixels_of(input)}
    weight, bias = conv._weights_for(input)
    geometry = (conv.stride, conv.padding, conv.ceil_mode)
    return F.alexnet_stem(input, weight, bias, geometry, _lrn_arguments(norm), _pool_arguments(pool), **options)


def conv2d_relu(input: Tensor, children: Children) -> Tensor:
    conv, _ = children
    return F.conv2d_relu(input, *_weights(conv), conv.stride, conv.padding, conv.dilation, conv.groups)


def conv2d_relu_chain(input: Tensor, children: Children) -> Tensor:
    layers = [(*_weights(c), (c.stride, c.padding, c.dilation, c.groups)) for c in children[::2]]
    return F.conv2d_relu_chain(input, layers)


def linear_relu(input: Tensor, children: Children) -> Tensor:
    linear, _ = children
    return F.linear_relu(input, *_weights(linear))


def linear_relu_dropout(input: Tensor, children: Children) -> Tensor:
    linear, _, dropout = children
    return F.linear_relu_dropout(input, *_weights(linear), dropout.p, dropout.training)


def lrn_max_pool2d(input: Tensor, children: Children) -> Tensor:
    norm, pool = children
    return F.lrn_max_pool2d(input, *_lrn_arguments(norm), *_pool_arguments(pool), **_lrn_options(norm))


def max_pool2d_lrn(input: Tensor, children: Children) -> Tensor:
    pool, norm = children
    return F.max_pool2d_lrn(input, *_lrn_arguments(norm), *_pool_arguments(pool), **_lrn_options(norm))


def _conv_lrn_pool_arguments(conv: torch.nn.Conv2d, norm: Any, pool: Any) -> tuple[Any, ...]:
    convolution = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return *_weights(conv), convolution, _lrn_arguments(norm), _pool_arguments(pool)


def conv2d_relu_lrn_max_pool2d(input: Tensor, children: Children) -> Tensor:
    conv, _, norm, pool = children
    arguments = _conv_lrn_pool_arguments(conv, norm, pool)
    return F.conv2d_relu_lrn_max_pool2d(input, *arguments, **_lrn_options(norm))


def conv2d_relu_max_pool2d_lrn(input: Tensor, children: Children) -> Tensor:
    conv, _, pool, norm = children
    arguments = _conv_lrn_pool_arguments(conv, norm, pool)
    return F.conv2d_relu_max_pool2d_lrn(input, *arguments, **_lrn_options(norm))


_CONV, _LINEAR, _RELU = (torch.nn.Conv2d,), (torch.nn.Linear,), (torch.nn.ReLU,)
_IMAGE = (PixelConv2d, CeilConv2d)
_LRN, _POOL = (torch.nn.LocalResponseNorm, LocalResponseNorm), (torch.nn.MaxPool2d, MaxPool2d)

_KNOWN = Known(  # a new run is a row; the function's name is what a report prints
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
        torch.nn.Conv2d: _why_not_conv,
        PixelConv2d: _why_not_image,
        CeilConv2d: _why_not_image,
        torch.nn.MaxPool2d: _why_not_pool,
        MaxPool2d: _why_not_pool,
    },
    whole=(ConvReLU2d, LinearReLU, AlexNetStem),
)


class FusedSequential(RunsAsOne):
    """``torch.nn.Sequential`` that runs known runs of its children as one operation: convolution or ``Linear`` and ReLU,
    ``Dropout`` after the latter, LRN and max pooling in either order.

    Every other child is called itself. Indexing, slicing, iterating, ``state_dict``, values and gradients are those of
    ``Sequential``. At each call, a run is fused only while nobody can see inside it: its members have exactly torch's
    types or ours, no hook of any kind, no ``forward`` of their own, ordinary weights, ``padding_mode="zeros"`` and no
    ``return_indices``; no global module hook is registered, neither ``torch.fx`` nor ``torch.jit`` is tracing, and the
    input is no tensor subclass. ``conversion_report`` says what a call would do now.

    Raises:
        RuntimeError: ``torch.jit.script`` is called on it, or on a model that holds it; ``revert`` first.

    >>> net = FusedSequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten())
    >>> net[:1]
    FusedSequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    )
    >>> from alexnet_kernels.convert import conversion_report
    >>> conversion_report(net).fused
    (FusedRun(names=('0', '1'), operation='conv2d_relu'),)
    """

    __prepare_scriptable__ = _refuse_script
    _known = _KNOWN


def fused_step(children: Sequence[torch.nn.Module], at: int, input: Any) -> tuple[Any, int]:
    """One step of ``FusedSequential(*children)``, for who runs several of them in turns.

    The run of ``children`` that begins at ``at``, as one operation, or that child by itself; the result, and where the next
    step begins.

    >>> layers = (torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Identity())
    >>> y, at = fused_step(layers, 0, torch.ones(1, 4))
    >>> tuple(y.shape), at
    ((1, 2), 2)
    """
    if why_nowhere() is not None:
        return children[at](input), at + 1
    return _KNOWN.advance((*children, None), at, input)
