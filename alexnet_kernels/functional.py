"""The operations with ``torch.nn.functional``'s signatures; every error about an argument is raised here.

Inputs may be contiguous, channels_last, sliced or expanded; results keep the input's dtype and its layout (contiguous
where the input's is neither of the two). Function transforms (``torch.func``, forward-mode differentiation) run
``reference``, which is plain torch and composes with all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal

from torch import SymInt, Tensor, empty_like
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from . import reference
from .ops import composite as _composite
from .ops import lrn as _lrn
from .ops._library import Explanation

AlphaMode = Literal["mean", "sum"]
Pair = int | tuple[int, int]
Number = float | Tensor


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _require_integer(name: str, value: object) -> None:
    if type(value) is not int and not isinstance(value, (Integral, SymInt)):
        raise TypeError(f"{name}={value!r} must be an integer, got {type(value).__name__}; convert with int({name})")


def _lrn_scale(x: Tensor, size: int, alpha: Number, groups: int, alpha_mode: str) -> Number:
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
    _require_integer("size", size)
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 (the number of neighbouring channels; the paper's is 5)")
    if groups != 1 and (groups < 1 or x.shape[1] % groups):
        raise ValueError(f"groups={groups} does not divide the {x.shape[1]} channels of input {tuple(x.shape)}")
    if alpha_mode == "mean":
        return alpha / size
    if alpha_mode == "sum":
        return alpha
    raise ValueError(
        f"alpha_mode={alpha_mode!r} is unknown: 'mean' divides alpha by size (torch, Caffe), 'sum' does not (paper)"
    )


_WHY_LEARNED = "alpha, beta or k is a tensor; kernels take numbers, only plain torch differentiates by them"
_WHY_EMPTY = "an empty input is returned as it is"


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
    scale = _lrn_scale(input, size, alpha, groups, alpha_mode)
    if input.numel() == 0:
        return input
    if isinstance(scale, Tensor) or isinstance(beta, Tensor) or isinstance(k, Tensor):
        return _composite.plain("lrn", _WHY_LEARNED, reference.lrn, input, size, scale, beta, k, groups)
    return _lrn.apply(input, size, scale, beta, k, groups)


def _require_maps(x: Tensor, size: int) -> None:
    _require_tensor("input", x)
    if not x.is_floating_point():
        raise TypeError(
            f"input is {x.dtype}: spatial normalisation needs a floating-point tensor; convert with .float()"
        )
    if x.dim() not in (3, 4):
        raise ValueError(f"input has {x.dim()} dimensions, shape {tuple(x.shape)}: [N, C, H, W] or [C, H, W] is needed")
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size} must be odd and at least 1, so that the window has a centre")


def spatial_response_norm(input: Tensor, size: int, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """``y = x / (k + alpha/size² · Σ x²)^beta`` over size x size neighbours in the same map, zeros outside.

    ``input`` is ``[N, C, H, W]`` or ``[C, H, W]``. The ``rnorm`` layer of the 2012 source, ``WITHIN_CHANNEL`` in Caffe.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: ``size`` is even or below 1, or ``input`` has another number of dimensions.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(spatial_response_norm, (input,), input, size, alpha, beta, k)
    _require_maps(input, size)
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
    if has_torch_function_variadic(input, weight, bias):
        arguments = (input, weight, bias, stride, padding, dilation, groups)
        return handle_torch_function(conv2d_relu, (input, weight, bias), *arguments)
    _require_tensor("input", input)
    _require_tensor("weight", weight)
    return _composite.conv2d_relu(input, weight, bias, stride, padding, dilation, groups)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))``: arguments, shapes and errors of ``torch.nn.functional.linear``."""
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias)
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
    normalised = local_response_norm(input, size, alpha, beta, k, groups=groups, alpha_mode=alpha_mode)
    return _composite.max_pool2d(normalised, kernel_size, stride, padding, dilation, ceil_mode)


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
    _require_tensor("input", input)
    pooled = _composite.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    return local_response_norm(pooled, size, alpha, beta, k, groups=groups, alpha_mode=alpha_mode)


def explain(op: str | Callable[..., object], *args: Any, **kwargs: Any) -> Explanation:
    """What a call would run, and why nothing else would, without running it.

    Args:
        op: a function of this module, or its name.
        *args, **kwargs: as for that function; errors are raised as it would raise them (shapes are tried on the meta device).

    Returns:
        An ``Explanation``: ``.backend``, ``.why_not`` (a reason for each other backend), ``.to_json()``; it prints well.
        LRN with pooling runs as two operations in this version: ``.parts`` explains both, in their order.

    Raises:
        ValueError: ``op`` is no function of this module.
        RuntimeError: a backend was asked for by name and cannot run this call.

    >>> explain("max_pool2d", torch.zeros(1, 1, 4, 4), 2).backend
    'reference'
    >>> explain(lrn_max_pool2d, torch.zeros(1, 8, 4, 4, dtype=torch.double), 5).parts[0].why_not["triton"]
    'no kernel for torch.float64'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    function, explainer = _EXPLAINED.get(name, (None, None))
    if explainer is None or function is None or not (isinstance(op, str) or op is function):
        raise ValueError(f"op={name!r} is not a function of alexnet_kernels.functional; use {', '.join(_EXPLAINED)}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return explainer(*bound.args, **bound.kwargs)


def _meta(*values: Any) -> tuple[Any, ...]:
    """The same shapes and dtypes without data: torch's own errors come from them, and nothing is computed."""
    return tuple(empty_like(value, device="meta") if isinstance(value, Tensor) else value for value in values)


def _explain_lrn(
    x: Tensor, size: int, alpha: Number, beta: Number, k: Number, *, groups: int, alpha_mode: str
) -> Explanation:
    scale = _lrn_scale(x, size, alpha, groups, alpha_mode)
    if x.numel() == 0:
        return Explanation.of_one("lrn", "reference", _WHY_EMPTY)
    if isinstance(scale, Tensor) or isinstance(beta, Tensor) or isinstance(k, Tensor):
        return _composite.explain("lrn", _WHY_LEARNED)
    return _lrn.explain(x, size, scale, beta, k, groups)


def _explain_spatial(x: Tensor, size: int, *_: float) -> Explanation:
    _require_maps(x, size)
    return _composite.explain("spatial_response_norm")


def _explain_conv(x: Tensor, weight: Tensor, *args: Any) -> Explanation:
    _require_tensor("input", x)
    _require_tensor("weight", weight)
    reference.conv2d_relu(*_meta(x, weight, *args))
    return _composite.explain("conv2d_relu")


def _explain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Explanation:
    _require_tensor("input", x)
    _require_tensor("weight", weight)
    reference.linear_relu(*_meta(x, weight, bias))
    return _composite.explain("linear_relu")


def _explain_pool(x: Tensor, *args: Any) -> Explanation:
    _require_tensor("input", x)
    reference.max_pool2d(*_meta(x), *args[:5])
    return _composite.explain("max_pool2d")


def _explain_lrn_pool(
    x: Tensor, size: int, alpha: Number, beta: Number, k: Number, *pool: Any, **options: Any
) -> Explanation:
    norm = _explain_lrn(x, size, alpha, beta, k, **options)
    return Explanation.of_parts("lrn_max_pool2d", norm, _explain_pool(x, *pool))


def _explain_pool_lrn(
    x: Tensor, size: int, alpha: Number, beta: Number, k: Number, *pool: Any, **options: Any
) -> Explanation:
    first = _explain_pool(x, *pool)
    pooled = x.new_empty(reference.max_pool2d(*_meta(x), *pool).shape)
    return Explanation.of_parts("max_pool2d_lrn", first, _explain_lrn(pooled, size, alpha, beta, k, **options))


_EXPLAINED: dict[str, tuple[Callable[..., object], Callable[..., Explanation]]] = {
    "local_response_norm": (local_response_norm, _explain_lrn),
    "spatial_response_norm": (spatial_response_norm, _explain_spatial),
    "conv2d_relu": (conv2d_relu, _explain_conv),
    "linear_relu": (linear_relu, _explain_linear),
    "max_pool2d": (max_pool2d, _explain_pool),
    "lrn_max_pool2d": (lrn_max_pool2d, _explain_lrn_pool),
    "max_pool2d_lrn": (max_pool2d_lrn, _explain_pool_lrn),
}
