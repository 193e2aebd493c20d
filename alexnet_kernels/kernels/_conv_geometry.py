"""A convolution as numbers: what its axes look like, which taps count, and how many multiplications a tile issues."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

from ._launch import Tile


@dataclass(frozen=True)
class Axis:
    """Height or width: input positions, taps of the kernel, and how an output position finds its first input position."""

    size: int
    taps: int
    stride: int
    padding: int
    dilation: int

    @property
    def outputs(self) -> int:
        return (self.size + 2 * self.padding - self.dilation * (self.taps - 1) - 1) // self.stride + 1

    @property
    def constants(self) -> tuple[int, int, int, int, int, int]:
        """What :func:`valid_taps` takes."""
        return self.size, self.outputs, self.taps, self.stride, self.padding, self.dilation

    @functools.cached_property
    def valid(self) -> tuple[int, ...]:
        """For each output position, how many of its taps read inside the map."""
        starts = [o * self.stride - self.padding for o in range(self.outputs)]
        return tuple(sum(0 <= start + t * self.dilation < self.size for t in range(self.taps)) for start in starts)


@dataclass(frozen=True)
class Problem:
    """A convolution of ``images`` maps; ``depth`` input and ``width`` output channels in each of ``groups``."""

    images: int
    depth: int
    width: int
    groups: int
    rows: Axis
    columns: Axis
    itemsize: int

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        weight: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        itemsize: int,
    ) -> Problem:
        """Of an input [N, C, H, W] and a weight [O, C/groups, KH, KW]."""
        rows, columns = (Axis(shape[2 + i], weight[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
        return cls(shape[0], weight[1], weight[0] // groups, groups, rows, columns, itemsize)

    @property
    def pixels(self) -> int:
        """Of one output map."""
        return self.rows.outputs * self.columns.outputs

    @property
    def reduction(self) -> int:
        """Products in one result, those with padding included."""
        return self.rows.taps * self.columns.taps * self.depth

    @property
    def nominal(self) -> int:
        """Multiply-accumulates by the usual count: padding counts as if it were data."""
        return self.images * self.pixels * self.groups * self.width * self.reduction

    def issued(self, tile: Tile) -> int:
        """Multiply-accumulates that tensor cores are asked for: of whole tiles, in whole steps, at the taps that are visited."""
        outputs = _up(self.width, tile.block_n) * self.groups
        if tile.form == "pointer_rows":
            return _up(self.images * self.pixels, tile.block_m) * outputs * _up(self.reduction, tile.block_k)
        steps = self._tile_steps(tile)
        images = tile.block_m if tile.form != "pixel_pair" else 2 * tile.block_m
        return triton.cdiv(self.images, tile.block_m) * images * outputs * steps

    def _tile_steps(self, tile: Tile) -> int:
        """Depth that a block of images runs through, summed over the output pixels or pairs of them."""
        if tile.form == "pixel_pair":
            pairs = triton.cdiv(self.columns.outputs, 2)
            return pairs * sum(max(r, 1) for r in self.rows.valid) * self.columns.taps * self.depth
        total = 0
        for (r, many), (s, times) in (
            (a, b) for a in Counter(self.rows.valid).items() for b in Counter(self.columns.valid).items()
        ):
            merged = tile.form == "group_major"
            length, segments = (s * self.depth, 1) if merged else (self.depth, s)
            step, rest = depths(self.depth, tile.block_k, merged)
            chunks = length // step
            total += many * times * max(r * segments * chunks, 1) * step
            if rest:
                total += many * times * max(r * segments * ((length - chunks * step) // rest), 1) * rest
        return total


def depths(channels: int, block_k: int, merged: bool) -> tuple[int, int]:
    """Depth of a step of the main loop and of the loop over what it leaves of a segment, 0 where it leaves nothing.

    A segment is what lies together in memory: the channels of a group at one tap, or those of a whole kernel row when they are
    ``merged``; its length is a multiple of ``channels``, they are a multiple of 16.
    """
    if channels % block_k == 0:
        return block_k, 0
    step = block_k
    while not merged and step > channels:
        step //= 2
    return step, 16 if channels % step else 0


def halves(block_n: int) -> tuple[int, int]:
    """Columns of a tile as one or two powers of two: 192 is 128 and 64."""
    first = 1 << (block_n.bit_length() - 1)
    return first, block_n - first


def _up(count: int, block: int) -> int:
    return triton.cdiv(count, block) * block


@triton.jit
def valid_taps(position, AXIS: tl.constexpr):
    """The taps of output ``position`` that read inside the map: the first, how many, and the input position of the first.

    Both quotients are of numbers that are not negative: C's division and Python's differ otherwise.
    """
    SIZE: tl.constexpr = AXIS[0]
    TAPS: tl.constexpr = AXIS[2]
    DILATION: tl.constexpr = AXIS[5]
    start = position * AXIS[3] - AXIS[4]
    first = (tl.maximum(-start, 0) + (DILATION - 1)) // DILATION
    end = tl.minimum((tl.maximum(SIZE - start, 0) + (DILATION - 1)) // DILATION, TAPS)
    return first, tl.maximum(end - first, 0), start + first * DILATION
