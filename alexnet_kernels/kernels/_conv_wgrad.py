"""The weight gradient of a convolution, a GEMM with a long K: ``dw[o, t, c] = Σ_{n, j} dy[n, j, o] · x[n, in(j, t), c]``.

M is the output channels of a group, N is (tap, channel), K is the output pixels j of all images. K is much longer than M and N
are wide, so it is split: a program sums its share of K and stores it in fp32, ``partial`` [splits, O, taps · C/g]; one kernel
adds the shares in their order and writes the parameter's layout. No atomics: equal inputs give equal bits. Two forms:

tile  a step is BLOCK_K *images* at one output pixel, for which a tap is an input pixel or lies off the map, and then the step is
      left out. Both operands are plain rank-2 descriptors whose rows are K (wgmma takes 16-bit operands of either order from
      shared memory). A program may take several neighbouring taps of a kernel row, which share the tile of ``dy``: that is what
      narrow groups need, whose tiles of ``x`` alone would not be worth the ``dy`` they are multiplied with.
rows  a step is BLOCK_K output pixels, over images; N runs over taps and channels alike; plain pointers, masked where a tap
      leaves the map. It takes any layout, channel count, batch and geometry.
"""

import triton
import triton.language as tl

from ._launch import block_of


@triton.jit
def _inside(tap, AXIS: tl.constexpr):
    """The first output coordinate whose tap ``tap`` is on the map, and the one after the last."""
    ahead = AXIS[4] - tap * AXIS[5]  # input coordinate = output · stride - ahead
    first = tl.maximum(ahead + AXIS[3] - 1, 0) // AXIS[3]
    end = tl.maximum(AXIS[0] + ahead + AXIS[3] - 1, 0) // AXIS[3]
    return first, tl.minimum(end, AXIS[1])


