"""The data gradient of a convolution, an implicit GEMM: ``dx[n, i, c] = Σ_{t, o} dy[n, out(i, t), o] · w[o, t, c]``.

A tap t reaches input pixel i where ``i + padding - t · dilation`` is a multiple of the stride and its quotient, the output
pixel, lies on the map. Of one residue class of i modulo the stride, the taps that divide are an arithmetic progression, the
same for every pixel of the class, and output pixels go down as taps go up: :func:`_reach`. So no product is with a zero that
the stride put between two pixels. Two forms:

tile  a program's rows are BLOCK_M images at *one* input pixel: only taps that reach it are visited, nothing is masked and
      nothing padded. ``dy`` [N, OH·OW·O] and ``w`` [O, taps·C/g] are plain rank-2 descriptors; the weights are as the forward
      packs them, read with K as rows (wgmma takes a 16-bit B operand of either order from shared memory).
rows  a program's rows are BLOCK_M pixels of one residue class, over images; plain pointers, masked where a tap leaves the map.
      It takes any layout, channel count and batch.

The epilogue may apply the ReLU of the layer below (``dx`` is zero where its activation is <= 0; NaN passes) and sum what is
left over the program's rows, in fp32 before rounding: ``partial`` [programs, C], which one reduction in fixed order finishes.
"""

import triton
import triton.language as tl


