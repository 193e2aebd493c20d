"""The operations with ``torch.nn.functional``'s signatures; every error about an argument is raised here.

Inputs may be contiguous, channels_last, sliced or expanded; results keep the input's dtype and its layout (contiguous
where the input's is neither of the two). Function transforms (``torch.func``, forward-mode differentiation) run
``reference``, which is plain torch and composes with all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from . import _explain, reference
from ._arguments import (
    AlphaMode,
    Channels,
    Convolution,
    Norm,
    Number,
    Pair,
    Pooling,
    Precision,
    Sides,
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
from ._explain import WHY_LEARNED
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

__all__ = [
    "AlphaMode",
    "Channels",
    "Convolution",
    "Norm",
    "Number",
    "Pair",
    "Pooling",
    "Precision",
    "Sides",
    "Stem",
    "alexnet_stem",
    "conv1",
    "conv1_relu",
    "conv2d_relu",
    "conv2d_relu_chain",
    "conv2d_relu_lrn_max_pool2d",
    "conv2d_relu_max_pool2d_lrn",
    "explain",
    "linear_relu",
    "linear_relu_dropout",
    "local_response_norm",
    "lrn_max_pool2d",
    "max_pool2d",
    "max_pool2d_lrn",
    "spatial_response_norm",
]


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: Number = 1e-4,
    beta: Number = 0.75,
    k: Number = 1.0,
    *,
    groups: int = 1,
    alpha_mode: AlphaMode = "mean",
) -> Tensor:
    """``y_c = x_c / (k + c·Σ_j x_j²)^beta`` over a window of ``size`` channels around c (Krizhevsky et al. 2012, section 3.3).

    Args:
        input: ``[N, C, ...]``, 3 dimensions or more; the result has its shape, dtype and layout.
        size: channels in the window, ``size // 2`` of them before c; the window ends at the first and last channel.
        alpha, beta, k: as in the formula; sums are formed in fp32 for half types. A tensor, such as a parameter, is
            differentiated, in plain torch.
        groups: parts that C is divided into; a window stays inside its part (2: the two towers of the paper).
        alpha_mode: ``"mean"``, c = alpha / size: torch, Caffe, cuDNN, the 2012 source; ``"sum"``, c = alpha: the paper's
            formula, TensorFlow.

    Raises:
        TypeError: ``input`` is not a real tensor, or ``size`` not an integer.
        ValueError: fewer than 3 dimensions, ``size < 1``, ``groups`` does not divide C, unknown ``alpha_mode``.

    >>> x = torch.ones(1, 3, 1, 1)
    >>> local_response_norm(x, 5, alpha=1.0, beta=1.0, k=1.0, alpha_mode="sum").flatten()
    tensor([0.2500, 0.2500, 0.2500])
    """
    if has_torch_function_unary(input):
        options = {"groups": groups, "alpha_mode": alpha_mode}
        return handle_torch_function(local_response_norm, (input,), input, size, alpha, beta, k, **options)
    scale = lrn_scale(input, size, alpha, groups, alpha_mode)
    if input.numel() == 0:
        return input
    if isinstance(scale, Tensor) or isinstance(beta, Tensor) or isinstance(k, Tensor):
        return _composite.plain("lrn", WHY_LEARNED, reference.lrn, input, size, scale, beta, k, groups)
    return _lrn.apply(input, size, scale, beta, k, groups)


def spatial_response_norm(input: Tensor, size: int, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """``y = x / (k + alpha/size² · Σ x²)^beta`` over size x size neighbours in the same map, zeros outside.

    ``input`` is ``[N, C, H, W]`` or ``[C, H, W]``. The ``rnorm`` layer of the 2012 source, ``WITHIN_CHANNEL`` in Caffe.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: ``size`` is even or below 1, or ``input`` has another number of dimensions.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(spatial_response_norm, (input,), input, size, alpha, beta, k)
    require_maps(input, size)
    return _composite.spatial_response_norm(input, size, alpha, beta, k)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    precision: Precision | None = None,
) -> Tensor:
    """``relu(conv2d(input, weight, bias, ...))``: arguments, shapes and errors of ``torch.nn.functional.conv2d``.

    Args:
        precision: of fp32 on a GPU, the backward's too: ``"tf32"``, factors rounded to 10 bits; ``"tf32x3"``, nearly fp32 by
            three such products; ``"ieee"``, fp32. None: as ``torch.backends.cudnn`` says. Half types and CPUs do not heed it.

    Raises:
        TypeError: ``input`` or ``weight`` is no tensor.
        ValueError: unknown ``precision``.
    """
    if has_torch_function_variadic(input, weight, bias):
        arguments = (input, weight, bias, stride, padding, dilation, groups)
        return handle_torch_function(conv2d_relu, (input, weight, bias), *arguments, precision=precision)
    require_tensor("input", input)
    require_tensor("weight", weight)
    require_precision(precision)
    if precision is None:  # the kernel for images has tf32 alone, where torch's flags allow it
        image = _image.image_of(input, weight, bias, stride, padding, dilation, groups)
        y = None if image is None else _stem.apply_conv1(image, relu=True)
        if y is not None:
            return y
    return _conv.apply("conv2d_relu", input, weight, bias, True, stride, padding, dilation, groups, precision)


