"""Local response normalisation across channels and its gradient: ``y = x · s^-beta``, ``s = k + scale · Σ x²``.

The window of ``size`` channels has ``size // 2`` before and ``(size - 1) // 2`` after the channel, inside its own group.
Arithmetic is fp32. Every form reads its input once from memory and writes its result once; nothing is saved for backward,
which forms ``s`` again. Three forms, taken in this order:

vector   size 5, channels innermost, 8·m channels a group: a thread owns 8 channels (16 bytes of a half type) of a pixel
ring     size 5, pixels innermost: a thread owns a pixel and walks its channels, the window in registers
general  everything else: a thread owns an element, the first-level cache serves its window

A power that is not one of ``_response.power_of``'s closed forms goes through ``exp2`` and ``log2``, whose error grows with
the power: about ``(2 + |beta · log2 s|) · 2^-22``, relative.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, Launch, block_of, cdiv, index_type, run, tuned
from ._response import eight_backward, eight_forward, power_of, ring_block, terms, write_planes
from ._tile import read, read_channels, write_channels

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

CONFIGS = {
    "vector_forward": Config(block=256),
    "vector_backward": Config(block=128),
    "ring_forward": Config(block=128),
    "ring_backward": Config(block=128),
    "general_forward": Config(block=512),
    "general_backward": Config(block=256),
}


@triton.jit
def _vector_block(vectors, VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's vectors: offset of the first, offsets from it, which exist, which have a left, which a right neighbour."""
    program = tl.program_id(0)
    start, lane, ok = block_of(program, vectors, BLOCK)
    place = (program % VECTORS * BLOCK + lane) % VECTORS
    return start * 8, lane * 8, ok, ok & (place > 0), ok & (place < VECTORS - 1)


@triton.jit
def _vector_forward(x, y, vectors, scale, k, VECTORS: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr):
    """``y_c = x_c (k + scale Σ_{|j-c|<=2} x_j²)^-beta``; one program: BLOCK vectors of 8 channels."""
    start, lane, ok, left, right = _vector_block(vectors, VECTORS, BLOCK)
    p = x + start + lane
    v = read_channels(p - 2, left, BLOCK, 2) + read_channels(p, ok, BLOCK, 8) + read_channels(p + 8, right, BLOCK, 2)
    write_channels(y + start + lane, eight_forward(v, scale, k, BETA), ok, BLOCK)


@triton.jit
def _vector_backward(g, x, dx, vectors, scale, k, VECTORS: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr):
    """``dx_c = g_c s_c^-beta - 2 beta scale x_c Σ_{|j-c|<=2} t_j``, ``t_j = g_j x_j s_j^-(beta+1)``; one program: BLOCK vectors.

    A vector's sums need ``t`` two channels beyond it, which need ``x`` four channels beyond it.
    """
    start, lane, ok, left, right = _vector_block(vectors, VECTORS, BLOCK)
    p = x + start + lane
    q = g + start + lane
    v = read_channels(p - 4, left, BLOCK, 4) + read_channels(p, ok, BLOCK, 8) + read_channels(p + 8, right, BLOCK, 4)
    w = read_channels(q - 2, left, BLOCK, 2) + read_channels(q, ok, BLOCK, 8) + read_channels(q + 8, right, BLOCK, 2)
    direct, term = terms(v, w, scale, k, BETA, 12)
    t = ()
    for i in tl.static_range(12):  # outside the group s may be zero and t NaN, but counts for nothing
        t += (tl.where(left, term[i], 0.0) if i < 2 else tl.where(right, term[i], 0.0) if i >= 10 else term[i],)
    write_channels(dx + start + lane, eight_backward(v[4:12], direct[2:10], t, scale, BETA), ok, BLOCK)


@triton.jit
def _read_planes(p, first, ok, pixels, CHANNELS: tl.constexpr, COUNT: tl.constexpr):
    """Channels ``first`` to ``first + COUNT - 1`` of the pixels ``p``, as a tuple; zeros past the group."""
    out = ()
    for i in tl.static_range(COUNT):
        out += (read(p + tl.cast(first + i, tl.int64) * pixels, ok & (first + i < CHANNELS)),)
    return out


