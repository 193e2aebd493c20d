"""A second implementation of the pooling and fused operations, as short as it can be and independent of ``reference``.

Tap by tap and by a band matrix, in fp64: it stands where a kernel would, so that gradients, wiring and dispatch are tested
on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as TF
from torch import Tensor

from alexnet_kernels import dispatch


def _taps(shape: torch.Size, size: tuple[int, int], window) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Each tap with the rows and columns that it reads for every output, and which of them are inside the map."""
    kh, kw, sh, sw, ph, pw, dh, dw = window
    for tap in range(kh * kw):
        rows = torch.arange(shape[2]) * sh - ph + tap // kw * dh
        columns = torch.arange(shape[3]) * sw - pw + tap % kw * dw
        inside = ((rows >= 0) & (rows < size[0]))[:, None] & ((columns >= 0) & (columns < size[1]))
        yield tap, rows.clamp(0, size[0] - 1)[:, None], columns.clamp(0, size[1] - 1), inside


def max_pool2d(x: Tensor, window, ceil_mode: bool, with_place: bool) -> tuple[Tensor, Tensor]:
    kernel, stride, padding, dilation = (tuple(window[i : i + 2]) for i in (0, 2, 4, 6))
    shape = TF.max_pool2d(torch.empty(x.shape, device="meta"), kernel, stride, padding, dilation, ceil_mode).shape
    y = torch.full(shape, -torch.inf, dtype=x.dtype)
    place = torch.full(shape, 255, dtype=torch.uint8)
    for tap, rows, columns, inside in _taps(shape, x.shape[2:], window):
        value = x[:, :, rows, columns]
        wins = inside & ((value > y) | value.isnan() | (place == 255))
        y, place = value.where(wins, y), torch.tensor(tap, dtype=torch.uint8).where(wins, place)
    layout = _layout(x)
    y = y.contiguous(memory_format=layout)
    return y, place.contiguous(memory_format=layout) if with_place else place.new_empty(0)


def max_pool2d_backward(grad: Tensor, place: Tensor, height: int, width: int, window) -> Tensor:
    dx = torch.zeros(*place.shape[:2], height, width, dtype=torch.double)
    for tap, rows, columns, inside in _taps(place.shape, (height, width), window):
        taken = grad.double() * (inside & (place == tap))
        dx.index_put_(_everywhere(dx, rows, columns), taken, accumulate=True)
    return dx.to(grad.dtype).contiguous(memory_format=_layout(place))


def _everywhere(x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    n, c = (torch.arange(x.shape[axis]) for axis in (0, 1))
    return n[:, None, None, None], c[:, None, None], rows, columns


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _band(channels: int, size: int, groups: int) -> Tensor:
    """[C, C]: which channels j are in the window around c."""
    c, j = torch.arange(channels)[:, None], torch.arange(channels)
    near = (j >= c - size // 2) & (j <= c + (size - 1) // 2)
    return (near & (c // (channels // groups) == j // (channels // groups))).double()


def _lrn(a: Tensor, size, scale, beta, k, groups) -> tuple[Tensor, Tensor, Tensor]:
    band = _band(a.shape[1], size, groups)
    s = k + scale * torch.einsum("cj,njhw->nchw", band, a.square())
    return a * s**-beta, s, band


def _lrn_backward(g: Tensor, a: Tensor, size, scale, beta, k, groups) -> Tensor:
    _, s, band = _lrn(a, size, scale, beta, k, groups)
    return g * s**-beta - 2 * beta * scale * a * torch.einsum("cj,nchw->njhw", band, g * a * s ** (-beta - 1))


def _activation(x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    a = x if bias is None else x + bias.view(1, -1, 1, 1)
    return (a.clamp_min(0) if relu else a).contiguous(memory_format=_layout(x))


def lrn_pool(x, bias, relu, size, scale, beta, k, groups, window, ceil_mode, pool_first, with_place):
    a, layout = _activation(x, bias, relu), _layout(x)
    norm = (size, scale, beta, k, groups)
    if pool_first:
        pooled, place = max_pool2d(a, window, ceil_mode, with_place)
        return _lrn(pooled.double(), *norm)[0].to(x.dtype).contiguous(memory_format=layout), place
    normed = _lrn(a.double(), *norm)[0].to(x.dtype).contiguous(memory_format=layout)
    return max_pool2d(normed, window, ceil_mode, with_place)


def lrn_pool_backward(
    grad, x, bias, place, relu, size, scale, beta, k, groups, window, pool_first, with_bias_grad
):  # fmt: skip
    a, norm, sides = _activation(x, bias, relu).double(), (size, scale, beta, k, groups), x.shape[2:]
    g = grad.double()
    if pool_first:
        pooled = torch.zeros(place.shape, dtype=torch.double)
        for tap, rows, columns, inside in _taps(place.shape, sides, window):
            pooled = a[:, :, rows, columns].where(inside & (place == tap), pooled)
        g = max_pool2d_backward(_lrn_backward(g, pooled, *norm), place, *sides, window)
    else:
        g = _lrn_backward(max_pool2d_backward(g, place, *sides, window), a, *norm)
    g = g.where(~(a <= 0), torch.zeros((), dtype=torch.double)) if relu else g
    dbias = g.sum((0, 2, 3)).to(x.dtype) if with_bias_grad else x.new_empty(0)
    return g.to(x.dtype).contiguous(memory_format=_layout(x)), dbias


OPERATIONS = {f.__name__: f for f in (max_pool2d, max_pool2d_backward, lrn_pool, lrn_pool_backward)}


def _why_not(x: Tensor, *_: object) -> str | None:
    return None if x.is_cpu and x.is_floating_point() else "stands on CPUs, for floating point"


def table() -> dict[str, list[dispatch.Implementation]]:
    """Dispatch rows with the stand-in as the backend ``"cpu"``, before all others."""
    rows = {}
    for op, run in OPERATIONS.items():
        others = [row for row in dispatch._table[op] if row.backend != "cpu"]
        rows[op] = [dispatch.Implementation("cpu", _why_not, run), *others]
    return rows
