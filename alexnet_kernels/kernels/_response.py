"""Response normalisation in registers: windows of five neighbouring channels, each channel a tensor of a tuple, in fp32.

What the kernels of ``lrn`` and the fused ones share. ``v`` is ``x``, ``w`` is ``g``; ``s = k + scale · Σ x²``.
"""

import triton
import triton.language as tl

from ._launch import block_of
from ._tile import columns, tile_of


@triton.jit
def power_of(s, BETA: tl.constexpr):
    """``s^-beta`` and ``1/s``."""
    if BETA == 0.75:
        r = tl.rsqrt(s)
        power = r * tl.sqrt(r)
        inverse = r * r
    elif BETA == 0.5:
        power = tl.rsqrt(s)
        inverse = power * power
    elif BETA == 1.0:
        power = 1.0 / s
        inverse = power
    elif BETA == 0.0:
        power = tl.full(s.shape, 1.0, tl.float32)
        inverse = 1.0 / s
    else:
        power = tl.exp2(-BETA * tl.log2(s))
        inverse = 1.0 / s
    return power, inverse


@triton.jit
def fives(v, COUNT: tl.constexpr):
    """``out[i] = v[i] + … + v[i + 4]``, paired so that neighbours share their sums of two."""
    out = ()
    for i in tl.static_range(COUNT):
        if i % 2 == 0:
            total = (v[i] + v[i + 1]) + (v[i + 2] + v[i + 3]) + v[i + 4]
        else:
            total = v[i] + (v[i + 1] + v[i + 2]) + (v[i + 3] + v[i + 4])
        out += (total,)
    return out


@triton.jit
def window_powers(v, scale, k, BETA: tl.constexpr, COUNT: tl.constexpr):
    """``s^-beta`` and ``1/s`` of the COUNT channels whose windows ``v`` (COUNT + 4 channels of ``x``) covers."""
    squares = ()
    for i in tl.static_range(COUNT + 4):
        squares += (v[i] * v[i],)
    total = fives(squares, COUNT)
    powers = ()
    inverses = ()
    for i in tl.static_range(COUNT):
        power, inverse = power_of(k + scale * total[i], BETA)
        powers += (power,)
        inverses += (inverse,)
    return powers, inverses


@triton.jit
def terms(v, w, scale, k, BETA: tl.constexpr, COUNT: tl.constexpr):
    """``g s^-beta`` and ``g x s^-(beta+1)`` of COUNT channels; ``w`` is ``g``, ``v`` is ``x`` two channels farther both ways."""
    powers, inverses = window_powers(v, scale, k, BETA, COUNT)
    direct = ()
    term = ()
    for i in tl.static_range(COUNT):
        direct += (w[i] * powers[i],)
        term += (w[i] * v[i + 2] * (powers[i] * inverses[i]),)
    return direct, term


@triton.jit
def eight_forward(v, scale, k, BETA: tl.constexpr):
    """``y`` of 8 channels from ``x`` of them and of two more on both sides."""
    powers, _ = window_powers(v, scale, k, BETA, 8)
    out = ()
    for i in tl.static_range(8):
        out += (v[i + 2] * powers[i],)
    return out


@triton.jit
def eight_backward(v, direct, term, scale, BETA: tl.constexpr):
    """``dx`` of 8 channels from ``x`` and ``g s^-beta`` of them, ``g x s^-(beta+1)`` of them and of two more on both sides."""
    shared = fives(term, 8)
    out = ()
    for i in tl.static_range(8):
        out += (direct[i] - (2.0 * BETA * scale) * v[i] * shared[i],)
    return out


@triton.jit
def sum_of_five(before, middle, after, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The window's sum at each channel of ``middle`` [BLOCK, WIDTH], with the two channels before and the two after."""
    v = columns(before, BLOCK, 2) + columns(middle, BLOCK, WIDTH) + columns(after, BLOCK, 2)
    return tile_of(fives(v, WIDTH), BLOCK, WIDTH)


@triton.jit
def ring_block(pixels, blocks, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's pixels in the first channel of its group: offset of the first, lanes, which exist."""
    program = tl.program_id(0)
    start, lane, ok = block_of(program % blocks, pixels, BLOCK)
    return (program // blocks).to(tl.int64) * CHANNELS * pixels + start, lane, ok


@triton.jit
def write_planes(p, v, first, ok, pixels, CHANNELS: tl.constexpr):
    """Store the tuple ``v`` of 8 as channels ``first`` to ``first + 7`` of the pixels ``p``, except past the group."""
    for i in tl.static_range(8):
        out = p + tl.cast(first + i, tl.int64) * pixels
        tl.store(out, v[i].to(p.dtype.element_ty), mask=ok & (first + i < CHANNELS))