def conv2d_relu_chain(input: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Convolution]]) -> Tensor:
    """:func:`conv2d_relu` for each of ``layers``, ``(weight, bias, (stride, padding, dilation, groups))``, in a row.

    Results, gradients and errors are those of single calls. Where a gradient is wanted on a GPU, the layers are one node of
    autograd: the gradient that reaches a layer from the one above is masked, and summed for its bias, where it is computed.
    """
    tensors = (input, *(t for weight, bias, _ in layers for t in (weight, bias)))
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(conv2d_relu_chain, tensors, input, layers)
    require_tensor("input", input)
    for weight, _, conv in layers:
        require_tensor("weight", weight)
        require_convolution(conv)
    return _conv_chain.apply(input, layers)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))``: arguments, shapes and errors of ``torch.nn.functional.linear``."""
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias)
    require_tensor("input", input)
    require_tensor("weight", weight)
    return _linear.apply(input, weight, bias)


def linear_relu_dropout(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, p: float = 0.5, training: bool = True
) -> Tensor:
    """``dropout(relu(linear(input, weight, bias)), p, training)``: arguments, shapes and errors of torch's three functions.

    Where no kernel runs, as on a CPU, the random numbers are torch's own. A kernel's come from a seed that torch's generator
    draws: reproducible by ``torch.manual_seed``, and new at each replay of a CUDA graph. Dropped elements are 0 there even
    where ReLU left NaN or infinity (torch multiplies, and has NaN).

    Raises:
        ValueError: ``p`` is below 0 or above 1.
    """
    tensors = (input, weight, bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(linear_relu_dropout, tensors, *tensors, p, training)
    require_tensor("input", input)
    require_tensor("weight", weight)
    require_probability(p)
    return _linear.apply(input, weight, bias, p if training else 0.0)


def max_pool2d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``torch.nn.functional.max_pool2d``, argument for argument: first of equal values, NaN wins, int64 indices on request."""
    if has_torch_function_unary(input):
        arguments = (input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return handle_torch_function(max_pool2d, (input,), *arguments)
    require_tensor("input", input)
    pool = _composite.max_pool2d_with_indices if return_indices else _pool.apply
    return pool(input, kernel_size, stride, padding, dilation, ceil_mode)


def _lrn_and_pool(
    x: Tensor, norm: Norm, pooling: Pooling, groups: int, alpha_mode: AlphaMode, *, pool_first: bool
) -> Tensor:
    """Both in one where that can be; three dimensions mean [N, C, L] to the norm and [C, H, W] to the pool."""
    require_tensor("input", x)
    if x.dim() == 4 and x.numel() and are_numbers(*norm):
        size, alpha, beta, k = norm
        scale = lrn_scale(x, size, alpha, groups, alpha_mode)
        return _fused.apply(x, (size, scale, beta, k, groups), pooling, pool_first)  # type: ignore[arg-type]
    if pool_first:
        pooled = _pool.apply(x, *pooling)
        return local_response_norm(pooled, *norm, groups=groups, alpha_mode=alpha_mode)
    return _pool.apply(local_response_norm(x, *norm, groups=groups, alpha_mode=alpha_mode), *pooling)


def lrn_max_pool2d(
    input: Tensor,
    size: int,
    alpha: Number = 1e-4,
    beta: Number = 0.75,
    k: Number = 1.0,
    kernel_size: Pair = 3,
    stride: Pair | None = 2,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    *,
    groups: int = 1,
    alpha_mode: AlphaMode = "mean",
) -> Tensor:
    """``max_pool2d(local_response_norm(input, ...), ...)``, the paper's order; arguments as in those two."""
    if has_torch_function_unary(input):
        arguments = (input, size, alpha, beta, k, kernel_size, stride, padding, dilation, ceil_mode)
        options = {"groups": groups, "alpha_mode": alpha_mode}
        return handle_torch_function(lrn_max_pool2d, (input,), *arguments, **options)
    pooling = (kernel_size, stride, padding, dilation, ceil_mode)
    return _lrn_and_pool(input, (size, alpha, beta, k), pooling, groups, alpha_mode, pool_first=False)


def max_pool2d_lrn(
    input: Tensor,
    size: int,
    alpha: Number = 1e-4,
    beta: Number = 0.75,
    k: Number = 1.0,
    kernel_size: Pair = 3,
    stride: Pair | None = 2,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    *,
    groups: int = 1,
    alpha_mode: AlphaMode = "mean",
) -> Tensor:
    """``local_response_norm(max_pool2d(input, ...), ...)``, CaffeNet's order; arguments as in those two."""
    if has_torch_function_unary(input):
        arguments = (input, size, alpha, beta, k, kernel_size, stride, padding, dilation, ceil_mode)
        options = {"groups": groups, "alpha_mode": alpha_mode}
        return handle_torch_function(max_pool2d_lrn, (input,), *arguments, **options)
    pooling = (kernel_size, stride, padding, dilation, ceil_mode)
    return _lrn_and_pool(input, (size, alpha, beta, k), pooling, groups, alpha_mode, pool_first=True)


def _conv_and_rest(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Convolution,
    norm: Norm,
    pooling: Pooling,
    groups: int,
    alpha_mode: AlphaMode,
    *,
    pool_first: bool,
) -> Tensor:
    require_tensor("input", x)
    require_tensor("weight", weight)
    require_convolution(conv)
    require_block(norm, pooling)
    image = _image.image_of(x, weight, bias, *conv)
    if image is not None:
        y = _stem_in_one(image, norm, pooling, groups, alpha_mode, pool_first=pool_first)
        if y is not None:
            return y
    return _by_parts(x, weight, bias, conv, norm, pooling, groups, alpha_mode, pool_first=pool_first)


def _by_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Convolution,
    norm: Norm,
    pooling: Pooling,
    groups: int,
    alpha_mode: AlphaMode,
    *,
    pool_first: bool,
    relu: bool = True,
) -> Tensor:
    """The convolution by itself, and the rest in one where that can be."""
    a, left = _fused.convolve(x, weight, bias, *conv)
    if a.dim() != 4 or not a.numel() or not are_numbers(*norm):
        return _lrn_and_pool(_fused.activate(a, left, relu), norm, pooling, groups, alpha_mode, pool_first=pool_first)
    size, alpha, beta, k = norm
    scale = lrn_scale(a, size, alpha, groups, alpha_mode)
    return _fused.apply(a, (size, scale, beta, k, groups), pooling, pool_first, relu, left)  # type: ignore[arg-type]


