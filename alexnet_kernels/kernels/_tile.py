"""Device helpers that kernels share: neighbouring channels of many pixels to and from registers, 16 bytes a thread."""

import triton
import triton.language as tl


@triton.jit
def read(p, ok):
    """The values at ``p`` in fp32, zeros where not ``ok``."""
    return tl.load(p, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def columns(tile, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of ``tile`` [BLOCK, WIDTH] as a tuple of [BLOCK], in registers."""
    if WIDTH == 1:
        out = (tl.reshape(tile, (BLOCK,)),)
    else:
        even, odd = tl.split(tl.reshape(tile, (BLOCK, WIDTH // 2, 2)))
        evens = columns(even, BLOCK, WIDTH // 2)
        odds = columns(odd, BLOCK, WIDTH // 2)
        out = ()
        for i in tl.static_range(WIDTH // 2):
            out += (evens[i], odds[i])
    return out


@triton.jit
def read_channels(p, ok, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """``WIDTH`` neighbouring channels from each of ``p`` [BLOCK], as a tuple of fp32 [BLOCK]; zeros where not ``ok``."""
    if WIDTH * p.dtype.element_ty.primitive_bitwidth > 128:  # one thread reads at most 16 bytes at once
        out = read_channels(p, ok, BLOCK, WIDTH // 2) + read_channels(p + WIDTH // 2, ok, BLOCK, WIDTH // 2)
    else:
        out = columns(read(p[:, None] + tl.arange(0, WIDTH)[None, :], ok[:, None]), BLOCK, WIDTH)
    return out


@triton.jit
def write_channels(p, v, ok, BLOCK: tl.constexpr):
    """Store the tuple ``v`` of 8 [BLOCK] as 8 neighbouring channels at each of ``p``."""
    a = tl.join(tl.join(v[0], v[2]), tl.join(v[1], v[3]))
    b = tl.join(tl.join(v[4], v[6]), tl.join(v[5], v[7]))
    if p.dtype.element_ty.primitive_bitwidth == 32:
        near = p[:, None] + tl.arange(0, 4)[None, :]
        tl.store(near, tl.reshape(a, (BLOCK, 4)), mask=ok[:, None])
        tl.store(near + 4, tl.reshape(b, (BLOCK, 4)), mask=ok[:, None])
    else:
        tile = tl.reshape(tl.permute(tl.join(a, b), (0, 3, 1, 2)), (BLOCK, 8))
        tl.store(p[:, None] + tl.arange(0, 8)[None, :], tile.to(p.dtype.element_ty), mask=ok[:, None])


@triton.jit
def split_lane(lane, SIZES: tl.constexpr):
    """Plane (counted from the block's first), row, column and inner vector of each lane in [plane, row, column, inner]."""
    INNER: tl.constexpr = SIZES[2]
    LINE: tl.constexpr = SIZES[1] * INNER
    plane = lane // (SIZES[0] * LINE)
    return plane, lane // LINE % SIZES[0], lane // INNER % SIZES[1], lane % INNER


@triton.jit
def activate(v, bias, BIASED: tl.constexpr, RELU: tl.constexpr, DTYPE: tl.constexpr):
    """``max(0, v + bias)`` as far as asked for, rounded to DTYPE, as fp32; NaN stays NaN."""
    if BIASED:
        v = (v + bias).to(DTYPE).to(tl.float32)
    if RELU:
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return v


@triton.jit
def keep(best, tap, v, t, PLACED: tl.constexpr):
    """The larger of ``best`` (of tap ``tap``) and ``v`` (of the later tap ``t``), by torch's rule."""
    if PLACED:
        wins = (v > best) | (v != v)
        best = tl.where(wins, v, best)
        tap = tl.where(wins, t, tap)
    else:
        best = tl.maximum(best, v, propagate_nan=tl.PropagateNan.ALL)
    return best, tap


@triton.jit
def tile_of(v, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of :func:`columns`: a tuple of WIDTH [BLOCK] as a tile [BLOCK, WIDTH], in registers."""
    if WIDTH == 1:
        out = tl.reshape(v[0], (BLOCK, 1))
    else:
        evens, odds = (), ()
        for i in tl.static_range(WIDTH // 2):
            evens += (v[2 * i],)
            odds += (v[2 * i + 1],)
        both = tl.join(tile_of(evens, BLOCK, WIDTH // 2), tile_of(odds, BLOCK, WIDTH // 2))
        out = tl.reshape(both, (BLOCK, WIDTH))
    return out


@triton.jit
def near(p, WIDTH: tl.constexpr):
    """Pointers to WIDTH neighbouring channels from each of ``p`` [BLOCK] on."""
    return p[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def activated_planes(
    p, bias, first, ok, pixels,
    CHANNELS: tl.constexpr, COUNT: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """``max(0, x + bias)`` in channels ``first`` to ``first + COUNT - 1`` of the pixels ``p``, a tuple; zeros past the group."""
    out = ()
    for i in tl.static_range(COUNT):
        real = first + i < CHANNELS
        v = read(p + tl.cast(first + i, tl.int64) * pixels, ok & real)
        add = tl.load(bias + first + i, mask=real, other=0.0).to(tl.float32) if BIASED else 0.0
        out += (activate(v, add, BIASED, RELU, p.dtype.element_ty),)
    return out


@triton.jit
def read_bias(b, ok, left, right, WIDTH: tl.constexpr):
    """The bias of two channels before ``b`` [BLOCK], of WIDTH from there on, and of two after; zeros where there are none."""
    before = read(near(b - 2, 2), (ok & left)[:, None])
    return before, read(near(b, WIDTH), ok[:, None]), read(near(b + WIDTH, 2), (ok & right)[:, None])
