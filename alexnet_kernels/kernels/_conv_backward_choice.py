"""Which tile computes a gradient of a convolution, into how many shares K is split, and what that issues: data and arithmetic."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import triton

from ._conv_geometry import Axis, Problem
from ._launch import Tile

# For sm_90 and later, by gradient and output x input channels a group, the tallest first. A tile of 192 is two accumulators, 128
# and 64. A weight's tile that is wider than its channels takes several taps. What a step loads limits it: 128 x 256 makes 85 FLOP
# of a byte, 192 x 192 96, 128 x 240 83, 128 x 48 35.
TILES = {
    "input 128x48": Tile("tile", 128, 48, 64, 4, 4),
    "input 384x256": Tile("tile", 128, 256, 64, 8, 4),
    "input 192x192": Tile("tile", 128, 192, 64, 8, 4),
    "input 128x192": Tile("tile", 128, 192, 64, 8, 4),
    "weight 128x48": Tile("tile", 128, 240, 64, 8, 3),
    "weight 384x256": Tile("tile", 192, 128, 64, 8, 4),
    "weight 192x192": Tile("tile", 192, 192, 64, 8, 4),
    "weight 128x192": Tile("tile", 128, 192, 64, 8, 4),
}
ROWS = Tile("rows", 128, 128, 64, 8, 3)
# single elements at a time, or more products an element: what fits into registers
SMALL_ROWS = Tile("rows", 64, 64, 32, 4, 3)
WASTE = 1.18  # most products issued by tiles of images for one issued by rows, which mask them
MULTIPROCESSORS = 132  # of an H100 or H200
REFILL = 8  # steps that filling and draining a pipeline costs, and
SHARE = 1.5  # steps that storing and adding one more share costs: estimates from the bytes moved, to be measured
MOST_SHARES = 64


def _width(count: int, most: int, least: int = 16) -> int:
    """The width of tile up to ``most`` that leaves least of itself empty; of equal ones the widest."""
    return min(
        (b for b in (256, 192, 128, 96, 64, 48, 32, 16) if least <= b <= most), key=lambda b: (-(-count // b) * b, -b)
    )


def _default(kind: str, problem: Problem, wgmma: bool) -> Tile:
    """The tile for channels that :data:`TILES` does not name, or for mma, whose operands take registers too."""
    if kind == "input":
        columns = _width(problem.depth, 256 if wgmma else 128)
        depth = math.gcd(problem.width, 64)
        return Tile("tile", 128, columns, depth, 8 if columns > 128 or not wgmma else 4, 3)
    columns = _width(problem.depth, 128 if wgmma else 96)
    taps = min(problem.columns.taps, 5, (240 if wgmma else 96) // columns) if columns == problem.depth else 1
    return Tile("tile", _width(problem.width, 128, 64), columns * max(taps, 1), 64, 8, 3)


def _shorter(kind: str, tile: Tile, problem: Problem) -> list[Tile]:
    """``tile``, and what it becomes for fewer images."""
    if kind == "weight":
        return [replace(tile, block_k=k) for k in (64, 32, 16) if k <= tile.block_k]
    return [tile] if tile.block_m <= 64 else [tile, replace(tile, block_m=64)]


@functools.lru_cache(maxsize=512)
def choose(
    kind: str, problem: Problem, described: bool, innermost: bool, wgmma: bool, tuned: Tile | None = None
) -> Tile:
    """The tile for the gradient ``kind``, "input" or "weight". ``described``: descriptors can read the tensors; ``innermost``:
    channels are; ``wgmma``: sm_90 or later; ``tuned``: what measurements chose for these channels."""
    rows = ROWS if innermost and problem.itemsize == 2 else SMALL_ROWS
    if kind == "input":
        rows = replace(rows, block_n=min(rows.block_n, max(16, triton.next_power_of_2(problem.depth))))
    else:
        rows = replace(rows, block_m=64 if problem.width <= 64 else rows.block_m)
    tile = tuned or (TILES.get(f"{kind} {problem.width}x{problem.depth}") if wgmma else None)
    tile = tile or _default(kind, problem, wgmma)
    if not described or (kind == "input" and (tile.block_k < 16 or problem.width % tile.block_k)):
        return rows
    tiles = [(issued(kind, problem, t), t) for t in _shorter(kind, tile, problem)]
    least = min(tiles, key=lambda pair: pair[0])[0]
    count, best = next(pair for pair in tiles if pair[0] <= 1.05 * least)
    return best if count <= WASTE * issued(kind, problem, rows) else rows


def taps_of(problem: Problem, tile: Tile) -> tuple[int, int]:
    """How many taps of a kernel row the tile of a weight gradient takes, and the channels of each."""
    taps = max(1, tile.block_n // problem.depth)
    return taps, tile.block_n // taps


def weight_tiles(problem: Problem, tile: Tile) -> int:
    """Tiles of the weight, in all groups."""
    outputs = triton.cdiv(problem.width, tile.block_m) * problem.groups
    if tile.form == "rows":
        return outputs * triton.cdiv(problem.reduction, tile.block_n)
    taps, columns = taps_of(problem, tile)
    across = triton.cdiv(problem.depth, columns) * triton.cdiv(problem.columns.taps, taps)
    return outputs * across * problem.rows.taps


def splits_of(problem: Problem, tile: Tile, multiprocessors: int = MULTIPROCESSORS) -> int:
    """Into how many shares K is split: where waves of programs, their steps and the shares' own cost are least."""
    tiles, steps = weight_tiles(problem, tile), max(_weight_steps(problem, tile), default=0)
    at_once = multiprocessors * (1 if tile.num_warps == 8 else 2)

    def cost(splits: int) -> float:
        return triton.cdiv(tiles * splits, at_once) * (triton.cdiv(steps, splits) + REFILL) + SHARE * splits

    return min(range(1, max(1, min(steps, MOST_SHARES)) + 1), key=cost)


