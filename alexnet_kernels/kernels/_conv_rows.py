"""Convolution with output pixels as the rows of a tile, over images: device code. Any batch, channel count, layout and stride."""

import triton
import triton.language as tl

from ._conv_tiles import finish
from ._launch import plane_block


@triton.jit
def pointer_rows(
    y, bias, x, w, images, x_image, x_channel, x_row, x_column, y_image, y_pixel, y_channel,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
    BIASED: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """``y[n, i, j, o] = max(0, bias_o + Σ_k x[n, row_k, column_k, c_k] w[o, k])``, k = (tap, c); one program: BLOCK_M output
    pixels, BLOCK_N output channels of a group. ``x_`` and ``y_`` are strides.

    A step is BLOCK_K of k, whichever taps they belong to, so that any channel count is dense. Each of its lanes carries its own
    row and column of the kernel and channel, from one step to the next by additions; where BLOCK_K divides the channels, all
    lanes share them (SHARED). VECTOR neighbouring lanes are neighbours in memory.
    """
    BLOCK_M: tl.constexpr = BLOCK[0]
    BLOCK_N: tl.constexpr = BLOCK[1]
    BLOCK_K: tl.constexpr = BLOCK[2]
    VECTOR: tl.constexpr = BLOCK[3]
    SHARED: tl.constexpr = CHANNELS % BLOCK_K == 0
    DEPTH: tl.constexpr = ROWS[2] * COLUMNS[2] * CHANNELS
    TILES: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    PIXELS: tl.constexpr = ROWS[1] * COLUMNS[1]
    column = tl.program_id(0) % TILES * BLOCK_N
    group = tl.program_id(0) // TILES % GROUPS
    first, lane, ok = plane_block(tl.program_id(0) // (TILES * GROUPS), images * PIXELS, PIXELS, INDEX, BLOCK_M)
    image = first + lane // PIXELS
    pixel = (lane % PIXELS).to(tl.int32)
    top = tl.where(ok, pixel // COLUMNS[1] * ROWS[3] - ROWS[4], -ROWS[5] * ROWS[2])  # no tap of a missing row is inside
    left = pixel % COLUMNS[1] * COLUMNS[3] - COLUMNS[4]
    base = image.to(tl.int64) * x_image + (top * x_row + left * x_column + group * CHANNELS * x_channel)
    base = tl.multiple_of(base, VECTOR)
    k = tl.arange(0, BLOCK_K)
    c, r, s = 0, 0, 0
    if not SHARED:
        c, r, s = k % CHANNELS, k // CHANNELS // COLUMNS[2], k // CHANNELS % COLUMNS[2]
    out = column + tl.arange(0, BLOCK_N)
    weights = w + (group * OUTPUTS + out)[:, None] * DEPTH + k[None, :]
    wide = (out < OUTPUTS)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, DEPTH, BLOCK_K):
        down, right = r * ROWS[5], s * COLUMNS[5]
        move = down * x_row + right * x_column + c * x_channel
        if SHARED:
            move += k * x_channel
            row, col = (top + down)[:, None], (left + right)[:, None]
        else:
            move = tl.max_contiguous(tl.multiple_of(move, VECTOR), VECTOR)
            row, col = top[:, None] + down[None, :], left[:, None] + right[None, :]
        inside = (row >= 0) & (row < ROWS[0]) & (col >= 0) & (col < COLUMNS[0])
        if SHARED:
            weight = tl.load(weights + step, mask=wide, other=0.0)
        else:
            inside = tl.max_constancy(inside & (step + k < DEPTH)[None, :], [1, VECTOR])
            weight = tl.load(weights + step, mask=wide & (step + k < DEPTH)[None, :], other=0.0)
        a = tl.load(x + base[:, None] + move[None, :], mask=inside, other=0.0)
        acc = tl.dot(a, weight.T, acc, input_precision=PRECISION)
        c += BLOCK_K % CHANNELS
        carry = (c >= CHANNELS) * 1
        c -= carry * CHANNELS
        s += BLOCK_K // CHANNELS % COLUMNS[2] + carry
        carry = (s >= COLUMNS[2]) * 1
        s -= carry * COLUMNS[2]
        r += BLOCK_K // CHANNELS // COLUMNS[2] + carry
    offset = image.to(tl.int64) * y_image + pixel * y_pixel
    finish(acc, y, bias, offset, ok, group, column, y_channel, OUTPUTS, BIASED, RELU, BLOCK_N)