@triton.jit
def _ring_forward(x, y, pixels, blocks, scale, k, CHANNELS: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr):
    """``y_c = x_c (k + scale Σ_{|j-c|<=2} x_j²)^-beta``; one program: BLOCK pixels of one group, all its channels.

    A step makes channels c to c + 7: ``x`` of c - 2 to c + 1 is in registers, that of c + 2 to c + 9 arrives together.
    """
    start, lane, ok = ring_block(pixels, blocks, CHANNELS, BLOCK)
    p = x + start + lane
    zero = tl.zeros((BLOCK,), tl.float32)
    held = (zero, zero)
    held += _read_planes(p, 0, ok, pixels, CHANNELS, 2)
    for c in tl.range(0, CHANNELS, 8):
        v = held + _read_planes(p, c + 2, ok, pixels, CHANNELS, 8)
        write_planes(y + start + lane, eight_forward(v, scale, k, BETA), c, ok, pixels, CHANNELS)
        held = v[8:]


@triton.jit
def _ring_backward(g, x, dx, pixels, blocks, scale, k, CHANNELS: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr):
    """``dx_c = g_c s_c^-beta - 2 beta scale x_c Σ_{|j-c|<=2} t_j``, ``t_j = g_j x_j s_j^-(beta+1)``; one program: BLOCK pixels.

    It walks all channels of one group. A step makes channels c to c + 7: ``x`` of c to c + 3, ``t`` of c - 2 to c + 1 and
    ``g s^-beta`` of c and c + 1 are in registers, ``x`` of c + 4 to c + 11 and ``g`` of c + 2 to c + 9 arrive together.
    """
    start, lane, ok = ring_block(pixels, blocks, CHANNELS, BLOCK)
    p = x + start + lane
    q = g + start + lane
    zero = tl.zeros((BLOCK,), tl.float32)
    none = (zero, zero)
    held = _read_planes(p, 0, ok, pixels, CHANNELS, 4)
    held_d, first_t = terms(none + held, _read_planes(q, 0, ok, pixels, CHANNELS, 2), scale, k, BETA, 2)
    held_t = none + first_t
    for c in tl.range(0, CHANNELS, 8):
        v = held + _read_planes(p, c + 4, ok, pixels, CHANNELS, 8)
        direct, term = terms(v, _read_planes(q, c + 2, ok, pixels, CHANNELS, 8), scale, k, BETA, 8)
        d = held_d + direct
        t = held_t
        for i in tl.static_range(8):  # outside the group s may be zero and t NaN, but counts for nothing
            t += (tl.where(c + i + 2 < CHANNELS, term[i], 0.0),)
        write_planes(dx + start + lane, eight_backward(v, d, t, scale, BETA), c, ok, pixels, CHANNELS)
        held, held_t, held_d = v[8:], t[8:], d[8:]


