"""The operations with ``torch.nn.functional``'s signatures; every error about an argument is raised here.

Inputs may be contiguous, channels_last, sliced or expanded; results keep the input's dtype and its layout (contiguous
where the input's is neither of the two). Function transforms (``torch.func``, forward-mode differentiation) run
``reference``, which is plain torch and composes with all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from .ops import composite as _composite
from .ops import lrn as _lrn
from .ops._library import Explanation

AlphaMode = Literal["mean", "sum"]
Pair = int | tuple[int, int]


def _tensors(*values: object) -> tuple[Any, ...]:
    return tuple(value for value in values if value is not None)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _lrn_scale(x: Tensor, size: int, alpha: float, groups: int, alpha_mode: str) -> float:
    """Check the arguments of a response normalisation; the factor of the plain sum of squares."""
    _require_tensor("input", x)
    if x.dim() < 3:
        raise ValueError(
            f"input has {x.dim()} dimensions, shape {tuple(x.shape)}: response normalisation runs over dim 1 of "
            "[N, C, ...] with 3 or more (Expected 3D or higher dimensionality); add the missing ones with unsqueeze"
        )
    if x.is_complex():
        raise TypeError(
            f"input is {x.dtype}: response normalisation is defined on real numbers; pass input.abs() or real and imag"
        )
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 (the number of neighbouring channels; the paper's is 5)")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups={groups} does not divide the {x.shape[1]} channels of input {tuple(x.shape)}")
    if alpha_mode == "mean":
        return alpha / size
    if alpha_mode == "sum":
        return alpha
    raise ValueError(
        f"alpha_mode={alpha_mode!r} is unknown: 'mean' divides alpha by size (torch, Caffe), 'sum' does not (paper)"
    )


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    groups: int = 1,
    alpha_mode: AlphaMode = "mean",
) -> Tensor:
    """``y_c = x_c / (k + c·Σ_j x_j²)^beta`` over a window of ``size`` channels around c (Krizhevsky et al. 2012, section 3.3).

    Args:
        input: ``[N, C, ...]``, 3 dimensions or more; the result has its shape, dtype and layout.
        size: channels in the window, ``size // 2`` of them before c; the window ends at the first and last channel.
        alpha, beta, k: as in the formula; sums are formed in fp32 for half types.
        groups: parts that C is divided into; a window stays inside its part (2: the two towers of the paper).
        alpha_mode: ``"mean"``, c = alpha / size: torch, Caffe, cuDNN, the 2012 source; ``"sum"``, c = alpha: the paper's
            formula, TensorFlow.

    Raises:
        TypeError: ``input`` is not a real tensor.
        ValueError: fewer than 3 dimensions, ``size < 1``, ``groups`` does not divide C, unknown ``alpha_mode``.

    >>> x = torch.ones(1, 3, 1, 1)
    >>> local_response_norm(x, 5, alpha=1.0, beta=1.0, k=1.0, alpha_mode="sum").flatten()
    tensor([0.2500, 0.2500, 0.2500])
    """
    if has_torch_function_unary(input):
        options = {"groups": groups, "alpha_mode": alpha_mode}
        return handle_torch_function(local_response_norm, (input,), input, size, alpha, beta, k, **options)
    scale = _lrn_scale(input, size, alpha, groups, alpha_mode)
    if input.numel() == 0:
        return input
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
    _require_tensor("input", input)
    if not input.is_floating_point():
        raise TypeError(
            f"input is {input.dtype}: spatial normalisation needs a floating-point tensor; convert with .float()"
        )
    if input.dim() not in (3, 4):
        raise ValueError(
            f"input has {input.dim()} dimensions, shape {tuple(input.shape)}: [N, C, H, W] or [C, H, W] is needed"
        )
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size} must be odd and at least 1, so that the window has a centre")
    return _composite.spatial_response_norm(input, size, alpha, beta, k)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(input, weight, bias, ...))``: arguments, shapes and errors of ``torch.nn.functional.conv2d``."""
    if has_torch_function_variadic(*_tensors(input, weight, bias)):
        tensors = _tensors(input, weight, bias)
        return handle_torch_function(conv2d_relu, tensors, input, weight, bias, stride, padding, dilation, groups)
    _require_tensor("input", input)
    _require_tensor("weight", weight)
    return _composite.conv2d_relu(input, weight, bias, stride, padding, dilation, groups)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))``: arguments, shapes and errors of ``torch.nn.functional.linear``."""
    if has_torch_function_variadic(*_tensors(input, weight, bias)):
        return handle_torch_function(linear_relu, _tensors(input, weight, bias), input, weight, bias)
    _require_tensor("input", input)
    _require_tensor("weight", weight)
    return _composite.linear_relu(input, weight, bias)


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
    _require_tensor("input", input)
    pool = _composite.max_pool2d_with_indices if return_indices else _composite.max_pool2d
    return pool(input, kernel_size, stride, padding, dilation, ceil_mode)


def lrn_max_pool2d(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
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
    normalised = local_response_norm(input, size, alpha, beta, k, groups=groups, alpha_mode=alpha_mode)
    return _composite.max_pool2d(normalised, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d_lrn(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
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
    _require_tensor("input", input)
    pooled = _composite.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    return local_response_norm(pooled, size, alpha, beta, k, groups=groups, alpha_mode=alpha_mode)


def explain(op: str | Callable[..., object], *args: Any, **kwargs: Any) -> Explanation:
    """What a call would run, and why nothing else would, without running it.

    Args:
        op: a function of this module, or its name.
        *args, **kwargs: as for that function; errors are raised as it would raise them.

    Returns:
        An ``Explanation``: ``.backend``, ``.why_not`` (a reason for each other backend), ``.to_json()``; it prints well.
        For LRN with pooling it is about the LRN: the pooling is plain torch in this version.

    Raises:
        ValueError: ``op`` is no function of this module.
        RuntimeError: a backend was asked for by name and cannot run this call.

    >>> explain("max_pool2d", torch.zeros(1, 1, 4, 4), 2).backend
    'reference'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    function = _EXPLAINED.get(name)
    if function is None:
        raise ValueError(f"op={name!r} is not a function of alexnet_kernels.functional; use {', '.join(_EXPLAINED)}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    if "alpha_mode" not in call:
        _require_tensor("input", call["input"])
        return _composite.explain(name)
    x, size, groups = call["input"], call["size"], call["groups"]
    scale = _lrn_scale(x, size, call["alpha"], groups, call["alpha_mode"])
    return _lrn.explain(x, size, scale, call["beta"], call["k"], groups)


_EXPLAINED: dict[str, Callable[..., object]] = {
    function.__name__: function
    for function in (
        local_response_norm,
        spatial_response_norm,
        conv2d_relu,
        linear_relu,
        max_pool2d,
        lrn_max_pool2d,
        max_pool2d_lrn,
    )
}
