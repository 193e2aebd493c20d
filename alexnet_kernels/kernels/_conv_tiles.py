"""Convolution with images as the rows of a tile: device code. All images of a tile are at one output pixel, or at two.

A tile is then a rectangle of the matrix [N, H·W·C] that a channels_last tensor is, and so is the next one, some columns on:
plain two-dimensional descriptors and no masks. Taps that read padding are never visited, for they are the same in all rows.
A descriptor reads zeros where a row is past the last image, which is also how a step is made to count for nothing.
"""

import triton
import triton.language as tl

from ._conv_geometry import valid_taps


@triton.jit
def finish(
    v, y, bias, offset, ok, group, column, pitch,
    OUTPUTS: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store ``max(0, v + bias)`` as far as asked for, rounded once: rows at ``offset`` in ``y`` where ``ok``, columns ``pitch``
    apart, the channels of ``group`` from ``column`` on. NaN stays NaN."""
    lane = column + tl.arange(0, BLOCK_N)
    real = lane < OUTPUTS
    channel = group * OUTPUTS + lane
    if BIASED:
        v += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    if RELU:
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    p = y + offset[:, None] + (channel * pitch)[None, :]
    tl.store(p, v.to(y.dtype.element_ty), mask=ok[:, None] & real[None, :])


@triton.jit
def _walk(
    acc, x, w, image, images, out, x_at, w_at, rows, segments, chunks, x_row, w_row,
    X_SEGMENT: tl.constexpr, W_SEGMENT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``acc_i += Σ x[images, k] w_i[out_i, k]ᵀ`` over ``rows`` of ``segments`` of ``chunks`` steps of BLOCK; one loop.

    Segments begin X_SEGMENT and W_SEGMENT apart, rows ``x_row`` and ``w_row``. The counters are carried: a quotient, or a loop
    for each of the three, would drain the pipeline. The trip count is at least 1, without which ptxas (12.8) serialises every
    product of 8 warps; a step too many reads past the last image.
    """
    count = rows * segments * chunks
    image = tl.where(count > 0, image, images)
    chunk, segment = 0, 0
    for _ in tl.range(0, tl.maximum(count, 1)):
        a = x.load([image, x_at])
        acc0 = tl.dot(a, w[0].load([out, w_at]).T, acc[0], input_precision=PRECISION)
        if len(w) == 2:
            acc1 = tl.dot(a, w[1].load([out + w[0].block_shape[0], w_at]).T, acc[1], input_precision=PRECISION)
            acc = (acc0, acc1)
        else:
            acc = (acc0,)
        chunk += 1
        ended = (chunk == chunks).to(tl.int32)
        chunk -= ended * chunks
        segment += ended
        last = (segment == segments).to(tl.int32)
        segment -= last * segments
        x_at += BLOCK + ended * (X_SEGMENT - chunks * BLOCK) + last * (x_row - segments * X_SEGMENT)
        w_at += BLOCK + ended * (W_SEGMENT - chunks * BLOCK) + last * (w_row - segments * W_SEGMENT)
    return acc


@triton.jit
def batch_tile(
    y, bias, x, w, w_more, x_rest, w_rest, w_rest_more, images,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
    MERGED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y[n, i, j, o] = max(0, bias_o + Σ x[n, i', j', c] w[o, tap, c])``; one program: BLOCK_M images at one output pixel,
    BLOCK_N + MORE_N output channels of a group, which share the tile of x.

    Two loops at most: the channels of a tap by BLOCK_K, what that leaves by REST_K. MERGED: x is [groups·N, H·W·C/groups],
    so that the taps of a kernel row lie together, and the loops run over these.
    """
    BLOCK_M: tl.constexpr = BLOCK[0]
    BLOCK_N: tl.constexpr = BLOCK[1]
    MORE_N: tl.constexpr = BLOCK[2]
    BLOCK_K: tl.constexpr = BLOCK[3]
    REST_K: tl.constexpr = BLOCK[4]
    WIDTH: tl.constexpr = BLOCK_N + MORE_N
    TILES: tl.constexpr = (OUTPUTS + WIDTH - 1) // WIDTH
    DEPTH: tl.constexpr = CHANNELS if MERGED else CHANNELS * GROUPS
    program = tl.program_id(0)
    column = program % TILES * WIDTH
    group = program // TILES % GROUPS
    place = program // (TILES * GROUPS)
    pixel = place % (ROWS[1] * COLUMNS[1])
    first = place // (ROWS[1] * COLUMNS[1]) * BLOCK_M
    r, rows, top = valid_taps(pixel // COLUMNS[1], ROWS)
    s, columns, left = valid_taps(pixel % COLUMNS[1], COLUMNS)
    x_at = (top * COLUMNS[0] + left) * DEPTH
    w_at = (r * COLUMNS[2] + s) * CHANNELS
    image = first
    if MERGED:
        image += group * images
        length, segments = columns * CHANNELS, 1
        chunks = length // BLOCK_K
    else:
        x_at += group * CHANNELS
        length, segments = CHANNELS, columns
        chunks = CHANNELS // BLOCK_K
    end = images * GROUPS if MERGED else images
    out = group * OUTPUTS + column
    x_row = ROWS[5] * COLUMNS[0] * DEPTH
    w_row = COLUMNS[2] * CHANNELS
    acc = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    weights = (w,)
    if MORE_N > 0:
        acc += (tl.zeros((BLOCK_M, MORE_N), tl.float32),)
        weights += (w_more,)
    acc = _walk(
        acc, x, weights, image, end, out, x_at, w_at, rows, segments, chunks, x_row, w_row,
        COLUMNS[5] * DEPTH, CHANNELS, PRECISION, BLOCK_K,
    )  # fmt: skip
    if REST_K > 0:
        done = chunks * BLOCK_K
        rest = (w_rest,)
        if MORE_N > 0:
            rest += (w_rest_more,)
        acc = _walk(
            acc, x_rest, rest, image, end, out, x_at + done, w_at + done, rows, segments, (length - done) // REST_K,
            x_row, w_row, COLUMNS[5] * DEPTH, CHANNELS, PRECISION, REST_K,
        )  # fmt: skip
    lane = tl.arange(0, BLOCK_M)
    offset = (first + lane).to(tl.int64) * (ROWS[1] * COLUMNS[1] * OUTPUTS * GROUPS) + pixel * (OUTPUTS * GROUPS)
    ok = first + lane < images
    finish(acc[0], y, bias, offset, ok, group, column, 1, OUTPUTS, BIASED, RELU, BLOCK_N)
    if MORE_N > 0:
        finish(acc[1], y, bias, offset, ok, group, column + BLOCK_N, 1, OUTPUTS, BIASED, RELU, MORE_N)


@triton.jit
def pixel_pair(
    y, bias, x, w, images,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
    BIASED: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same; one program: BLOCK_M images at two neighbouring output pixels of a row, BLOCK_N output channels of a group.

    A step is BLOCK_K channels of a whole kernel row: KW tiles of w and KW + 1 of x, which both pixels use, for ``2 KW``
    products; a stride of one dilation makes them neighbours. Columns outside the map are read past the last image: zeros.
    """
    BLOCK_M: tl.constexpr = BLOCK[0]
    BLOCK_N: tl.constexpr = BLOCK[1]
    BLOCK_K: tl.constexpr = BLOCK[2]
    TILES: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    PAIRS: tl.constexpr = (COLUMNS[1] + 1) // 2
    TAPS: tl.constexpr = COLUMNS[2]
    DEPTH: tl.constexpr = CHANNELS * GROUPS
    program = tl.program_id(0)
    column = program % TILES * BLOCK_N
    group = program // TILES % GROUPS
    place = program // (TILES * GROUPS)
    pair = place % (ROWS[1] * PAIRS)
    first = place // (ROWS[1] * PAIRS) * BLOCK_M
    i, j = pair // PAIRS, pair % PAIRS * 2
    r, rows, top = valid_taps(i, ROWS)
    left = j * COLUMNS[3] - COLUMNS[4]
    count = rows * (CHANNELS // BLOCK_K)
    image = ()
    for t in tl.static_range(TAPS + 1):
        at = left + t * COLUMNS[5]
        image += (tl.where((at >= 0) & (at < COLUMNS[0]) & (count > 0), first, images),)
    x_at = (top * COLUMNS[0] + left) * DEPTH + group * CHANNELS
    w_at = r * TAPS * CHANNELS
    out = group * OUTPUTS + column
    acc0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    channel = 0
    for _ in tl.range(0, tl.maximum(count, 1)):
        near = x.load([image[0], x_at])
        for t in tl.static_range(TAPS):
            weights = w.load([out, w_at + t * CHANNELS]).T
            far = x.load([image[t + 1], x_at + (t + 1) * (COLUMNS[5] * DEPTH)])
            acc0 = tl.dot(near, weights, acc0, input_precision=PRECISION)
            acc1 = tl.dot(far, weights, acc1, input_precision=PRECISION)
            near = far
        channel += BLOCK_K
        ended = (channel == CHANNELS).to(tl.int32)
        channel -= ended * CHANNELS
        x_at += BLOCK_K + ended * (ROWS[5] * COLUMNS[0] * DEPTH - CHANNELS)
        w_at += BLOCK_K + ended * (TAPS * CHANNELS - CHANNELS)
    lane = tl.arange(0, BLOCK_M)
    pixel = i * COLUMNS[1] + j
    offset = (first + lane).to(tl.int64) * (ROWS[1] * COLUMNS[1] * OUTPUTS * GROUPS) + pixel * (OUTPUTS * GROUPS)
    ok = first + lane < images
    finish(acc0, y, bias, offset, ok, group, column, 1, OUTPUTS, BIASED, RELU, BLOCK_N)
    ok &= j + 1 < COLUMNS[1]
    finish(acc1, y, bias, offset + OUTPUTS * GROUPS, ok, group, column, 1, OUTPUTS, BIASED, RELU, BLOCK_N)