@triton.jit
def _reach(at, AXIS: tl.constexpr):
    """The first tap that reaches coordinate ``at``, its output coordinate (it may be off the map), and how many taps divide.

    The next tap is ``AXIS[6]`` further, its output coordinate ``AXIS[7]`` back.
    """
    K: tl.constexpr = AXIS[2]
    S: tl.constexpr = AXIS[3]
    DIVISOR: tl.constexpr = S // AXIS[6]  # of stride and dilation, the greatest common one
    padded = at % S + AXIS[4]
    tap = padded // DIVISOR * AXIS[8] % AXIS[6]
    count = tl.where(padded % DIVISOR == 0, (K - tap + AXIS[6] - 1) // AXIS[6], 0)
    return tap, at // S + (padded - tap * AXIS[5]) // S, count


@triton.jit
def _on_map(out, count, AXIS: tl.constexpr):
    """Of ``count`` taps from output coordinate ``out`` down: the first that is on the map, and how many are."""
    OUT: tl.constexpr = AXIS[1]
    BACK: tl.constexpr = AXIS[7]
    first = tl.maximum((out - OUT + BACK) // BACK, 0)
    last = tl.where(out < 0, 0, tl.minimum(count, out // BACK + 1))
    return first, tl.maximum(last - first, 0)


@triton.jit
def _finish(
    acc, offset, ok, channel, mask, dx, partial,
    STEP: tl.constexpr, CHANNELS: tl.constexpr, MASKED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """The epilogue of one accumulator: rows at ``offset``, columns at ``channel`` of the group, STEP elements apart."""
    at = offset[:, None] + channel[None, :] * STEP
    real = ok[:, None] & (channel < CHANNELS)[None, :]
    if MASKED:  # what does not exist reads as 0, so that it counts for nothing
        acc = tl.where(tl.load(mask + at, mask=real, other=0.0) <= 0.0, 0.0, acc)
    elif SUMMED:
        acc = tl.where(real, acc, 0.0)
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=real)
    if SUMMED:
        tl.store(partial + channel, tl.sum(acc, 0), mask=channel < CHANNELS)


@triton.jit
def input_tile(
    mask, dx, partial, dy, w, w_rest, images,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
    MASKED: tl.constexpr, SUMMED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dx`` of BLOCK_M images at one pixel, in BLOCK_N + REST_N channels of one group; K is (tap, output channel).

    A step is BLOCK_K output channels of a tap. Two accumulators share the tile of ``dy`` where the channels are no power of two.
    Programs start from the row PADDING: those of the outer rows, which fewest taps reach, come last and even out the end.
    """
    WIDTH: tl.constexpr = COLUMNS[0]
    PITCH_X: tl.constexpr = CHANNELS * GROUPS
    OW: tl.constexpr = COLUMNS[1]
    PITCH_Y: tl.constexpr = OUTPUTS * GROUPS
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_N + REST_N - 1) // (BLOCK_N + REST_N)
    program, tiles = tl.program_id(0), (images + BLOCK_M - 1) // BLOCK_M
    group, column = program // BLOCKS % GROUPS, program % BLOCKS * (BLOCK_N + REST_N)
    place = program // (BLOCKS * GROUPS)
    image = place % tiles * BLOCK_M
    h, wide = (place // tiles // WIDTH + ROWS[4]) % ROWS[0], place // tiles % WIDTH
    pixel = h * WIDTH + wide
    tap_h, out_h, count_h = _reach(h, ROWS)
    tap_w, out_w, count_w = _reach(wide, COLUMNS)
    skip_h, count_h = _on_map(out_h, count_h, ROWS)
    skip_w, count_w = _on_map(out_w, count_w, COLUMNS)
    tap_h, out_h = tap_h + skip_h * ROWS[6], out_h - skip_h * ROWS[7]
    tap_w, out_w = tap_w + skip_w * COLUMNS[6], out_w - skip_w * COLUMNS[7]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rest = tl.zeros((BLOCK_M, REST_N or 16), tl.float32)
    from_y = (out_h * OW + out_w) * PITCH_Y + group * OUTPUTS
    from_w = (tap_h * COLUMNS[2] + tap_w) * CHANNELS + column
    steps = count_h * count_w * (OUTPUTS // BLOCK_K)
    from_image = tl.where(
        steps > 0, image, images
    )  # a pixel that no tap reaches takes one step of zeros: behind the last row
    from_output = tl.where(steps > 0, group * OUTPUTS, PITCH_Y)
    k, done = 0, 0  # output channels of this tap, taps of this row
    for _ in tl.range(0, tl.maximum(steps, 1)):  # with a bare count and 8 warps ptxas serialises every wgmma
        a = dy.load([from_image, from_y])
        acc = tl.dot(a, w.load([from_output + k, from_w]), acc)
        if REST_N:
            rest = tl.dot(a, w_rest.load([from_output + k, from_w + BLOCK_N]), rest)
        k += BLOCK_K
        next_tap = (k == OUTPUTS) * 1
        done += next_tap
        next_row = (done == count_w).to(tl.int32)
        k -= next_tap * OUTPUTS
        done -= next_row * count_w
        from_y += (
            BLOCK_K
            - next_tap * (OUTPUTS + COLUMNS[7] * PITCH_Y)
            + next_row * (count_w * COLUMNS[7] - ROWS[7] * OW) * PITCH_Y
        )
        from_w += next_tap * COLUMNS[6] * CHANNELS + next_row * (ROWS[6] * COLUMNS[2] - count_w * COLUMNS[6]) * CHANNELS

    row = tl.arange(0, BLOCK_M)
    ok = row < images - image
    start = image.to(tl.int64) * (ROWS[0] * WIDTH * PITCH_X) + (pixel * PITCH_X + group * CHANNELS)
    mask += start
    dx += start
    offset = row.to(INDEX) * (ROWS[0] * WIDTH * PITCH_X)
    partial += place.to(tl.int64) * PITCH_X + group * CHANNELS
    channel = column + tl.arange(0, BLOCK_N)
    _finish(acc, offset, ok, channel, mask, dx, partial, 1, CHANNELS, MASKED, SUMMED)
    if REST_N:
        channel = column + BLOCK_N + tl.arange(0, REST_N)
        _finish(rest, offset, ok, channel, mask, dx, partial, 1, CHANNELS, MASKED, SUMMED)


@triton.jit
def input_rows(
    dy, w, mask, dx, partial, rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
    INNERMOST: tl.constexpr, MASKED: tl.constexpr, SUMMED: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dx`` of BLOCK_M pixels of one residue class, in BLOCK_N channels of one group; K is (tap, output channel).

    INNERMOST says whether channels are. A class has as many places as the largest one; those off the map are not stored.
    """
    PITCH_X: tl.constexpr = CHANNELS * GROUPS
    PITCH_Y: tl.constexpr = OUTPUTS * GROUPS
    MAP: tl.constexpr = ROWS[0] * COLUMNS[0]
    OUT: tl.constexpr = ROWS[1] * COLUMNS[1]
    PLACES_W: tl.constexpr = (COLUMNS[0] + COLUMNS[3] - 1) // COLUMNS[3]
    PLACES: tl.constexpr = (ROWS[0] + ROWS[3] - 1) // ROWS[3] * PLACES_W
    PIXEL_X: tl.constexpr = PITCH_X if INNERMOST else 1
    PIXEL_Y: tl.constexpr = PITCH_Y if INNERMOST else 1
    STEP_X: tl.constexpr = 1 if INNERMOST else MAP
    STEP_Y: tl.constexpr = 1 if INNERMOST else OUT
    CLASSES_W: tl.constexpr = min(COLUMNS[0], COLUMNS[3])
    block = tl.program_id(1)
    blocks = tl.num_programs(1) // GROUPS
    group, column = block // blocks, block % blocks * BLOCK_N
    tap_h, base_h, count_h = _reach(tl.program_id(2) // CLASSES_W, ROWS)
    tap_w, base_w, count_w = _reach(tl.program_id(2) % CLASSES_W, COLUMNS)
    index = tl.cast(tl.program_id(0), INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = (index % PLACES).to(tl.int32)
    image = (index // PLACES).to(tl.int64)
    h = place // PLACES_W * ROWS[3] + tl.program_id(2) // CLASSES_W
    wide = place % PLACES_W * COLUMNS[3] + tl.program_id(2) % CLASSES_W
    ok = (index < rows) & (h < ROWS[0]) & (wide < COLUMNS[0])
    out_h, out_w = place // PLACES_W + base_h, place % PLACES_W + base_w
    y_row = dy + image * (PITCH_Y * OUT) + (out_h * COLUMNS[1] + out_w) * PIXEL_Y + group * OUTPUTS * STEP_Y
    output = tl.arange(0, BLOCK_K)
    channel = column + tl.arange(0, BLOCK_N)
    TAPS: tl.constexpr = ROWS[2] * COLUMNS[2]
    w_row = w + tl.cast(group * OUTPUTS + output, tl.int64)[:, None] * (TAPS * CHANNELS) + channel[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    back_h, back_w, k = 0, 0, 0  # coordinates gone back, output channels of this tap
    tap = tap_h * COLUMNS[2] + tap_w
    steps = count_h * count_w * ((OUTPUTS + BLOCK_K - 1) // BLOCK_K)
    for _ in tl.range(0, tl.maximum(steps, 1)):
        r, c = out_h - back_h, out_w - back_w
        hit = ok & (r >= 0) & (r < ROWS[1]) & (c >= 0) & (c < COLUMNS[1]) & (steps > 0)
        shift = (back_h * COLUMNS[1] + back_w) * PIXEL_Y - k * STEP_Y
        a_ok = hit[:, None]
        b_ok = (channel < CHANNELS)[None, :] & (steps > 0)  # without a step the first tap may lie outside the kernel
        if OUTPUTS % BLOCK_K != 0:
            a_ok = a_ok & (output < OUTPUTS - k)[None, :]
            b_ok = b_ok & (output < OUTPUTS - k)[:, None]
        a = tl.load(y_row[:, None] + (output * STEP_Y)[None, :] - shift, mask=a_ok, other=0.0)
        b = tl.load(w_row + k * (TAPS * CHANNELS) + tap * CHANNELS, mask=b_ok, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        k += BLOCK_K
        next_tap = (k >= OUTPUTS) * 1
        k -= next_tap * k
        back_w += next_tap * COLUMNS[7]
        next_row = (back_w == count_w * COLUMNS[7]).to(tl.int32)
        back_w -= next_row * back_w
        back_h += next_row * ROWS[7]
        tap += next_tap * COLUMNS[6] + next_row * (ROWS[6] * COLUMNS[2] - count_w * COLUMNS[6])

    offset = image * (PITCH_X * MAP) + (h * COLUMNS[0] + wide) * PIXEL_X + group * CHANNELS * STEP_X
    partial += (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * PITCH_X + group * CHANNELS
    _finish(acc, offset, ok, channel, mask, dx, partial, STEP_X, CHANNELS, MASKED, SUMMED)
