"""What stands around a matrix product or a convolution: bias, ReLU and dropout, and the gradient of all three.

``y = max(0, x + b_c)``, and behind it ``d = keep · y / (1 - p)``. Their gradient needs no mask, for the result is one:

``dz = grad / (1 - p)`` where not ``d <= 0``, else 0; ``db_c = Σ dz`` over everything but the channel.

A unit that ReLU switched off and one that dropout dropped are both 0 in ``d``, and both pass nothing on; NaN passes the gradient,
as in torch. ``d`` is the next layer's input, kept for its weight gradient anyway: dropout then costs the backward no byte, and
its random numbers are drawn once. They are Philox's, the counter an element's place divided by 4: they depend on the seed alone.

Two forms, by what lies next to each other in memory:

rows     channels, in rows [M, C] (channels_last maps, the outputs of a linear layer): a program takes a tile of one block of
         channels and several blocks of rows
planes   pixels, in planes [N · C, P] (contiguous maps): a program takes several planes whole

Sums are fp32, in two stages and a fixed order that depends on the shape alone: a program leaves one for each of its channels
(rows) or planes, ``partial`` [parts, C], and a second kernel adds the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, Launch, block_of, run, tuned
from ._tile import activate, near, read, tile_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

CONFIGS = {  # block: elements a tile has (rows: of a half type; half as many in fp32, the same bytes a thread)
    "rows_forward": Config(block=4096),
    "rows_backward": Config(block=4096),
    "planes_forward": Config(block=2048),
    "planes_backward": Config(block=2048),
    "sums": Config(block=4096),
    "dropout": Config(block=1024),
}
_PROGRAMS = (
    1024  # of a gradient with sums, about: enough for any device, and few enough that their parts are a few percent
)


@triton.jit
def _rows_tile(first, rows, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of ROWS rows from ``first`` on (int64) and this program's COLUMNS channels: offsets from the first row, which
    exist, and its channels."""
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row * C + channel, (row < rows - first) & (channel < C), channel


