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
