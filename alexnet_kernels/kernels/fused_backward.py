"""The gradient of ``fused.py``'s operations: pool, response normalisation, ReLU and bias, from ``x``, ``grad`` and the places.

With ``g_i = Σ grad[o]`` over the windows o whose place is i, ``a = max(0, x + bias)`` and ``s = k + scale · Σ a²``,

``dx_i = [a_i > 0] (g_i s_i^-beta - 2·beta·scale·a_i Σ_j g_j a_j s_j^-(beta+1))``, and ``dbias = Σ dx`` before dx is rounded.

The mask is that of torch: 0 where ``a <= 0``, so that NaN passes the gradient on. No atomics: sums are fp32, in a fixed order;
each thread (vector) or program (ring) leaves a partial sum for the bias, and one sum over those follows. Pool after:

vector   size 5, channels innermost, 16 bytes of channels divide a group: a thread owns one vector of channels of the SH·SW
         pixels that the same windows hold; it reads those windows, and each of those pixels, once, and writes ``dx``
ring     size 5, pixels innermost: a thread owns a pixel and walks its channels, gathering ``g`` as it goes
composed everything else, several passes: the pool's gradient in fp32, the normalisation's in fp32, mask and sum in torch

The first two take windows without dilation and one launch. Pool first: the pooled map is formed again from ``x``, the
normalisation's gradient by it (in fp32) is masked and summed on that small map, for each of its elements has its one place
in ``x``, and the pool's gradient then writes ``dx``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lrn, pool
from ._launch import Config, Launch, cdiv, plane_block, plane_index, run, tuned
from ._response import eight_backward, fives, power_of, ring_block, sum_of_five, terms, write_planes
from ._tile import activate, activated_planes, columns, near, read, split_lane, tile_of
from .pool import DTYPES, Window

CONFIGS = {"vector_gradient": Config(block=128), "ring_gradient": Config(block=128)}
_STEPS = 8  # blocks a program takes when it sums for the bias


@triton.jit
def _gathered(
    g, place, row, column, ok, WIDTH: tl.constexpr, STEP: tl.constexpr, OUTPUT: tl.constexpr, WINDOW: tl.constexpr
):
    """``g`` [BLOCK, WIDTH] of each pixel of the cells (row, column), as a tuple; ``g`` and ``place`` point to those windows."""
    KH: tl.constexpr = WINDOW[0]
    KW: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    WIDE: tl.constexpr = (KW + SW - 1) // SW
    held, taps = (), ()
    for a in tl.static_range((KH + SH - 1) // SH):
        for b in tl.static_range(WIDE):
            inside = ok & (row >= a) & (row - a < OUTPUT[0]) & (column >= b) & (column - b < OUTPUT[1])
            back = (a * OUTPUT[1] + b) * STEP
            held += (read(near(g - back, WIDTH), inside[:, None]),)
            taps += (tl.load(near(place - back, WIDTH), mask=inside[:, None], other=0),)
    out = ()
    for i in tl.static_range(SH):
        for j in tl.static_range(SW):
            total = tl.zeros(held[0].shape, tl.float32)
            for a in tl.static_range((KH - i + SH - 1) // SH):
                for b in tl.static_range((KW - j + SW - 1) // SW):
                    mine = taps[a * WIDE + b] == (i + a * SH) * KW + j + b * SW
                    total += tl.where(mine, held[a * WIDE + b], 0.0)
            out += (total,)
    return out


@triton.jit
def _term(g, x, s, BETA: tl.constexpr):
    """``g s^-beta`` and ``g x s^-(beta+1)``."""
    power, inverse = power_of(s, BETA)
    return g * power, g * x * (power * inverse)


@triton.jit
def _normal_gradient(
    p, bias, g0, g1, g2, ok, left, right, scale, k,
    BETA: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``dx`` in fp32 of WIDTH channels at each of ``p``; ``g1`` is theirs, ``g0`` and ``g2`` of two before and two after."""
    DTYPE: tl.constexpr = p.dtype.element_ty
    before = activate(read(near(p - 4, 4), (ok & left)[:, None]), bias[0], BIASED, RELU, DTYPE)
    x = activate(read(near(p, WIDTH), ok[:, None]), bias[1], BIASED, RELU, DTYPE)
    after = activate(read(near(p + WIDTH, 4), (ok & right)[:, None]), bias[2], BIASED, RELU, DTYPE)
    b, a = columns(before, BLOCK, 4), columns(after, BLOCK, 4)
    squares = columns(before * before, BLOCK, 4) + columns(x * x, BLOCK, WIDTH) + columns(after * after, BLOCK, 4)
    total = fives(squares, WIDTH + 4)
    direct, middle = _term(g1, x, k + scale * tile_of(total[2 : WIDTH + 2], BLOCK, WIDTH), BETA)
    _, low = _term(g0, tile_of(b[2:4], BLOCK, 2), k + scale * tile_of(total[0:2], BLOCK, 2), BETA)
    _, high = _term(g2, tile_of(a[0:2], BLOCK, 2), k + scale * tile_of(total[WIDTH + 2 :], BLOCK, 2), BETA)
    low = tl.where(
        left[:, None], low, 0.0
    )  # outside the group s may be zero and the term NaN, but it counts for nothing
    high = tl.where(right[:, None], high, 0.0)
    dx = direct - (2.0 * BETA * scale) * x * sum_of_five(low, middle, high, BLOCK, WIDTH)
    if RELU:
        dx = tl.where(x <= 0.0, 0.0, dx)
    return dx


