"""Response normalisation and max pooling as one operation, in either order, after a bias and a ReLU where asked for.

``a = max(0, x + bias)``, rounded to the dtype of ``x``; ``l = lrn(a)``, see ``lrn.py``; then

pool after    ``y = pool(l)``, with ``l`` rounded before it is compared: maxima and places are those of the two operations
pool first    ``y = lrn(pool(a))``

Nothing is saved for backward but ``x`` and the places. Three ways, the first that applies:

strip    pool after, a 3x3 window at stride 2 that stays inside the map, size 5, channels innermost, 8·m channels a group: a
         thread owns 8 channels of two neighbouring columns of ``y`` and walks down a strip of rows with the last row's maxima
         in registers. Five columns are normalised for the four that two outputs need, ``2·ROWS + 1`` rows for ``2·ROWS``:
         ``x`` is read once from memory (neighbours meet in the first-level cache), ``l`` is never written
ring     pool after, size 5, pixels innermost: two launches, ``l`` passes through memory. A thread that pools in registers
         would normalise each element 2.2 times, for its windows overlap, and shared memory cannot be indexed in Triton
two      everything else is two launches of ``pool`` and ``lrn``: any size, group, window and layout. Pool first is always
         this: the pool applies bias and ReLU itself, and the normalisation runs on a map a quarter the size
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lrn, pool
from ._launch import Config, Launch, cdiv, plane_block, plane_index, run, tuned
from ._response import eight_forward, power_of, ring_block, sum_of_five, write_planes
from ._tile import activate, activated_planes, keep, near, read, read_bias, split_lane
from .fused_backward import activated
from .fused_backward import backward as backward  # the other half of this file
from .pool import DTYPES, Window

# strips of 64: of 128 threads, ptxas gives so few registers to one of them (fp32, sm_100) that it spills
CONFIGS = {"strip_forward": Config(block=64, num_warps=2), "ring_normalise": Config(block=128)}
_ROWS = 7  # of y in a strip; 1 when there are too few strips for the multiprocessors
_FEW = 1024  # programs


@triton.jit
def _normalised(
    p, bias, ok, left, right, scale, k,
    BETA: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``l`` [BLOCK, WIDTH] of the channels at each of ``p``, rounded to the dtype of ``p``, as fp32."""
    DTYPE: tl.constexpr = p.dtype.element_ty
    before = activate(read(near(p - 2, 2), (ok & left)[:, None]), bias[0], BIASED, RELU, DTYPE)
    middle = activate(read(near(p, WIDTH), ok[:, None]), bias[1], BIASED, RELU, DTYPE)
    after = activate(read(near(p + WIDTH, 2), (ok & right)[:, None]), bias[2], BIASED, RELU, DTYPE)
    total = sum_of_five(before * before, middle * middle, after * after, BLOCK, WIDTH)
    power, _ = power_of(k + scale * total, BETA)
    return (middle * power).to(DTYPE).to(tl.float32)


