"""What a convolution is called with, as a kernel takes it: numbers for every way to write a geometry, one dtype under autocast;
and what is torch's to answer or to refuse."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import why_transformed

Size = int | Sequence[int]


def as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast makes of a convolution's arguments: all in its dtype, except fp64 and integers."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def to(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return to(x), to(weight), None if bias is None else to(bias)


def _pair(value: Any) -> tuple[int, int] | None:
    if type(value) is int:
        return value, value
    if isinstance(value, (tuple, list)) and 1 <= len(value) <= 2 and all(type(v) is int for v in value):
        return value[0], value[-1]
    return None


def _geometry(
    shape: tuple[int, ...], weight: tuple[int, ...], stride: Size, padding: Size | str, dilation: Size, groups: int
) -> tuple[Any, ...] | None:
    """Stride, padding, dilation and groups as numbers; None where torch has more to do (an odd "same") or to refuse."""
    steps, reach = _pair(stride), _pair(dilation)
    if len(shape) != 4 or len(weight) != 4 or type(groups) is not int or groups < 1 or steps is None or reach is None:
        return None
    kernel = weight[2:]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(reach, kernel, strict=True)]
        edge = (total[0] // 2, total[1] // 2) if steps == (1, 1) and not (total[0] % 2 or total[1] % 2) else None
    else:
        edge = (0, 0) if padding == "valid" else _pair(padding)
    if edge is None or min(steps) < 1 or min(reach) < 1 or min(edge) < 0 or min(weight) < 1 or min(shape) < 1:
        return None
    if shape[1] != weight[1] * groups or weight[0] % groups:
        return None
    for size, k, p, d in zip(shape[2:], kernel, edge, reach, strict=True):
        if size + 2 * p < d * (k - 1) + 1:
            return None
    return steps, edge, reach, groups


_geometry_cached = functools.lru_cache(4096)(_geometry)  # a call on a small tensor takes microseconds, this 4 of them


def _numbers(shape: Any, weight: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> tuple[Any, ...] | None:
    quick = not torch.compiler.is_compiling() and not any(isinstance(v, list) for v in (stride, padding, dilation))
    return (_geometry_cached if quick else _geometry)(shape, weight, stride, padding, dilation, groups)


def out_sides(sides: Sequence[Any], kernel: Sequence[Any], *geometry: Sequence[int]) -> tuple[Any, ...]:
    """Height and width of the result; ``geometry`` is stride, padding and dilation."""
    return tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in zip(sides, kernel, *geometry, strict=True)
    )


def _why_plain(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> str | None:
    """What no kernel is ever asked: torch answers that, or says what is wrong with it."""
    if not x.is_floating_point():
        return f"torch's own convolution runs for {x.dtype}"
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if any(t.dtype != x.dtype or t.device != x.device for t in tensors):
        return "torch's own convolution runs for, or refuses, tensors of several dtypes or devices"
    if torch._C._get_tracing_state() is not None:  # whose check traces again
        return "torch.jit.trace records torch's own convolution"
    if geometry is None or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
        return (
            f"torch's own convolution runs for, or refuses, {tuple(x.shape)} by {tuple(weight.shape)} in this geometry"
        )
    return why_transformed()


def prepared(x: Tensor, weight: Tensor, bias: Tensor | None, *conv: Any) -> tuple[str | None, Any, Any]:
    """Why plain torch runs, or None; the tensors as a kernel takes them; stride, padding, dilation and groups as numbers."""
    batch, weight, bias = as_autocast(x[None] if x.dim() == 3 else x, weight, bias)
    numbers = _numbers(batch.shape, weight.shape, *conv)
    return _why_plain(batch, weight, bias, numbers), (batch, weight, bias), numbers


def prepared_chain(x: Tensor, layers: Sequence[Any]) -> tuple[list[Tensor | None], list[Any]] | None:
    """The same of convolutions in a row: ``x``, then weight and bias of each; their geometries, with a precision of None. None
    where plain torch runs one of them."""
    tensors: list[Tensor | None] = []
    plan: list[Any] = []
    shape = tuple(x.shape)
    for weight, bias, conv in layers:
        cast, numbers = as_autocast(x, weight, bias), _numbers(shape, weight.shape, *conv)
        # of the maps in between only dtype and device matter, which are those of `x`
        if numbers is None or _why_plain(*cast, geometry=numbers) is not None:
            return None
        tensors += cast[bool(tensors) :]
        plan.append((*numbers, None))
        shape = (shape[0], weight.shape[0], *out_sides(shape[2:], weight.shape[2:], *numbers[:3]))
    return tensors, plan