@triton.jit
def _vector_gradient(
    g, place, x, bias, dx, partial, count, scale, k,
    SIZES: tl.constexpr, OUTPUT: tl.constexpr, CELLS: tl.constexpr, WINDOW: tl.constexpr, VECTORS: tl.constexpr,
    BETA: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr, SUMMED: tl.constexpr, STEPS: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dx`` as in this file's head; one program: BLOCK cells of SH x SW pixels x one vector of channels.

    SUMMED, it takes STEPS blocks, so far apart that a lane's channels stay the same: their sum goes to ``partial``.
    """
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    WIDTH: tl.constexpr = SIZES[3]
    STEP: tl.constexpr = SIZES[2] * WIDTH
    sums = tl.zeros((BLOCK, WIDTH), tl.float32)
    for s in tl.range(0, STEPS):
        block = tl.program_id(0) + s * tl.num_programs(0)
        plane, lane, ok = plane_block(block, count, CELLS[0] * CELLS[1] * CELLS[2], INDEX, BLOCK)
        more, row, column, inner = split_lane(lane, CELLS)
        left, right = inner % VECTORS > 0, inner % VECTORS < VECTORS - 1
        q = g + plane * (OUTPUT[0] * OUTPUT[1] * STEP)
        t = place + plane * (OUTPUT[0] * OUTPUT[1] * STEP)
        at = ((more * OUTPUT[0] + row) * OUTPUT[1] + column) * STEP + inner * WIDTH
        g0 = _gathered(q + at - 2, t + at - 2, row, column, ok & left, 2, STEP, OUTPUT, WINDOW)
        g1 = _gathered(q + at, t + at, row, column, ok, WIDTH, STEP, OUTPUT, WINDOW)
        g2 = _gathered(q + at + WIDTH, t + at + WIDTH, row, column, ok & right, 2, STEP, OUTPUT, WINDOW)
        add = (0.0, 0.0, 0.0)
        if BIASED:
            b = bias + inner * WIDTH
            add = (read(near(b - 4, 4), (ok & left)[:, None]), read(near(b, WIDTH), ok[:, None]))
            add += (read(near(b + WIDTH, 4), (ok & right)[:, None]),)
        first = plane * (SIZES[0] * SIZES[1] * STEP)
        for i in tl.static_range(SH):
            for j in tl.static_range(SW):
                h, w = row * SH + i - WINDOW[4], column * SW + j - WINDOW[5]
                inside = ok & (h >= 0) & (h < SIZES[0]) & (w >= 0) & (w < SIZES[1])
                offset = ((more * SIZES[0] + h) * SIZES[1] + w) * STEP + inner * WIDTH
                d = _normal_gradient(
                    x + first + offset, add, g0[i * SW + j], g1[i * SW + j], g2[i * SW + j],
                    inside, left, right, scale, k, BETA, BIASED, RELU, BLOCK, WIDTH,
                )  # fmt: skip
                tl.store(near(dx + first + offset, WIDTH), d.to(dx.dtype.element_ty), mask=inside[:, None])
                if SUMMED:
                    sums += tl.where(inside[:, None], d, 0.0)
    if SUMMED:
        lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(near(partial + lane * WIDTH, WIDTH), sums)


@triton.jit
def _gathered_planes(
    g, place, row, column, first, ok, CHANNELS: tl.constexpr, COUNT: tl.constexpr,
    OUTPUT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """``g`` of the padded pixels (row, column) in channels ``first`` to ``first + COUNT - 1``; zeros past the group."""
    KH: tl.constexpr = WINDOW[0]
    KW: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    PLANE: tl.constexpr = OUTPUT[0] * OUTPUT[1]
    out = ()
    for _ in tl.static_range(COUNT):
        out += (tl.zeros(row.shape, tl.float32),)
    for a in tl.static_range((KH + SH - 1) // SH):
        for b in tl.static_range((KW + SW - 1) // SW):
            r, c = row // SH - a, column // SW - b
            i, j = row - r * SH, column - c * SW
            inside = ok & (i < KH) & (j < KW) & (r >= 0) & (r < OUTPUT[0]) & (c >= 0) & (c < OUTPUT[1])
            tap = i * KW + j
            sums = ()
            for n in tl.static_range(COUNT):
                offset = tl.cast(first + n, tl.int64) * PLANE + (r * OUTPUT[1] + c)
                real = inside & (first + n < CHANNELS)
                mine = tl.load(place + offset, mask=real, other=0) == tap
                sums += (out[n] + tl.where(mine, read(g + offset, real), 0.0),)
            out = sums
    return out


@triton.jit
def _ring_gradient(
    g, place, x, bias, dx, partial, blocks, scale, k,
    SIZES: tl.constexpr, OUTPUT: tl.constexpr, WINDOW: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
    BETA: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dx`` as in this file's head; one program: BLOCK pixels of one group, all its channels, 8 of them a step.

    A step has in registers what ``lrn``'s ring has; the sums over its pixels go to ``partial`` [programs, CHANNELS].
    """
    PIXELS: tl.constexpr = SIZES[0] * SIZES[1]
    program = tl.program_id(0)
    start, lane, ok = ring_block(PIXELS, blocks, CHANNELS, BLOCK)
    pixel = program % blocks * BLOCK + lane
    row, column = pixel // SIZES[1] + WINDOW[4], pixel % SIZES[1] + WINDOW[5]
    group = program // blocks
    p = x + start + lane
    q = g + group.to(tl.int64) * (CHANNELS * OUTPUT[0] * OUTPUT[1])
    t = place + group.to(tl.int64) * (CHANNELS * OUTPUT[0] * OUTPUT[1])
    bias += group % GROUPS * CHANNELS
    zero = tl.zeros((BLOCK,), tl.float32)
    none = (zero, zero)
    held = activated_planes(p, bias, 0, ok, PIXELS, CHANNELS, 4, BIASED, RELU)
    first_g = _gathered_planes(q, t, row, column, 0, ok, CHANNELS, 2, OUTPUT, WINDOW)
    held_d, first_t = terms(none + held, first_g, scale, k, BETA, 2)
    held_t = none + first_t
    for c in tl.range(0, CHANNELS, 8):
        v = held + activated_planes(p, bias, c + 4, ok, PIXELS, CHANNELS, 8, BIASED, RELU)
        w = _gathered_planes(q, t, row, column, c + 2, ok, CHANNELS, 8, OUTPUT, WINDOW)
        direct, term = terms(v, w, scale, k, BETA, 8)
        d = held_d + direct
        sums = held_t
        for i in tl.static_range(8):  # outside the group s may be zero and the term NaN, but it counts for nothing
            sums += (tl.where(c + i + 2 < CHANNELS, term[i], 0.0),)
        out = eight_backward(v, d, sums, scale, BETA)
        masked = ()
        for i in tl.static_range(8):
            masked += (tl.where(v[i] <= 0.0, 0.0, out[i]) if RELU else out[i],)
        write_planes(dx + start + lane, masked, c, ok, PIXELS, CHANNELS)
        if SUMMED:
            channel = c + tl.arange(0, 8)
            total = tl.sum(tl.where(ok[:, None], tile_of(masked, BLOCK, 8), 0.0), 0)
            tl.store(partial + program.to(tl.int64) * CHANNELS + channel, total, mask=channel < CHANNELS)
        held, held_t, held_d = v[8:], sums[8:], d[8:]


def form(x: Tensor, size: int, groups: int, window: Window) -> str:
    """Which form takes the gradient of pool after."""
    kh, kw, sh, sw, _, _, dh, dw = window
    if size != 5 or not dh == dw == 1 or kh * kw > 9 or sh * sw > 4:
        return "composed"
    if x.is_contiguous():
        return "ring"
    return "vector" if x.shape[1] // groups % (16 // x.element_size()) == 0 else "composed"


def plan_vector(
    grad: Tensor, place: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor, relu: bool, scale: float, beta: float, k: float,
    groups: int, window: Window, summed: bool,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """The launch for channels_last tensors, and the partial sums for the bias [lanes, C] that it writes."""
    config = tuned("fused_backward", x.device).get("vector_gradient", CONFIGS["vector_gradient"])
    images, channels, height, width = x.shape
    vector = 16 // x.element_size()
    inner = channels // vector
    cells = (cdiv(height + window[4], window[2]), cdiv(width + window[5], window[3]), inner)
    plane = cells[0] * cells[1] * inner
    blocks = programs = cdiv(images * plane, config.block)
    turn = inner // math.gcd(inner, config.block)  # so many blocks bring a lane back to its channels
    steps = min(_STEPS, max(1, cdiv(blocks, turn))) if summed else 1
    if summed:
        programs = cdiv(cdiv(blocks, steps), turn) * turn
    sums = programs * config.block // inner if summed else 0
    partial = torch.empty((sums, channels), dtype=torch.float32, device=x.device)
    constants = {
        "SIZES": (height, width, inner, vector),
        "OUTPUT": tuple(grad.shape[2:]),
        "CELLS": cells,
        "WINDOW": tuple(window),
        "VECTORS": inner // groups,
        "BETA": float(beta),
        "BIASED": bias is not None,
        "RELU": relu,
        "SUMMED": summed,
        "STEPS": steps,
        "INDEX": plane_index(images * plane, plane, channels * height * width, config.block),
        "BLOCK": config.block,
    }
    args = (grad, place, x, x if bias is None else bias, dx, partial, images * plane, scale, k)
    work = config.block * vector * window[2] * window[3]
    return Launch(_vector_gradient, (programs,), args, constants, config.num_warps, work), partial


def plan_ring(
    grad: Tensor, place: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor, relu: bool, scale: float, beta: float, k: float,
    groups: int, window: Window, summed: bool,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """The launch for contiguous tensors, and the partial sums for the bias [N, groups, blocks, C / groups] that it writes."""
    config = tuned("fused_backward", x.device).get("ring_gradient", CONFIGS["ring_gradient"])
    channels = x.shape[1] // groups
    blocks = cdiv(x.shape[2:].numel(), config.block)
    shape = (x.shape[0] if summed else 0, groups, blocks, channels)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    constants = {
        "SIZES": tuple(x.shape[2:]),
        "OUTPUT": tuple(grad.shape[2:]),
        "WINDOW": tuple(window),
        "CHANNELS": channels,
        "GROUPS": groups,
        "BETA": float(beta),
        "BIASED": bias is not None,
        "RELU": relu,
        "SUMMED": summed,
        "BLOCK": config.block,
    }
    args = (grad, place, x, x if bias is None else bias, dx, partial, blocks, scale, k)
    grid = (x.shape[0] * groups * blocks,)
    return Launch(_ring_gradient, grid, args, constants, config.num_warps, channels * config.block), partial


def _composed(
    grad: Tensor, a: Tensor, place: Tensor, relu: bool, window: Window, arguments: tuple[int, float, float, float, int]
) -> Tensor:
    """The gradient of pool after, unrounded, pass by pass; ``a`` is the activation."""
    g = torch.empty_like(a, dtype=torch.float32)
    run(pool.plan_backward(grad, place, g, window))
    return masked(lrn.backward(g, a, *arguments, dtype=torch.float32), a, relu)


def masked(d: Tensor, a: Tensor, relu: bool) -> Tensor:
    """``d`` but where the ReLU that made ``a`` was off."""
    return torch.where(a <= 0, 0.0, d) if relu else d


def activated(x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``max(0, x + bias)``, as far as asked for, rounded to the dtype of ``x``."""
    a = x if bias is None else x + bias.view(1, -1, 1, 1)
    return a.relu() if relu else a


def backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, place: Tensor, relu: bool, size: int, scale: float, beta: float, k: float,
    groups: int, window: Window, pool_first: bool, with_bias_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``dx`` in the dtype and layout of ``x``, and ``dbias`` [C] in its dtype (not asked for: shape [0])."""
    arguments = (size, scale, beta, k, groups)
    way = "first" if pool_first else form(x, size, groups, window)
    if way == "first":
        p, _ = pool.forward_activated(x, bias, relu, grad.shape, window, False)
        d = masked(lrn.backward(grad, p, *arguments, dtype=torch.float32), p, relu)
        dx = torch.empty_like(x)
        run(pool.plan_backward(d, place, dx, window))
    elif way == "composed":
        d = _composed(grad, activated(x, bias, relu), place, relu, window, arguments)
        dx = d.to(x.dtype)
    else:
        dx = torch.empty_like(x)
        plan = plan_vector if way == "vector" else plan_ring
        launch, d = plan(grad, place, x, bias, dx, relu, scale, beta, k, groups, window, with_bias_grad)
        run(launch)
    if not with_bias_grad:
        return dx, x.new_empty(0)
    return dx, d.sum({"vector": (0,), "ring": (0, 2)}.get(way, (0, 2, 3))).flatten().to(x.dtype)


def shipped() -> Iterator[tuple[str, Launch]]:
    """The one-launch gradients of AlexNet, planned on meta tensors, each with a label: for offline compilation."""
    window = (3, 3, 2, 2, 0, 0, 1, 1)
    shapes = [((256, 96, 55, 55), 1), ((256, 96, 55, 55), 2), ((256, 256, 27, 27), 2), ((8192, 96, 55, 55), 2)]
    for dtype, (shape, groups), biased, plan in product(DTYPES, shapes, (False, True), (plan_vector, plan_ring)):
        layout = torch.channels_last if plan is plan_vector else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)
        bias = torch.empty(shape[1], dtype=dtype, device="meta") if biased else None
        grad = torch.empty(pool.output_shape(x, window, False), dtype=dtype, device="meta")
        grad = grad.contiguous(memory_format=layout)
        place = torch.empty_like(grad, dtype=torch.uint8)
        launch, _ = plan(grad, place, x, bias, x, True, 2e-5, 0.75, 2.0, groups, window, biased)
        where = f"{'x'.join(map(str, shape))} groups {groups}{' bias' if biased else ''}"
        yield f"{launch.name} {str(dtype)[6:]} {where}", launch