def places(problem: Problem) -> int:
    """Input pixels of an image in the largest residue class modulo the stride."""
    return math.prod(triton.cdiv(a.size, a.stride) for a in (problem.rows, problem.columns))


def classes(problem: Problem) -> int:
    """Residue classes modulo the stride that have a pixel."""
    return math.prod(min(a.size, a.stride) for a in (problem.rows, problem.columns))


def _reach(axis: Axis, on_map: bool) -> list[int]:
    """For each input position, the taps that divide and, if asked, whose output position is on the map."""
    counts = []
    for at in range(axis.size):
        lead = [at + axis.padding - t * axis.dilation for t in range(axis.taps)]
        hits = [v // axis.stride for v in lead if v % axis.stride == 0]
        counts.append(sum(0 <= v < axis.outputs for v in hits) if on_map else len(hits))
    return counts


def _inside(axis: Axis, tap: int) -> set[int]:
    """The output positions whose tap ``tap`` is on the map."""
    return {o for o in range(axis.outputs) if 0 <= o * axis.stride - axis.padding + tap * axis.dilation < axis.size}


def _weight_steps(problem: Problem, tile: Tile) -> list[int]:
    """Steps of K of each (kernel row, block of taps), or in rows of all."""
    if tile.form == "rows":
        return [triton.cdiv(problem.images * problem.pixels, tile.block_k)]
    taps, _ = taps_of(problem, tile)
    down = [len(_inside(problem.rows, t)) for t in range(problem.rows.taps)]
    across = []
    for first in range(0, problem.columns.taps, taps):
        seen = [_inside(problem.columns, first + t) for t in range(taps)]
        inside = set[int]().union(*seen)
        across.append(max(inside) - min(inside) + 1 if inside else 0)
    return [triton.cdiv(problem.images, tile.block_k) * h * w for h in down for w in across]


def issued(kind: str, problem: Problem, tile: Tile, splits: int = 1) -> int:
    """Multiply-accumulates that the tensor cores are asked for, whole tiles and whole steps; ``problem.nominal`` is the usual
    count, in which padding is data. A program takes at least one step."""
    if kind == "weight":
        steps = sum(
            max((s + 1) * count // splits - s * count // splits, 1)
            for count in _weight_steps(problem, tile)
            for s in range(splits)
        )
        blocks = weight_tiles(problem, tile) // len(_weight_steps(problem, tile))
        taps, columns = taps_of(problem, tile) if tile.form == "tile" else (1, tile.block_n)
        return blocks * steps * tile.block_m * taps * columns * tile.block_k
    wide = triton.cdiv(problem.depth, tile.block_n) * tile.block_n * problem.groups
    chunks = triton.cdiv(problem.width, tile.block_k)
    down, across = (_reach(a, tile.form == "tile") for a in (problem.rows, problem.columns))
    if tile.form == "tile":
        tall = triton.cdiv(problem.images, tile.block_m) * tile.block_m
    else:
        tall = triton.cdiv(problem.images * places(problem), tile.block_m) * tile.block_m
        down, across = down[: problem.rows.stride], across[: problem.columns.stride]
    return tall * wide * sum(max(h * w * chunks, 1) for h in down for w in across) * tile.block_k
