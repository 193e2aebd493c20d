"""What each operation means, in plain torch: the specification, the test oracle and the portable implementation at once.

Everything here runs on any device and dtype and is differentiable to any order; nothing here checks arguments (that is
``functional``'s work) or knows about kernels. Response normalisation takes ``scale``, the factor of the plain sum of
squares: ``alpha`` in the paper's formula, ``alpha / size`` in torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | tuple[int, int]

_BLOCK = 1 << 18  # elements a block of `_blocked`: its fp32 temporaries (1 MiB each) stay in a core's cache


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: fp32 for the half types, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _by_group(x: Tensor, groups: int) -> tuple[Tensor, int]:
    """``x`` in the dtype that sums are formed in, and the dim that a window runs over: 1, or 2 behind the groups."""
    z = x.to(arithmetic_dtype(x.dtype))
    return (z, 1) if groups == 1 else (z.unflatten(1, (groups, -1)), 2)


def _window_sum(values: Tensor, dim: int, before: int, after: int) -> Tensor:
    """``Σ values[j]`` over ``c - before <= j <= c + after`` for each place c along ``dim``, inside it."""
    total = values.clone()
    channels = values.shape[dim]
    for d in range(1, min(before, channels - 1) + 1):
        total.narrow(dim, d, channels - d).add_(values.narrow(dim, 0, channels - d))
    for d in range(1, min(after, channels - 1) + 1):
        total.narrow(dim, 0, channels - d).add_(values.narrow(dim, d, channels - d))
    return total


def _denominator(x: Tensor, dim: int, size: int, scale: float, k: float) -> Tensor:
    """``s = k + scale · Σ x²`` over a window of ``size`` channels, ``size // 2`` of them before: torch's rule for even sizes."""
    return _window_sum(x * x, dim, size // 2, (size - 1) // 2).mul_(scale).add_(k)


def _power(s: Tensor, beta: float | Tensor) -> Tensor:
    """``s^beta``; the usual 3/4 by square roots, several times faster than ``pow``."""
    if (
        not isinstance(beta, Tensor) and beta == 0.75
    ):  # a tensor, which may be a parameter, gets its gradient from `pow`
        root = s.sqrt()
        return root * root.sqrt()
    return s.pow(beta)


def lrn(x: Tensor, size: int, scale: float, beta: float, k: float, groups: int = 1) -> Tensor:
    """``y_c = x_c / (k + scale · Σ_j x_j²)^beta``, j over the window of ``size`` channels around c inside c's group.

    ``x`` is ``[N, C, ...]`` with C divisible by ``groups``; the result has its shape and dtype. Paper, section 3.3.
    """
    if not x.is_floating_point():  # torch truncates its means of integers; nothing of ours applies
        parts = [F.local_response_norm(part, size, scale * size, beta, k) for part in x.chunk(groups, 1)]
        return parts[0] if groups == 1 else torch.cat(parts, 1)
    z, dim = _by_group(x, groups)
    y = (z / _power(_denominator(z, dim, size, scale, k), beta)).to(x.dtype)
    return y if dim == 1 else y.flatten(1, 2)


def lrn_backward(grad: Tensor, x: Tensor, size: int, scale: float, beta: float, k: float, groups: int = 1) -> Tensor:
    """Gradient of :func:`lrn`: ``dx_i = g_i s_i^-beta - 2·beta·scale·x_i Σ_j g_j x_j s_j^-(beta+1)``, j over those channels
    whose window holds i."""
    (z, dim), (g, _) = _by_group(x, groups), _by_group(grad, groups)
    s = _denominator(z, dim, size, scale, k)
    direct = g / _power(s, beta)
    shared = _window_sum(direct * z / s, dim, (size - 1) // 2, size // 2)
    dx = (direct - (2 * beta * scale) * z * shared).to(x.dtype)
    return dx if dim == 1 else dx.flatten(1, 2)


def by_blocks(op: Callable[..., Tensor], tensors: tuple[Tensor, ...], *args: float) -> Tensor:
    """``op(*tensors, *args)`` a few images at a time, so that temporaries stay in a CPU's cache.

    For operations whose images are independent, without gradients: each of ``tensors`` is ``[N, ...]``, the result is like
    the last of them. LRN gains about 1.6x by this on a 32 MiB cache.
    """
    like = tensors[-1]
    if like.device.type != "cpu" or like.numel() <= _BLOCK or like.shape[0] < 2:
        return op(*tensors, *args)
    images = max(1, _BLOCK * like.shape[0] // like.numel())
    out = torch.empty_like(like)
    for target, *block in zip(out.split(images), *(t.split(images) for t in tensors), strict=True):
        target.copy_(op(*block, *args))
    return out


def spatial_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """``y = x / (k + alpha/size² · Σ x²)^beta``, the sum over a size x size neighbourhood inside each map (zeros outside).

    ``rnorm`` of the 2012 source (``layer.py:1183``), WITHIN_CHANNEL in Caffe. ``x`` is ``[N, C, H, W]``, ``size`` odd.
    """
    z = x.to(arithmetic_dtype(x.dtype))
    mean = F.avg_pool2d(z * z, size, stride=1, padding=size // 2)
    return (z / _power(mean.mul(alpha).add(k), beta)).to(x.dtype)


def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """``max(0, conv2d(x, weight) + bias)``; in place, for nobody else holds the sum."""
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups), inplace=True)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``max(0, x weightᵀ + bias)``; in place, for nobody else holds the sum."""
    return F.relu(F.linear(x, weight, bias), inplace=True)


def max_pool2d(
    x: Tensor, kernel_size: Pair, stride: Pair | None, padding: Pair = 0, dilation: Pair = 1, ceil_mode: bool = False
) -> Tensor:
    """Largest value of each window; the first of equal ones takes the gradient, NaN wins over every number."""
    return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d_with_indices(
    x: Tensor, kernel_size: Pair, stride: Pair | None, padding: Pair = 0, dilation: Pair = 1, ceil_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`max_pool2d` and the flat position ``h·W + w`` of each maximum in its map, int64."""
    return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