def conv2d_relu_lrn_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Convolution,
    norm: Norm,
    pooling: Pooling,
    *,
    groups: int = 1,
    alpha_mode: AlphaMode = "mean",
) -> Tensor:
    """:func:`lrn_max_pool2d` of :func:`conv2d_relu`, in one after the convolution.

    ``conv`` is its ``(stride, padding, dilation, groups)``, ``norm`` is ``(size, alpha, beta, k)``, ``pooling`` is
    ``(kernel_size, stride, padding, dilation, ceil_mode)``; ``groups`` and ``alpha_mode`` are the norm's.
    """
    tensors, arguments = (input, weight, bias), (conv, norm, pooling)
    if has_torch_function_variadic(*tensors):
        options = {"groups": groups, "alpha_mode": alpha_mode}
        return handle_torch_function(conv2d_relu_lrn_max_pool2d, tensors, *tensors, *arguments, **options)
    return _conv_and_rest(*tensors, *arguments, groups, alpha_mode, pool_first=False)


def conv2d_relu_max_pool2d_lrn(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Convolution,
    norm: Norm,
    pooling: Pooling,
    *,
    groups: int = 1,
    alpha_mode: AlphaMode = "mean",
) -> Tensor:
    """:func:`max_pool2d_lrn` of :func:`conv2d_relu`; arguments of :func:`conv2d_relu_lrn_max_pool2d`."""
    tensors, arguments = (input, weight, bias), (conv, norm, pooling)
    if has_torch_function_variadic(*tensors):
        options = {"groups": groups, "alpha_mode": alpha_mode}
        return handle_torch_function(conv2d_relu_max_pool2d_lrn, tensors, *tensors, *arguments, **options)
    return _conv_and_rest(*tensors, *arguments, groups, alpha_mode, pool_first=True)