@triton.jit
def _share(steps):
    """The steps of this program's share of K: first and count."""
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = split * steps // splits
    return first.to(tl.int32), ((split + 1) * steps // splits - first).to(tl.int32)


@triton.jit
def _accumulated(acc, a, b, i: tl.constexpr, PARTS_M: tl.constexpr):
    """The accumulators ``i`` to ``i + PARTS_M - 1``, which share ``b``, after this step, as a tuple."""
    out = (tl.dot(a[0], b, acc[i]),)
    if PARTS_M == 2:
        out += (tl.dot(a[1], b, acc[i + 1]),)
    return out


@triton.jit
def _store_share(acc, partial, output, channel, outputs, channels, LINE: tl.constexpr):
    """One accumulator to ``partial``, LINE elements a row: ``output`` below ``outputs``, ``channel`` below ``channels``."""
    real = (output < outputs)[:, None] & (channel < channels)[None, :]
    tl.store(partial + output[:, None] * LINE + channel[None, :], acc, mask=real)


@triton.jit
def weight_tile(
    partial, dy, dy_rest, x, x_rest, images,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_M: tl.constexpr, REST_M: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A share of ``dw`` in BLOCK_M + REST_M output channels, TAPS taps of a kernel row and BLOCK_N + REST_N channels of each.

    K is (images, output pixel), pixels first. TAPS > 1, a tap that is off the map reads its tile behind the last image: zeros.
    """
    PITCH_Y: tl.constexpr = OUTPUTS * GROUPS
    PITCH_X: tl.constexpr = CHANNELS * GROUPS
    BLOCKS_O: tl.constexpr = (OUTPUTS + BLOCK_M + REST_M - 1) // (BLOCK_M + REST_M)
    BLOCKS_C: tl.constexpr = (CHANNELS + BLOCK_N + REST_N - 1) // (BLOCK_N + REST_N)
    BLOCKS_T: tl.constexpr = (COLUMNS[2] + TAPS - 1) // TAPS
    PARTS_M: tl.constexpr = 2 if REST_M else 1
    WIDTH: tl.constexpr = COLUMNS[0]
    OW: tl.constexpr = COLUMNS[1]
    tile = tl.program_id(0)
    output = tile % BLOCKS_O * (BLOCK_M + REST_M)
    channel = tile // BLOCKS_O % BLOCKS_C * (BLOCK_N + REST_N)
    tap_w = tile // (BLOCKS_O * BLOCKS_C) % BLOCKS_T * TAPS
    tap_h = tile // (BLOCKS_O * BLOCKS_C * BLOCKS_T) % ROWS[2]
    group = tile // (BLOCKS_O * BLOCKS_C * BLOCKS_T * ROWS[2])
    first_h, end_h = _inside(tap_h, ROWS)
    first_w, end_w = _inside(tap_w, COLUMNS)
    for t in tl.static_range(1, TAPS):
        first_t, end_t = _inside(tap_w + t, COLUMNS)
        first_w, end_w = tl.minimum(first_w, first_t), tl.maximum(end_w, end_t)
    count_h, count_w = tl.maximum(end_h - first_h, 0), tl.maximum(end_w - first_w, 0)

    acc = ()
    for _ in tl.static_range(TAPS):
        acc += (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
        if REST_M:
            acc += (tl.zeros((REST_M, BLOCK_N), tl.float32),)
        if REST_N:
            acc += (tl.zeros((BLOCK_M, REST_N), tl.float32),)
            if REST_M:
                acc += (tl.zeros((REST_M, REST_N), tl.float32),)
    PARTS: tl.constexpr = PARTS_M * (2 if REST_N else 1)

    first, steps = _share((images + BLOCK_K - 1) // BLOCK_K * count_h * count_w)
    line = tl.maximum(count_w, 1)
    plane = tl.maximum(count_h * count_w, 1)
    image = tl.where(
        steps > 0, first // plane * BLOCK_K, images
    )  # without a step there is one of zeros, behind the last image
    h, w = first % plane // line, first % line
    from_y = ((first_h + h) * OW + first_w + w) * PITCH_Y + group * OUTPUTS + output
    at_h = (first_h + h) * ROWS[3] - ROWS[4] + tap_h * ROWS[5]
    at_w = (first_w + w) * COLUMNS[3] - COLUMNS[4] + tap_w * COLUMNS[5]
    from_x = (at_h * WIDTH + at_w) * PITCH_X + group * CHANNELS + channel
    for _ in tl.range(0, tl.maximum(steps, 1)):  # with a bare count and 8 warps ptxas serialises every wgmma
        a = (tl.trans(dy.load([image, from_y])),)
        if REST_M:
            a += (tl.trans(dy_rest.load([image, from_y + BLOCK_M])),)
        new = ()
        for t in tl.static_range(TAPS):
            row = image
            if TAPS > 1:
                on_map = (at_w + t * COLUMNS[5] >= 0) & (at_w + t * COLUMNS[5] < WIDTH)
                row = tl.where(on_map, image, images)
            new += _accumulated(acc, a, x.load([row, from_x + t * COLUMNS[5] * PITCH_X]), t * PARTS, PARTS_M)
            if REST_N:
                b = x_rest.load([row, from_x + t * COLUMNS[5] * PITCH_X + BLOCK_N])
                new += _accumulated(acc, a, b, t * PARTS + PARTS_M, PARTS_M)
        acc = new
        w += 1
        next_line = (w == count_w).to(tl.int32)
        w -= next_line * count_w
        h += next_line
        next_image = (h == count_h).to(tl.int32)
        h -= next_image * count_h
        image += next_image * BLOCK_K
        from_y += PITCH_Y + (next_line * (OW - count_w) - next_image * count_h * OW) * PITCH_Y
        at_w += COLUMNS[3] - next_line * count_w * COLUMNS[3]
        from_x += COLUMNS[3] * PITCH_X - next_line * count_w * COLUMNS[3] * PITCH_X
        from_x += (next_line - next_image * count_h) * (ROWS[3] * WIDTH * PITCH_X)

    LINE: tl.constexpr = ROWS[2] * COLUMNS[2] * CHANNELS
    partial += (tl.program_id(1) * PITCH_Y + group * OUTPUTS).to(tl.int64) * LINE + (
        tap_h * COLUMNS[2] + tap_w
    ) * CHANNELS
    rows = output + tl.arange(0, BLOCK_M)
    columns = channel + tl.arange(0, BLOCK_N)
    for t in tl.static_range(TAPS):
        channels = tl.where(tap_w + t < COLUMNS[2], CHANNELS, 0)
        _store_share(acc[t * PARTS], partial + t * CHANNELS, rows, columns, OUTPUTS, channels, LINE)
        if REST_M:
            more = output + BLOCK_M + tl.arange(0, REST_M)
            _store_share(acc[t * PARTS + 1], partial + t * CHANNELS, more, columns, OUTPUTS, channels, LINE)
        if REST_N:
            others = channel + BLOCK_N + tl.arange(0, REST_N)
            _store_share(acc[t * PARTS + PARTS_M], partial + t * CHANNELS, rows, others, OUTPUTS, channels, LINE)
            if REST_M:
                _store_share(
                    acc[t * PARTS + PARTS_M + 1], partial + t * CHANNELS, more, others, OUTPUTS, channels, LINE
                )


@triton.jit
def weight_rows(
    dy, x, partial, rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
    INNERMOST: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A share of ``dw`` in BLOCK_M output channels of a group and BLOCK_N of its (tap, channel) columns; K is output pixels.

    A lane of K carries its pixel as (image, row, column): a step adds BLOCK_K in that mixed base, a carry at most a digit.
    """
    PITCH_Y: tl.constexpr = OUTPUTS * GROUPS
    PITCH_X: tl.constexpr = CHANNELS * GROUPS
    OH: tl.constexpr = ROWS[1]
    OW: tl.constexpr = COLUMNS[1]
    MAP: tl.constexpr = ROWS[0] * COLUMNS[0]
    LINE: tl.constexpr = ROWS[2] * COLUMNS[2] * CHANNELS
    PIXEL_X: tl.constexpr = PITCH_X if INNERMOST else 1
    PIXEL_Y: tl.constexpr = PITCH_Y if INNERMOST else 1
    STEP_X: tl.constexpr = 1 if INNERMOST else MAP
    STEP_Y: tl.constexpr = 1 if INNERMOST else OH * OW
    BLOCKS_O: tl.constexpr = (OUTPUTS + BLOCK_M - 1) // BLOCK_M
    BLOCKS_N: tl.constexpr = (LINE + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    group = tile // (BLOCKS_O * BLOCKS_N)
    output = tile % BLOCKS_O * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile // BLOCKS_O % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = column // CHANNELS
    ahead_h = tap // COLUMNS[2] * ROWS[5] - ROWS[4]
    ahead_w = tap % COLUMNS[2] * COLUMNS[5] - COLUMNS[4]
    y_column = dy + (group * OUTPUTS + output) * STEP_Y
    x_column = x + (group * CHANNELS + column % CHANNELS) * STEP_X + (ahead_h * COLUMNS[0] + ahead_w) * PIXEL_X

    first, steps = _share((rows + BLOCK_K - 1) // BLOCK_K)
    index = tl.cast(first, INDEX) * BLOCK_K + tl.arange(0, BLOCK_K)
    image = (index // (OH * OW)).to(tl.int64)
    h = (index // OW % OH).to(tl.int32)
    w = (index % OW).to(tl.int32)
    left = (rows - tl.cast(first, INDEX) * BLOCK_K).to(INDEX)
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, tl.maximum(steps, 1)):
        ok = (lane < left) & (steps > 0)
        y_row = image * (PITCH_Y * OH * OW) + (h * OW + w) * PIXEL_Y
        x_row = image * (PITCH_X * MAP) + (h * (ROWS[3] * COLUMNS[0]) + w * COLUMNS[3]) * PIXEL_X
        at_h = (h * ROWS[3])[:, None] + ahead_h[None, :]
        at_w = (w * COLUMNS[3])[:, None] + ahead_w[None, :]
        real = (at_h >= 0) & (at_h < ROWS[0]) & (at_w >= 0) & (at_w < COLUMNS[0])
        real = real & ok[:, None] & (column < LINE)[None, :]
        a = tl.load(y_column[None, :] + y_row[:, None], mask=ok[:, None] & (output < OUTPUTS)[None, :], other=0.0)
        b = tl.load(x_column[None, :] + x_row[:, None], mask=real, other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        left -= BLOCK_K
        w += BLOCK_K % OW
        carry = (w >= OW).to(tl.int32)
        w -= carry * OW
        h += BLOCK_K // OW % OH + carry
        carry = (h >= OH).to(tl.int32)
        h -= carry * OH
        image += BLOCK_K // (OW * OH) + carry

    partial += (tl.program_id(1) * PITCH_Y + group * OUTPUTS).to(tl.int64) * LINE
    _store_share(acc, partial, output, column, OUTPUTS, LINE, LINE)


@triton.jit
def sum_shares(partial, dw, elements, splits, TAPS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """``dw[o, c, t] = Σ_s partial[s, o, t, c]``, in the order of s; one program: BLOCK elements in the order of ``partial``."""
    start, lane, ok = block_of(tl.program_id(0), elements, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    p = partial + start + lane
    for _ in tl.range(0, splits):
        total += tl.load(p, mask=ok, other=0.0)
        p += elements
    index = start.to(tl.int32) + lane
    channel, tap = index % CHANNELS, index // CHANNELS % TAPS
    at = index // (CHANNELS * TAPS) * (CHANNELS * TAPS) + channel * TAPS + tap
    tl.store(dw + at, total.to(dw.dtype.element_ty), mask=ok)