@triton.jit
def _rows_forward(
    x, bias, y, rows,
    C: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``y = max(0, x + b_c)``, as far as asked for; one program: ROWS x COLUMNS of [rows, C]. ``y`` may be ``x``."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    offset, ok, channel = _rows_tile(first, rows, C, ROWS, COLUMNS)
    add = read(bias + channel, channel < C) if BIASED else 0.0
    v = activate(read(x + first * C + offset, ok), add, BIASED, RELU, x.dtype.element_ty)
    tl.store(y + first * C + offset, v.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _rows_backward(
    g, y, dz, partial, rows, scale, steps,
    C: tl.constexpr, SUMMED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``dz = scale · g`` where not ``y <= 0``; one program: ``steps`` tiles of ROWS x COLUMNS below each other in [rows, C].

    SUMMED, it adds its tiles and then their rows, before ``dz`` is rounded, and leaves a row of ``partial``.
    """
    program = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in tl.range(0, steps):  # no constant: each few images more would be another kernel to compile
        first = (program * steps + s) * ROWS
        offset, ok, _ = _rows_tile(first, rows, C, ROWS, COLUMNS)
        first *= C
        d = tl.where(read(y + first + offset, ok) <= 0.0, 0.0, read(g + first + offset, ok) * scale)
        tl.store(dz + first + offset, d.to(dz.dtype.element_ty), mask=ok)
        if SUMMED:
            sums += d
    if SUMMED:
        channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(partial + program * C + channel, tl.sum(sums, 0), mask=channel < C)


@triton.jit
def _planes_tile(planes, PIXELS: tl.constexpr, PLANES: tl.constexpr):
    """This program's PLANES planes: the first (int64), the others from it on, which exist, and their offsets [PLANES, 1]."""
    start, plane, real = block_of(tl.program_id(0), planes, PLANES)
    INDEX: tl.constexpr = tl.int32 if PLANES * PIXELS < 2**31 else tl.int64
    return start, plane, real, plane.to(INDEX)[:, None] * PIXELS


@triton.jit
def _planes_forward(
    x, bias, y, planes,
    C: tl.constexpr, PIXELS: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y = max(0, x + b_c)``, as far as asked for; one program: BLOCK pixels of PLANES planes. ``y`` may be ``x``."""
    start, plane, real, offset = _planes_tile(planes, PIXELS, PLANES)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    add = read(bias + (start + plane) % C, real)[:, None] if BIASED else 0.0
    ok = real[:, None] & (pixel < PIXELS)
    v = activate(read(x + start * PIXELS + (offset + pixel), ok), add, BIASED, RELU, x.dtype.element_ty)
    tl.store(y + start * PIXELS + (offset + pixel), v.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _planes_backward(
    g, y, dz, partial, planes, scale,
    PIXELS: tl.constexpr, SUMMED: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dz = scale · g`` where not ``y <= 0``; one program: PLANES planes, BLOCK pixels of each a step.

    SUMMED, it adds the steps and then their pixels, before ``dz`` is rounded, and leaves a sum for each plane.
    """
    start, plane, real, offset = _planes_tile(planes, PIXELS, PLANES)
    base = start * PIXELS
    sums = tl.zeros((PLANES, BLOCK), tl.float32)
    for p in tl.range(0, PIXELS, BLOCK):
        pixel = p + tl.arange(0, BLOCK)[None, :]
        ok = real[:, None] & (pixel < PIXELS)
        at = offset + pixel
        d = tl.where(read(y + base + at, ok) <= 0.0, 0.0, read(g + base + at, ok) * scale)
        tl.store(dz + base + at, d.to(dz.dtype.element_ty), mask=ok)
        if SUMMED:
            sums += d
    if SUMMED:
        tl.store(partial + start + plane, tl.sum(sums, 1), mask=real)


@triton.jit
def _sums(partial, out, parts, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``out_c = Σ partial[:, c]``; one program: COLUMNS channels, ROWS parts a step."""
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    for first in tl.range(0, parts, ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)[:, None]
        sums += read(partial + row * C + channel[None, :], (row < parts) & (channel < C)[None, :])
    tl.store(out + channel, tl.sum(sums, 0).to(out.dtype.element_ty), mask=channel < C)


@triton.jit
def _dropout(x, seed, y, elements, scale, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr):
    """``y = scale · x`` where a random word is THRESHOLD or more, else 0; one program: BLOCK · 4 elements, which may be in place.

    One turn of Philox makes the words of four neighbours. Its counter is 32 bits: masks repeat after 2^34 elements.
    """
    start, lane, _ = block_of(tl.program_id(0), elements, BLOCK)
    words = tl.randint4x(tl.load(seed), (start + lane).to(tl.int32))
    keep = tile_of(words, BLOCK, 4) >= tl.full((1, 1), THRESHOLD, tl.uint32)
    at = near(start * 4 + lane * 4, 4)
    v = read(x + at, at < elements)
    tl.store(y + at, tl.where(keep, v * scale, 0.0).to(y.dtype.element_ty), mask=at < elements)


def _config(name: str, x: Tensor) -> Config:
    return tuned("activation", x.device).get(name, CONFIGS[name])


def _in_rows(x: Tensor) -> bool:
    """Whether the channels of a dense ``x`` lie next to each other."""
    return x.dim() < 3 or not x.is_contiguous() or x.shape[2:].numel() == 1


def _rows_blocks(x: Tensor, block: int) -> tuple[int, int]:
    """ROWS and COLUMNS: 32 to 128 channels that divide C where it has such a divisor, so that no lane is idle."""
    channels = x.shape[1]
    divisors = [width for width in (128, 64, 32) if channels % width == 0]
    columns = divisors[0] if divisors else min(128, max(16, triton.next_power_of_2(channels)))
    return max(1, block * 2 // x.element_size() // columns), columns


def _planes_blocks(pixels: int, block: int) -> tuple[int, int]:
    """PLANES and BLOCK: of 128 to 1024 pixels a step the number that leaves the fewest lanes idle."""
    width = min((1024, 512, 256, 128), key=lambda b: triton.cdiv(pixels, b) * b)
    return max(1, block // width), width


def plan_forward(x: Tensor, bias: Tensor | None, y: Tensor, relu: bool) -> Launch:
    """The launch for dense tensors of one layout."""
    channels, rows = x.shape[1], x.numel() // max(1, x.shape[1])
    tensors = (x, x if bias is None else bias, y)
    constants = {"C": channels, "BIASED": bias is not None, "RELU": relu}
    if _in_rows(x):
        config = _config("rows_forward", x)
        height, width = _rows_blocks(y, config.block)
        grid = (triton.cdiv(rows, height), triton.cdiv(channels, width))
        constants |= {"ROWS": height, "COLUMNS": width}
        return Launch(_rows_forward, grid, (*tensors, rows), constants, config.num_warps, height * width)
    config, pixels = _config("planes_forward", x), x.shape[2:].numel()
    height, width = _planes_blocks(pixels, config.block)
    planes = x.shape[0] * channels
    grid = (triton.cdiv(planes, height), triton.cdiv(pixels, width))
    constants |= {"PIXELS": pixels, "PLANES": height, "BLOCK": width}
    return Launch(_planes_forward, grid, (*tensors, planes), constants, config.num_warps, height * width)


def plan_backward(grad: Tensor, y: Tensor, dz: Tensor, scale: float, summed: bool) -> tuple[Launch, Tensor]:
    """The launch for dense tensors of one layout, and the partial sums [parts, C] that it writes."""
    channels, rows = y.shape[1], y.numel() // max(1, y.shape[1])
    if _in_rows(y):
        config = _config("rows_backward", y)
        height, width = _rows_blocks(y, config.block)
        tiles, across = triton.cdiv(rows, height), triton.cdiv(channels, width)
        steps = max(1, triton.cdiv(tiles * across, _PROGRAMS)) if summed else 1
        parts = triton.cdiv(tiles, steps)
        grid: tuple[int, ...] = (parts, across)
        constants = {"C": channels, "SUMMED": summed, "ROWS": height, "COLUMNS": width}
        args: tuple[Any, ...] = (rows, scale, steps)
        work, kernel = steps * height * width, _rows_backward
    else:
        config, pixels = _config("planes_backward", y), y.shape[2:].numel()
        height, width = _planes_blocks(pixels, config.block)
        parts, args = y.shape[0], (y.shape[0] * channels, scale)
        grid = (triton.cdiv(args[0], height),)
        constants = {"PIXELS": pixels, "SUMMED": summed, "PLANES": height, "BLOCK": width}
        work, kernel = height * pixels, _planes_backward
    partial = torch.empty((parts if summed else 0, channels), dtype=torch.float32, device=y.device)
    return Launch(kernel, grid, (grad, y, dz, partial, *args), constants, config.num_warps, work), partial


def plan_sums(partial: Tensor, out: Tensor) -> Launch:
    """The second stage: ``out`` [C] from ``partial`` [parts, C]."""
    config, channels = _config("sums", partial), partial.shape[1]
    width = min(32, triton.next_power_of_2(channels))
    constants = {"C": channels, "ROWS": config.block // width, "COLUMNS": width}
    args = (partial, out, partial.shape[0])
    return Launch(_sums, (triton.cdiv(channels, width),), args, constants, config.num_warps, width)


def plan_dropout(x: Tensor, seed: Tensor, y: Tensor, p: float) -> Launch:
    """The launch for dense tensors of one layout; ``seed`` is an int64 on their device."""
    config = _config("dropout", x)
    constants = {"THRESHOLD": min(round(p * 2**32), 2**32 - 1), "BLOCK": config.block // 4}
    grid = (triton.cdiv(x.numel(), config.block),)
    return Launch(_dropout, grid, (x, seed, y, x.numel(), 1 / (1 - p)), constants, config.num_warps, config.block)


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """``x`` in the layout of ``like``, which is dense (default: its own): channels_last or contiguous; a copy where need be."""
    like = x if like is None else like
    last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def bias_relu(x: Tensor, bias: Tensor | None, relu: bool, *, inplace: bool = False) -> Tensor:
    """``x + bias`` [C] rounded to the dtype of ``x``, then ``max(0, .)`` where ``relu``; ``x`` is [M, C] or [N, C, ...].

    In place, ``x`` has to be dense. Otherwise the result has its layout, contiguous where that is neither of the two.
    """
    if inplace and _dense(x) is not x:
        raise ValueError(f"x with shape {tuple(x.shape)} and strides {x.stride()} is not dense; pass inplace=False")
    x = _dense(x)
    y = x if inplace else torch.empty_like(x)
    run(plan_forward(x, None if bias is None else bias.contiguous(), y, relu))
    return y


def backward(grad: Tensor, y: Tensor, with_bias_grad: bool, scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """``dz`` as in this file's head, in the dtype of ``grad`` and the layout of ``y``, and ``db`` [C] in that dtype or None.

    ``y`` is the result, after dropout too (``scale`` is then ``1 / (1 - p)``), [M, C] or [N, C, ...].
    """
    y = _dense(y)
    grad = _dense(grad, y)
    dz = torch.empty_like(grad)
    launch, partial = plan_backward(grad, y, dz, scale, with_bias_grad)
    run(launch)
    if not with_bias_grad:
        return dz, None
    db = torch.empty(y.shape[1], dtype=grad.dtype, device=grad.device)
    run(plan_sums(partial, db))
    return dz, db


def dropout(x: Tensor, seed: Tensor, p: float, *, inplace: bool = False) -> Tensor:
    """``x / (1 - p)`` where the random word of an element says keep, else 0; ``0 <= p < 1``, ``seed`` int64 of one element."""
    y = x if inplace else torch.empty_like(x)
    run(plan_dropout(x, seed, y, p))
    return y


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every launch of AlexNet, planned on meta tensors, each with a label: for offline compilation."""
    maps = [
        ((256, 96, 55, 55), True),
        ((256, 384, 13, 13), True),
        ((256, 96, 55, 55), False),
        ((256, 384, 13, 13), False),
    ]
    shapes = [*maps, ((256, 4096), True), ((8192, 96, 55, 55), True), ((8192, 96, 55, 55), False)]
    for dtype, (shape, innermost) in product(DTYPES, shapes):
        x = torch.empty(shape, dtype=dtype, device="meta")
        if innermost and len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        bias = torch.empty(shape[1], dtype=dtype, device="meta")
        where = f"{str(dtype)[6:]} {'nhwc' if innermost else 'nchw'} {'x'.join(map(str, shape))}"
        forward = plan_forward(x, bias, x, True)
        yield f"{forward.name} {where}", forward
        for summed in (False, True):
            launch, partial = plan_backward(x, x, x, 1.0, summed)
            yield f"{launch.name} {where}{' bias' if summed else ''}", launch
        if shape == (256, 384, 13, 13):
            yield f"sums {where}", plan_sums(partial, bias)
        if len(shape) == 2:
            yield f"dropout {where}", plan_dropout(x, torch.empty(1, dtype=torch.int64, device="meta"), x, 0.5)