@triton.jit
def _denominator(p, c, ok, step, scale, k, CHANNELS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """``k + scale Σ x²`` over the window of channel ``c``; ``p`` points to it, ``step`` leads to the next channel."""
    total = tl.zeros(c.shape, tl.float32)
    for d in tl.range(-BEFORE, AFTER + 1):
        v = read(p + d * step, ok & (c + d >= 0) & (c + d < CHANNELS))
        total += v * v
    return k + scale * total


@triton.jit
def _general_block(elements, stride, CHANNELS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """This program's elements: offset of the first, lanes, which exist, and the channel of each inside its group."""
    start, lane, ok = block_of(tl.program_id(0), elements, BLOCK)
    channel = (start.to(INDEX) + lane) // tl.cast(stride, INDEX) % CHANNELS
    return start, lane, ok, channel.to(tl.int32)


@triton.jit
def _general_forward(
    x, y, elements, stride, scale, k,
    CHANNELS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, BETA: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y_c = x_c (k + scale Σ_{-BEFORE<=d<=AFTER} x_{c+d}²)^-beta``; one program: BLOCK elements in the order of memory."""
    start, lane, ok, c = _general_block(elements, stride, CHANNELS, INDEX, BLOCK)
    p = x + start + lane
    power, _ = power_of(_denominator(p, c, ok, tl.cast(stride, INDEX), scale, k, CHANNELS, BEFORE, AFTER), BETA)
    tl.store(y + start + lane, (read(p, ok) * power).to(y.dtype.element_ty), mask=ok)


@triton.jit
def _general_backward(
    g, x, dx, elements, stride, scale, k,
    CHANNELS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, BETA: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dx_c = g_c s_c^-beta - 2 beta scale x_c Σ_{-AFTER<=d<=BEFORE} g_j x_j s_j^-(beta+1)``, ``j = c + d``.

    One program: BLOCK elements in the order of memory. The window is mirrored: it holds the channels whose windows hold c.
    """
    start, lane, ok, c = _general_block(elements, stride, CHANNELS, INDEX, BLOCK)
    step = tl.cast(stride, INDEX)
    p = x + start + lane
    q = g + start + lane
    shared = tl.zeros((BLOCK,), tl.float32)
    for d in tl.range(-AFTER, BEFORE + 1):
        inside = ok & (c + d >= 0) & (c + d < CHANNELS)
        s = _denominator(p + d * step, c + d, inside, step, scale, k, CHANNELS, BEFORE, AFTER)
        power, inverse = power_of(s, BETA)
        t = read(q + d * step, inside) * read(p + d * step, inside) * (power * inverse)
        shared += tl.where(inside, t, 0.0)
    power, _ = power_of(_denominator(p, c, ok, step, scale, k, CHANNELS, BEFORE, AFTER), BETA)
    result = read(q, ok) * power - (2.0 * BETA * scale) * read(p, ok) * shared
    tl.store(dx + start + lane, result.to(dx.dtype.element_ty), mask=ok)


_FORWARD = {"vector": _vector_forward, "ring": _ring_forward, "general": _general_forward}
_BACKWARD = {"vector": _vector_backward, "ring": _ring_backward, "general": _general_backward}


def _form(x: Tensor, size: int, channels: int) -> tuple[str, bool]:
    """The form that takes ``x``, and whether channels are innermost: by dense strides, so that one pixel counts as both."""
    innermost = x.shape[2:].numel() == 1 or not x.is_contiguous()
    if size == 5 and innermost and channels % 8 == 0:
        return "vector", innermost
    if size == 5 and not innermost:
        return "ring", innermost
    return "general", innermost


def plan(tensors: tuple[Tensor, ...], size: int, scale: float, beta: float, k: float, groups: int) -> Launch:
    """The launch that reads ``(x,)`` or ``(grad, x)`` and writes the last of ``tensors``; all of them have one layout."""
    x = tensors[-2]
    channels = x.shape[1] // groups
    pixels, elements = x.shape[2:].numel(), x.numel()
    form, innermost = _form(x, size, channels)
    kernel = (_FORWARD if len(tensors) == 2 else _BACKWARD)[form]
    name = kernel.fn.__name__.lstrip("_")
    config = tuned("lrn", x.device).get(name, CONFIGS[name])
    block = config.block
    constants = {"CHANNELS": channels, "BETA": float(beta), "BLOCK": block}
    sizes: tuple[int, ...]
    if form == "vector":
        programs, work = cdiv(elements // 8, block), 8 * block
        sizes = (elements // 8,)
        constants["VECTORS"] = constants.pop("CHANNELS") // 8
    elif form == "ring":
        blocks = cdiv(pixels, block)
        programs, work = x.shape[0] * groups * blocks, channels * block
        sizes = (pixels, blocks)
    else:
        programs, work = cdiv(elements, block), block
        sizes = (elements, 1 if innermost else pixels)
        reach = {"BEFORE": min(size // 2, channels), "AFTER": min((size - 1) // 2, channels)}
        constants |= reach | {"INDEX": index_type(elements + block)}
    return Launch(kernel, (programs,), (*tensors, *sizes, scale, k), constants, config.num_warps, work)


def forward(x: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Tensor:
    """``reference.lrn`` of a dense ``x`` [N, C, ...], contiguous or channels_last; the result has its dtype and layout."""
    y = torch.empty_like(x)
    run(plan((x, y), size, scale, beta, k, groups))
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``reference.lrn_backward``; ``grad`` has the layout of ``x``, and so has the result; its dtype too unless ``dtype``."""
    dx = torch.empty_like(x) if dtype is None else torch.empty_like(x, dtype=dtype)
    run(plan((grad, x, dx), size, scale, beta, k, groups))
    return dx


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every launch of AlexNet, and the general form, each with a label and planned on meta tensors: for offline compilation."""
    layouts = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    cases = [((2, 96, 55, 55), 5, 1), ((2, 96, 55, 55), 5, 2), ((2, 256, 27, 27), 5, 1), ((2, 256, 27, 27), 5, 2)]
    cases += [((2, 96, 55, 55), 4, 2), ((8192, 96, 55, 55), 4, 2)]  # the last has more than 2^31 elements
    for dtype, (shape, size, groups), layout in product(_DTYPES, cases, layouts):
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layouts[layout])
        for tensors in ((x, x), (x, x, x)):
            launch = plan(tensors, size, 2e-5, 0.75, 2.0, groups)
            where = "x".join(map(str, shape if shape[0] > 2 else shape[1:]))
            yield f"{launch.name} {str(dtype)[6:]} {layout} {where} size {size} groups {groups}", launch
