"""Max pooling and its gradient: ``y[o] = max_t a[o·stride - padding + t·dilation]``, t over the taps of the window.

Of equal values the first wins, and NaN wins over every number, the last NaN over the others: torch's rule, ``v > max or v is
NaN``, taps in rows, padding left out. Beside a maximum stands its *place*, the tap ``i·KW + j`` it came from, in one byte: all
that the gradient needs. ``a`` is ``x``, or ``max(0, x + bias)`` rounded to the dtype of ``x`` where a fused operation asks.

A map is a sequence of planes of H·W·INNER vectors. Channels innermost: a plane is an image, a vector 16 bytes of neighbouring
channels (one channel where their count does not divide). Pixels innermost: a plane is one channel, a vector one element.
The gradient is gathered, never scattered, in a fixed order with fp32 sums, and every element is written. Two forms:

cell     dilation 1, small strides: a thread owns the SH·SW pixels that the same windows hold, so that it reads each of those
         ``⌈KH/SH⌉·⌈KW/SW⌉`` windows once, and which tap of a window a pixel is, the compiler knows
general  everything else: a thread owns a vector and asks every tap for the window it belongs to

Sizes are compiled in, because lanes are divided by them: one compilation (about a second) for each shape of map, not batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, Launch, cdiv, plane_block, plane_index, run, tuned
from ._tile import activate, keep, split_lane

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Window = tuple[int, ...]  # kh, kw, sh, sw, ph, pw, dh, dw

CONFIGS = {
    "pool_forward": Config(block=128),
    "cell_backward": Config(block=128),
    "general_backward": Config(block=128),
}
_UNROLLED = 25  # taps; more of them are a loop


@triton.jit
def _read_tap(
    x, row, column, inner, bias, ok, t,
    SIZES: tl.constexpr, WINDOW: tl.constexpr, INSIDE: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """``a`` at tap ``t`` of the windows that begin at ``row``, ``column``; -inf in the padding, of which INSIDE has none."""
    h = row + t // WINDOW[1] * WINDOW[6]
    w = column + t % WINDOW[1] * WINDOW[7]
    if not INSIDE:
        ok = ok & (h >= 0) & (h < SIZES[0]) & (w >= 0) & (w < SIZES[1])
    offset = (h * SIZES[1] + w) * (SIZES[2] * SIZES[3]) + inner
    v = tl.load(x + offset, mask=ok, other=float("-inf")).to(tl.float32)
    v = activate(v, bias, BIASED, RELU, x.dtype.element_ty)
    if not INSIDE:
        v = tl.where(ok, v, float("-inf"))
    return v


@triton.jit
def _pool_forward(
    x, bias, y, place, count,
    SIZES: tl.constexpr, OUTPUT: tl.constexpr, WINDOW: tl.constexpr, CHANNELS: tl.constexpr, INSIDE: tl.constexpr,
    BIASED: tl.constexpr, RELU: tl.constexpr, PLACED: tl.constexpr,
    UNROLLED: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y[o] = max_t a[o·stride - padding + t·dilation]`` and the tap of each; one program: BLOCK vectors of ``y``."""
    VECTOR: tl.constexpr = SIZES[3]
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    PLANE: tl.constexpr = OUTPUT[0] * OUTPUT[1] * SIZES[2]
    SIZE: tl.constexpr = SIZES[0] * SIZES[1] * SIZES[2] * VECTOR
    plane, lane, ok = plane_block(tl.program_id(0), count, PLANE, INDEX, BLOCK)
    more, row, column, inner = split_lane(lane[:, None], OUTPUT)
    near = tl.arange(0, VECTOR)[None, :]
    ok = ok[:, None] & (near >= 0)
    inner = inner * VECTOR + near
    add = 0.0
    if BIASED:
        channel = inner if SIZES[2] * VECTOR == CHANNELS else ((plane + more) % CHANNELS).to(tl.int32)
        add = tl.load(bias + channel, mask=ok, other=0.0).to(tl.float32)
    h = row * WINDOW[2] - WINDOW[4]
    w = column * WINDOW[3] - WINDOW[5]
    p = x + plane * SIZE + more * SIZE
    tap = tl.zeros((BLOCK, VECTOR), tl.int32)
    if not INSIDE:  # the first tap that is not in the padding before the map
        i = tl.maximum(WINDOW[6] - 1 - h, 0) // WINDOW[6]
        tap += (i * WINDOW[1] + tl.maximum(WINDOW[7] - 1 - w, 0) // WINDOW[7]).to(tl.int32)
    best = _read_tap(p, h, w, inner, add, ok, 0, SIZES, WINDOW, INSIDE, BIASED, RELU)
    if AREA <= UNROLLED:
        for t in tl.static_range(1, AREA):
            v = _read_tap(p, h, w, inner, add, ok, t, SIZES, WINDOW, INSIDE, BIASED, RELU)
            best, tap = keep(best, tap, v, t, PLACED)
    else:
        for t in tl.range(1, AREA):
            v = _read_tap(p, h, w, inner, add, ok, t, SIZES, WINDOW, INSIDE, BIASED, RELU)
            best, tap = keep(best, tap, v, t, PLACED)
    out = lane[:, None] * VECTOR + near
    tl.store(y + plane * (PLANE * VECTOR) + out, best.to(y.dtype.element_ty), mask=ok)
    if PLACED:
        tl.store(place + plane * (PLANE * VECTOR) + out, tap.to(tl.uint8), mask=ok)


@triton.jit
def _cell_backward(
    g, place, dx, count,
    SIZES: tl.constexpr, OUTPUT: tl.constexpr, CELLS: tl.constexpr, WINDOW: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dx[h] = Σ g[o]`` over the windows o whose place is h; one program: BLOCK cells of SH x SW vectors of pixels.

    Cell (r, c) holds the padded pixels from (r·SH, c·SW) on: they are in the windows r - a, c - b alone, ``a < ⌈KH/SH⌉``, and
    pixel (i, j) of the cell is tap (i + a·SH, j + b·SW) of such a window.
    """
    KH: tl.constexpr = WINDOW[0]
    KW: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    WIDE: tl.constexpr = (KW + SW - 1) // SW
    VECTOR: tl.constexpr = SIZES[3]
    STEP: tl.constexpr = SIZES[2] * VECTOR
    PLANE: tl.constexpr = CELLS[0] * CELLS[1] * SIZES[2]
    plane, lane, ok = plane_block(tl.program_id(0), count, PLANE, INDEX, BLOCK)
    more, row, column, inner = split_lane(lane[:, None], CELLS)
    near = tl.arange(0, VECTOR)[None, :]
    ok = ok[:, None] & (near >= 0)
    inner = inner * VECTOR + near
    first = plane * (OUTPUT[0] * OUTPUT[1] * STEP)
    held, taps = (), ()
    for a in tl.static_range((KH + SH - 1) // SH):
        for b in tl.static_range(WIDE):
            r, c = row - a, column - b
            inside = ok & (r >= 0) & (r < OUTPUT[0]) & (c >= 0) & (c < OUTPUT[1])
            offset = ((more * OUTPUT[0] + r) * OUTPUT[1] + c) * STEP + inner
            held += (tl.load(g + first + offset, mask=inside, other=0.0).to(tl.float32),)
            taps += (tl.load(place + first + offset, mask=inside, other=0),)
    p = dx + plane * (SIZES[0] * SIZES[1] * STEP)
    for i in tl.static_range(SH):
        for j in tl.static_range(SW):
            total = tl.zeros((BLOCK, VECTOR), tl.float32)
            for a in tl.static_range((KH - i + SH - 1) // SH):
                for b in tl.static_range((KW - j + SW - 1) // SW):
                    mine = taps[a * WIDE + b] == (i + a * SH) * KW + j + b * SW
                    total += tl.where(mine, held[a * WIDE + b], 0.0)
            h, w = row * SH + i - WINDOW[4], column * SW + j - WINDOW[5]
            inside = ok & (h >= 0) & (h < SIZES[0]) & (w >= 0) & (w < SIZES[1])
            offset = ((more * SIZES[0] + h) * SIZES[1] + w) * STEP + inner
            tl.store(p + offset, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _general_backward(
    g, place, dx, count,
    SIZES: tl.constexpr, OUTPUT: tl.constexpr, WINDOW: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dx[h] = Σ g[o]`` over the windows o whose place is h; one program: BLOCK vectors of ``dx``, every tap in turn."""
    VECTOR: tl.constexpr = SIZES[3]
    STEP: tl.constexpr = SIZES[2] * VECTOR
    PLANE: tl.constexpr = SIZES[0] * SIZES[1] * SIZES[2]
    plane, lane, ok = plane_block(tl.program_id(0), count, PLANE, INDEX, BLOCK)
    more, row, column, inner = split_lane(lane[:, None], SIZES)
    near = tl.arange(0, VECTOR)[None, :]
    ok = ok[:, None] & (near >= 0)
    first = plane * (OUTPUT[0] * OUTPUT[1] * STEP)
    total = tl.zeros((BLOCK, VECTOR), tl.float32)
    for t in tl.range(0, WINDOW[0] * WINDOW[1]):
        r = row + WINDOW[4] - t // WINDOW[1] * WINDOW[6]
        c = column + WINDOW[5] - t % WINDOW[1] * WINDOW[7]
        inside = ok & (r >= 0) & (r % WINDOW[2] == 0) & (r // WINDOW[2] < OUTPUT[0])
        inside = inside & (c >= 0) & (c % WINDOW[3] == 0) & (c // WINDOW[3] < OUTPUT[1])
        offset = ((more * OUTPUT[0] + r // WINDOW[2]) * OUTPUT[1] + c // WINDOW[3]) * STEP + inner * VECTOR + near
        found = inside & (tl.load(place + first + offset, mask=inside, other=0).to(tl.int32) == t)
        total += tl.load(g + first + offset, mask=found, other=0.0).to(tl.float32)
    tl.store(dx + plane * (PLANE * VECTOR) + lane[:, None] * VECTOR + near, total.to(dx.dtype.element_ty), mask=ok)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Windows along one side: in ceil mode one more, that hangs over the edge, unless it begins behind map and padding."""
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    windows = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    return windows - 1 if ceil_mode and (windows - 1) * stride >= size + padding else windows


def output_shape(x: Tensor, window: Window, ceil_mode: bool) -> torch.Size:
    """The pooled map's shape."""
    sides = (
        output_size(x.shape[2 + i], window[i], window[2 + i], window[4 + i], window[6 + i], ceil_mode) for i in (0, 1)
    )
    return torch.Size((*x.shape[:2], *sides))


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last or contiguous, by strides alone; one pixel an image counts as contiguous."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def supports(x: Tensor, window: Window) -> str | None:
    """Why these kernels cannot pool ``x``, or None."""
    if x.dtype not in DTYPES:
        return f"the Triton kernels take fp32, fp16 and bf16, not {x.dtype}"
    if window[0] * window[1] > 256:
        return f"place is one byte: kernel area {window[0]}x{window[1]} > 256"
    return None


def _vectors(x: Tensor) -> tuple[int, int, int]:
    """Planes of ``x``, inner vectors a pixel, elements a vector."""
    images, channels = x.shape[:2]
    if x.is_contiguous():
        return images * channels, 1, 1
    vector = 16 // x.element_size()
    vector = vector if channels % vector == 0 else 1
    return images, channels // vector, vector


def plan_forward(
    x: Tensor, bias: Tensor | None, y: Tensor, place: Tensor, window: Window, relu: bool = False
) -> Launch:
    """The launch that pools ``x``, biased and clipped first where asked, into ``y``, and into ``place`` unless it is empty."""
    config = tuned("pool", x.device).get("pool_forward", CONFIGS["pool_forward"])
    planes, inner, vector = _vectors(x)
    (height, width), (rows, columns) = x.shape[2:], y.shape[2:]
    kh, kw, sh, sw, ph, pw, dh, dw = window
    last = ((rows - 1) * sh + (kh - 1) * dh, (columns - 1) * sw + (kw - 1) * dw)
    plane = rows * columns * inner
    constants = {
        "SIZES": (height, width, inner, vector),
        "OUTPUT": (rows, columns, inner),
        "WINDOW": tuple(window),
        "CHANNELS": x.shape[1],
        "INSIDE": ph == pw == 0 and last[0] < height and last[1] < width,
        "BIASED": bias is not None,
        "RELU": relu,
        "PLACED": place.numel() > 0,
        "UNROLLED": _UNROLLED,
        "INDEX": plane_index(planes * plane, plane, x.numel() // max(planes, 1), config.block),
        "BLOCK": config.block,
    }
    tensors = (x, x if bias is None else bias, y, place)
    grid = (cdiv(planes * plane, config.block),)
    return Launch(_pool_forward, grid, (*tensors, planes * plane), constants, config.num_warps, vector * config.block)


def plan_backward(grad: Tensor, place: Tensor, dx: Tensor, window: Window) -> Launch:
    """The launch that gathers ``grad`` at ``place`` into ``dx``; the two may differ in dtype."""
    kh, kw, sh, sw, ph, pw, dh, dw = window
    planes, inner, vector = _vectors(dx)
    (height, width), (rows, columns) = dx.shape[2:], grad.shape[2:]
    cells = (cdiv(height + ph, sh), cdiv(width + pw, sw), inner)
    fits = dh == dw == 1 and sh * sw <= 9 and kh * kw <= _UNROLLED
    kernel = _cell_backward if fits else _general_backward
    name = kernel.fn.__name__.lstrip("_")
    config = tuned("pool", dx.device).get(name, CONFIGS[name])
    constants = {
        "SIZES": (height, width, inner, vector),
        "OUTPUT": (rows, columns, inner),
        "WINDOW": tuple(window),
        "BLOCK": config.block,
    }
    if fits:
        constants["CELLS"] = cells
    plane = cells[0] * cells[1] * inner if fits else height * width * inner
    elements = dx.numel() // max(planes, 1)
    constants["INDEX"] = plane_index(planes * plane, plane, max(elements, grad.numel() // max(planes, 1)), config.block)
    work = config.block * vector * (sh * sw if fits else 1)
    grid = (cdiv(planes * plane, config.block),)
    return Launch(kernel, grid, (grad, place, dx, planes * plane), constants, config.num_warps, work)


def forward(x: Tensor, window: Window, ceil_mode: bool, with_place: bool) -> tuple[Tensor, Tensor]:
    """The pooled map of a dense ``x`` [N, C, H, W], contiguous or channels_last, and its places (none: shape [0])."""
    return forward_activated(x, None, False, output_shape(x, window, ceil_mode), window, with_place)


def forward_activated(
    x: Tensor, bias: Tensor | None, relu: bool, shape: torch.Size, window: Window, with_place: bool
) -> tuple[Tensor, Tensor]:
    """:func:`forward` of ``max(0, x + bias)``, as far as asked for, into a map of ``shape``."""
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    place = torch.empty_like(y, dtype=torch.uint8) if with_place else y.new_empty(0, dtype=torch.uint8)
    run(plan_forward(x, bias, y, place, window, relu))
    return y, place


def backward(grad: Tensor, place: Tensor, height: int, width: int, window: Window) -> Tensor:
    """``dx`` [N, C, height, width] in the dtype and layout of ``grad``, which is that of ``place`` too."""
    shape, layout = (*grad.shape[:2], height, width), layout_of(grad)
    dx = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    run(plan_backward(grad, place, dx, window))
    return dx


def shipped() -> Iterator[tuple[str, Launch]]:
    """AlexNet's pools, and the general forms, each with a label and planned on meta tensors: for offline compilation."""
    layouts = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    paper, padded, dilated = (3, 3, 2, 2, 0, 0, 1, 1), (3, 3, 1, 1, 1, 1, 1, 1), (6, 5, 3, 2, 2, 1, 2, 1)
    cases = [((2, 96, 55, 55), paper), ((2, 256, 27, 27), paper), ((2, 256, 13, 13), paper)]
    cases += [((2, 96, 55, 55), padded), ((2, 96, 55, 55), dilated), ((8192, 96, 55, 55), paper)]
    for dtype, (shape, window), layout in product(DTYPES, cases, layouts):
        x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layouts[layout])
        y = torch.empty(output_shape(x, window, False), dtype=dtype, device="meta")
        y = y.contiguous(memory_format=layouts[layout])
        place = torch.empty_like(y, dtype=torch.uint8)
        where = "x".join(map(str, shape if shape[0] > 2 else shape[1:])) + " window " + "-".join(map(str, window))
        label = f"{str(dtype)[6:]} {layout} {where}"
        yield f"pool_forward {label}", plan_forward(x, None, y, place, window)
        yield f"pool_forward without place {label}", plan_forward(x, None, y, place.flatten()[:0], window)
        launch = plan_backward(y, place, x, window)
        yield f"{launch.name} {label}", launch