def _stem_in_one(
    image: _image.Image,
    norm: Norm,
    pooling: Pooling,
    groups: int,
    alpha_mode: AlphaMode,
    *,
    pool_first: bool,
    relu: bool = True,
) -> Tensor | None:
    block = block_of(image.weight, norm, pooling, groups, alpha_mode, pool_first=pool_first)
    return None if block is None else _stem.apply_stem(image, *block, relu)


def _convolve_image(image: _image.Image, stride: Pair, ceil_mode: bool, relu: bool) -> Tensor:
    if ceil_mode:
        image = overhanging(image, stride)
    image = _image.taken(image)
    if _image.why_plain(image, stride) is None:
        y = _stem.apply_conv1(image, relu)
        if y is not None:
            return y
    x, padding = _image.prepared(image)
    if relu:
        return _conv.apply("conv1_relu", x, image.weight, image.bias, True, stride, padding, 1, 1)
    return _conv.apply("conv1", x, image.weight, image.bias, False, stride, padding, 1, 1)


def conv1(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 4,
    padding: Pair | Sides = 0,
    *,
    mean: Channels | None = None,
    scale: Channels | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """``conv2d((input - mean) * scale, weight, bias, stride, padding)``: the first convolution, whose input is images.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, floating point or uint8 pixels, in either memory format: what a decoder
            hands over as ``[H, W, C]`` is ``channels_last``.
        weight, bias: of the convolution. Its dtype is the result's (the autocast's, under that); a floating-point input of
            another dtype is converted.
        stride: windows' distance; the CUDA kernel is for 4, with an 11x11 weight of 3 channels. Any other runs as torch's.
        padding: a number, (rows, columns) or (top, bottom, left, right): zeros, around the normalised image.
        mean, scale: C numbers each, a sequence or a tensor (which saves copying them at each call); a pixel becomes
            ``(pixel - mean) * scale``, in fp32. Both or neither; uint8 needs them.
        ceil_mode: the last windows may hang over the right and bottom edge, onto zeros.

    Raises:
        TypeError: ``input`` or ``weight`` is no tensor; ``input`` is an integer other than uint8.
        ValueError: ``mean`` or ``scale`` is missing, or has not C numbers; bad ``padding``; tensors on two devices.

    >>> pixels = torch.full((1, 3, 11, 11), 130, dtype=torch.uint8)
    >>> conv1(pixels, torch.ones(1, 3, 11, 11), mean=(128, 128, 128), scale=(0.5, 0.5, 0.5)).item() == 11 * 11 * 3
    True
    """
    tensors, options = (input, weight, bias), {"mean": mean, "scale": scale, "ceil_mode": ceil_mode}
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(conv1, tensors, *tensors, stride, padding, **options)
    return _convolve_image(require_image(*tensors, padding, mean, scale), stride, ceil_mode, relu=False)


def conv1_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 4,
    padding: Pair | Sides = 0,
    *,
    mean: Channels | None = None,
    scale: Channels | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """:func:`conv1` and the ReLU after it; the same arguments and errors.

    >>> conv1_relu(torch.ones(1, 3, 227, 227), torch.randn(96, 3, 11, 11)).shape
    torch.Size([1, 96, 55, 55])
    """
    tensors, options = (input, weight, bias), {"mean": mean, "scale": scale, "ceil_mode": ceil_mode}
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(conv1_relu, tensors, *tensors, stride, padding, **options)
    return _convolve_image(require_image(*tensors, padding, mean, scale), stride, ceil_mode, relu=True)


def alexnet_stem(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    conv: Stem = (4, 0, False),
    norm: Norm = (5, 1e-4, 0.75, 2.0),
    pooling: Pooling = (3, 2, 0, 1, False),
    *,
    relu: bool = True,
    pool_first: bool = False,
    groups: int = 1,
    alpha_mode: AlphaMode = "mean",
    mean: Channels | None = None,
    scale: Channels | None = None,
) -> Tensor:
    """AlexNet's first block in one: :func:`lrn_max_pool2d` of :func:`conv1_relu`, or :func:`max_pool2d_lrn` of it.

    Args:
        input, weight, bias, mean, scale: as for :func:`conv1`; four dimensions.
        conv: ``(stride, padding, ceil_mode)`` of the convolution.
        norm: ``(size, alpha, beta, k)``; ``groups`` and ``alpha_mode`` are the norm's too.
        pooling: ``(kernel_size, stride, padding, dilation, ceil_mode)``.
        relu: False: of :func:`conv1`, as in the 2012 source, which has its ReLU behind the pooling.
        pool_first: CaffeNet's order; otherwise the paper's.

    Raises:
        TypeError, ValueError: as :func:`conv1` and :func:`local_response_norm`; ``input`` has not four dimensions.

    >>> pixels = torch.randint(256, (1, 227, 227, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    >>> alexnet_stem(pixels, torch.randn(96, 3, 11, 11), mean=(123, 117, 104), scale=(1, 1, 1)).shape
    torch.Size([1, 96, 27, 27])
    """
    tensors, arguments = (input, weight, bias), (conv, norm, pooling)
    if has_torch_function_variadic(*tensors):
        block: dict[str, Any] = {"relu": relu, "pool_first": pool_first, "groups": groups, "alpha_mode": alpha_mode}
        return handle_torch_function(alexnet_stem, tensors, *tensors, *arguments, **block, mean=mean, scale=scale)
    require_block(norm, pooling)
    stride, image = stem_image(*tensors, conv, mean, scale)
    image = _image.taken(image)
    if _image.why_plain(image, stride) is None:
        y = _stem_in_one(image, norm, pooling, groups, alpha_mode, pool_first=pool_first, relu=relu)
        if y is not None:
            return y
    x, padding = _image.prepared(image)
    convolution = (stride, padding, 1, 1)
    return _by_parts(x, weight, bias, convolution, norm, pooling, groups, alpha_mode, pool_first=pool_first, relu=relu)


def explain(op: str | Callable[..., object], *args: Any, **kwargs: Any) -> Explanation:
    """What a call would run, and why nothing else would, without running it.

    Args:
        op: a function of this module, or its name.
        *args, **kwargs: as for that function; errors are raised as it would raise them (shapes are tried on the meta device).

    Returns:
        An ``Explanation``: ``.backend``, ``.why_not`` (a reason for each other backend), ``.to_json()``; it prints well.
        What runs as several operations has ``.parts`` that explain each, in their order.

    Raises:
        ValueError: ``op`` is no function of this module.
        RuntimeError: a backend was asked for by name and cannot run this call.

    >>> explain("max_pool2d", torch.zeros(1, 1, 4, 4), 2, return_indices=True).backend
    'reference'
    >>> explain(local_response_norm, torch.zeros(1, 8, 4, 4, dtype=torch.double), 5).why_not["triton"]
    'no kernel for torch.float64'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    function, explainer = _EXPLAINED.get(name, (None, None))
    if explainer is None or function is None or not (isinstance(op, str) or op is function):
        raise ValueError(f"op={name!r} is not a function of alexnet_kernels.functional; use {', '.join(_EXPLAINED)}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return explainer(*bound.args, **bound.kwargs)


_EXPLAINED: dict[str, tuple[Callable[..., object], Callable[..., Explanation]]] = {
    "local_response_norm": (local_response_norm, _explain.explain_lrn),
    "spatial_response_norm": (spatial_response_norm, _explain.explain_spatial),
    "conv1": (conv1, _explain.explain_conv1),
    "conv1_relu": (conv1_relu, _explain.explain_conv1_relu),
    "alexnet_stem": (alexnet_stem, _explain.explain_stem),
    "conv2d_relu": (conv2d_relu, _explain.explain_conv_relu),
    "conv2d_relu_chain": (conv2d_relu_chain, _explain.explain_conv_chain),
    "linear_relu": (linear_relu, _explain.explain_linear),
    "linear_relu_dropout": (linear_relu_dropout, _explain.explain_linear_dropout),
    "max_pool2d": (max_pool2d, _explain.explain_pool),
    "lrn_max_pool2d": (lrn_max_pool2d, _explain.explain_lrn_pool),
    "max_pool2d_lrn": (max_pool2d_lrn, _explain.explain_pool_lrn),
    "conv2d_relu_lrn_max_pool2d": (conv2d_relu_lrn_max_pool2d, _explain.explain_conv_lrn_pool),
    "conv2d_relu_max_pool2d_lrn": (conv2d_relu_max_pool2d_lrn, _explain.explain_conv_pool_lrn),
}