@triton.jit
def _row_maxima(
    p, bias, ok, both, left, right, scale, k, STEP: tl.constexpr, BETA: tl.constexpr,
    BIASED: tl.constexpr, RELU: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The maxima of columns 0 to 2 and of columns 2 to 4 of one row, each with its column; ``both``: which have the latter."""
    v0 = _normalised(p, bias, ok, left, right, scale, k, BETA, BIASED, RELU, BLOCK, WIDTH)
    v1 = _normalised(p + STEP, bias, ok, left, right, scale, k, BETA, BIASED, RELU, BLOCK, WIDTH)
    v2 = _normalised(p + 2 * STEP, bias, ok, left, right, scale, k, BETA, BIASED, RELU, BLOCK, WIDTH)
    v3 = _normalised(p + 3 * STEP, bias, both, left, right, scale, k, BETA, BIASED, RELU, BLOCK, WIDTH)
    v4 = _normalised(p + 4 * STEP, bias, both, left, right, scale, k, BETA, BIASED, RELU, BLOCK, WIDTH)
    zero = tl.zeros((BLOCK, WIDTH), tl.int32)
    first, column = keep(v0, zero, v1, 1, PLACED)
    first, column = keep(first, column, v2, 2, PLACED)
    second, other = keep(v2, zero, v3, 1, PLACED)
    second, other = keep(second, other, v4, 2, PLACED)
    return first, column, second, other


@triton.jit
def _strip_forward(
    x, bias, y, place, count, scale, k,
    SIZES: tl.constexpr, OUTPUT: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr, VECTORS: tl.constexpr,
    BETA: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr, PLACED: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y = pool3x3/2(lrn(max(0, x + bias)))`` and its places; one program: BLOCK strips of ROWS x 2 outputs x one vector."""
    WIDTH: tl.constexpr = SIZES[3]
    STEP: tl.constexpr = SIZES[2] * WIDTH
    plane, lane, ok = plane_block(tl.program_id(0), count, STRIPS[0] * STRIPS[1] * STRIPS[2], INDEX, BLOCK)
    more, strip, pair, inner = split_lane(lane, STRIPS)
    left, right = inner % VECTORS > 0, inner % VECTORS < VECTORS - 1
    second = pair * 2 + 1 < OUTPUT[1]
    add = (0.0, 0.0, 0.0)
    if BIASED:
        add = read_bias(bias + inner * WIDTH, ok, left, right, WIDTH)
    p = x + plane * (SIZES[0] * SIZES[1] * STEP)
    p += ((more * SIZES[0] + strip * (2 * ROWS)) * SIZES[1] + pair * 4) * STEP + inner * WIDTH
    y += plane * (OUTPUT[0] * OUTPUT[1] * STEP)
    place += plane * (OUTPUT[0] * OUTPUT[1] * STEP)
    out = ((more * OUTPUT[0] + strip * ROWS) * OUTPUT[1] + pair * 2) * STEP + inner * WIDTH
    v0, t0, v1, t1 = _row_maxima(
        p, add, ok, ok & second, left, right, scale, k, STEP, BETA, BIASED, RELU, PLACED, BLOCK, WIDTH
    )
    for r in tl.range(0, ROWS):
        inside = ok & (strip * ROWS + r < OUTPUT[0])
        both = inside & second
        for half in tl.static_range(1, 3):
            p += SIZES[1] * STEP
            a0, s0, a1, s1 = _row_maxima(
                p, add, inside, both, left, right, scale, k, STEP, BETA, BIASED, RELU, PLACED, BLOCK, WIDTH
            )
            v0, t0 = keep(v0, t0, a0, s0 + 3 * half, PLACED)
            v1, t1 = keep(v1, t1, a1, s1 + 3 * half, PLACED)
        tl.store(near(y + out, WIDTH), v0.to(y.dtype.element_ty), mask=inside[:, None])
        tl.store(near(y + out + STEP, WIDTH), v1.to(y.dtype.element_ty), mask=both[:, None])
        if PLACED:
            tl.store(near(place + out, WIDTH), t0.to(tl.uint8), mask=inside[:, None])
            tl.store(near(place + out + STEP, WIDTH), t1.to(tl.uint8), mask=both[:, None])
        out += OUTPUT[1] * STEP
        v0, t0, v1, t1 = a0, s0, a1, s1


@triton.jit
def _ring_normalise(
    x, bias, y, pixels, blocks, scale, k,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BETA: tl.constexpr,
    BIASED: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y = lrn(max(0, x + bias))``; one program: BLOCK pixels of one group, all its channels, 8 of them a step."""
    start, lane, ok = ring_block(pixels, blocks, CHANNELS, BLOCK)
    p = x + start + lane
    b = bias + tl.program_id(0) // blocks % GROUPS * CHANNELS
    zero = tl.zeros((BLOCK,), tl.float32)
    held = (zero, zero)
    held += activated_planes(p, b, 0, ok, pixels, CHANNELS, 2, BIASED, RELU)
    for c in tl.range(0, CHANNELS, 8):
        v = held + activated_planes(p, b, c + 2, ok, pixels, CHANNELS, 8, BIASED, RELU)
        write_planes(y + start + lane, eight_forward(v, scale, k, BETA), c, ok, pixels, CHANNELS)
        held = v[8:]


def supports(x: Tensor, window: Window) -> str | None:
    """Why these kernels cannot take ``x``, or None; the same for forward and backward."""
    return pool.supports(x, window)


def _is_strip(x: Tensor, y: Tensor, size: int, groups: int, window: Window) -> bool:
    inside = all(2 * (small - 1) + 3 <= big for small, big in zip(y.shape[2:], x.shape[2:], strict=True))
    return (
        tuple(window) == (3, 3, 2, 2, 0, 0, 1, 1)
        and inside
        and size == 5
        and not x.is_contiguous()
        and x.shape[1] // groups % (16 // x.element_size()) == 0
    )


def plan_strip(
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    place: Tensor,
    relu: bool,
    scale: float,
    beta: float,
    k: float,
    groups: int,
) -> Launch:
    """The launch that writes ``y``, and ``place`` unless it is empty, from a channels_last ``x``."""
    config = tuned("fused", x.device).get("strip_forward", CONFIGS["strip_forward"])
    images, channels, height, width = x.shape
    rows, columns = y.shape[2:]
    width_of = 16 // x.element_size()
    pairs, vectors = cdiv(columns, 2), channels // width_of
    many = images * cdiv(rows, _ROWS) * pairs * vectors >= _FEW * config.block
    strips = (cdiv(rows, _ROWS if many else 1), pairs, vectors)
    plane = strips[0] * strips[1] * strips[2]
    constants = {
        "SIZES": (height, width, vectors, width_of),
        "OUTPUT": (rows, columns),
        "STRIPS": strips,
        "ROWS": _ROWS if many else 1,
        "VECTORS": vectors // groups,
        "BETA": float(beta),
        "BIASED": bias is not None,
        "RELU": relu,
        "PLACED": place.numel() > 0,
        "INDEX": plane_index(images * plane, plane, channels * height * width, config.block),
        "BLOCK": config.block,
    }
    args = (x, x if bias is None else bias, y, place, images * plane, scale, k)
    work = config.block * width_of * (2 * constants["ROWS"] * 4)
    return Launch(_strip_forward, (cdiv(images * plane, config.block),), args, constants, config.num_warps, work)


def plan_ring(
    x: Tensor, bias: Tensor | None, y: Tensor, relu: bool, scale: float, beta: float, k: float, groups: int
) -> Launch:
    """The launch that normalises a contiguous ``x``, biased and clipped first where asked, into ``y``."""
    config = tuned("fused", x.device).get("ring_normalise", CONFIGS["ring_normalise"])
    pixels, channels = x.shape[2:].numel(), x.shape[1] // groups
    blocks = cdiv(pixels, config.block)
    constants = {
        "CHANNELS": channels,
        "GROUPS": groups,
        "BETA": float(beta),
        "BIASED": bias is not None,
        "RELU": relu,
        "BLOCK": config.block,
    }
    args = (x, x if bias is None else bias, y, pixels, blocks, scale, k)
    grid = (x.shape[0] * groups * blocks,)
    return Launch(_ring_normalise, grid, args, constants, config.num_warps, channels * config.block)


def forward(
    x: Tensor, bias: Tensor | None, relu: bool, size: int, scale: float, beta: float, k: float, groups: int,
    window: Window, ceil_mode: bool, pool_first: bool, with_place: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``y`` and the places (none: shape [0]) of a dense ``x`` [N, C, H, W], contiguous or channels_last, in its layout."""
    shape = pool.output_shape(x, window, ceil_mode)
    if pool_first:
        p, place = pool.forward_activated(x, bias, relu, shape, window, with_place)
        return lrn.forward(p, size, scale, beta, k, groups), place
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=pool.layout_of(x))
    if _is_strip(x, y, size, groups, window):
        place = torch.empty_like(y, dtype=torch.uint8) if with_place else y.new_empty(0, dtype=torch.uint8)
        run(plan_strip(x, bias, y, place, relu, scale, beta, k, groups))
        return y, place
    if size == 5 and x.is_contiguous() and (relu or bias is not None):
        normal = torch.empty_like(x)
        run(plan_ring(x, bias, normal, relu, scale, beta, k, groups))
    else:
        normal = lrn.forward(activated(x, bias, relu), size, scale, beta, k, groups)
    return pool.forward_activated(normal, None, False, shape, window, with_place)


def shipped() -> Iterator[tuple[str, Launch]]:
    """The forward launches of AlexNet that are not those of ``lrn`` or ``pool``, planned on meta tensors, each with a label."""
    window = (3, 3, 2, 2, 0, 0, 1, 1)
    shapes = [((256, 96, 55, 55), 1), ((256, 96, 55, 55), 2), ((256, 256, 27, 27), 2), ((1, 96, 55, 55), 2)]
    for dtype, (shape, groups), biased in product(DTYPES, shapes, (False, True)):
        x = torch.empty(shape, dtype=dtype, device="meta")
        bias = torch.empty(shape[1], dtype=dtype, device="meta") if biased else None
        label = f"{str(dtype)[6:]} {'x'.join(map(str, shape))} groups {groups}{' bias relu' if biased else ''}"
        yield f"ring_normalise {label}", plan_ring(x, bias, x, biased, 2e-5, 0.75, 2.0, groups)
        last = x.contiguous(memory_format=torch.channels_last)
        y = torch.empty(pool.output_shape(x, window, False), dtype=dtype, device="meta")
        y = y.contiguous(memory_format=torch.channels_last)
        place = torch.empty_like(y, dtype=torch.uint8)
        for with_place in (True, False):
            where = place if with_place else place.flatten()[:0]
            launch = plan_strip(last, bias, y, where, biased, 2e-5, 0.75, 2.0, groups)
            yield f"strip_forward{'' if with_place else ' without place'} {label}", launch
