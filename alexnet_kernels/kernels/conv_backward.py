"""The gradients of a convolution for its input (dgrad) and its weight (wgrad): what is launched, in which tiles, and why.

The kernels and the mathematics are in ``_conv_dgrad`` and ``_conv_wgrad``. Both have a form for many images, ``tile``, whose
tiles are images at one pixel, and one for everything else, ``rows``. ``tile`` takes 16-bit channels_last tensors whose images
begin at multiples of 16 bytes, and batches that fill its tiles; the data gradient also wants output channels a group in
multiples of 16. Only what is asked for is computed, and equal inputs give equal bits: no atomics, sums in a fixed order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._conv_dgrad import input_rows, input_tile
from ._conv_geometry import Axis, Problem, halves
from ._conv_wgrad import sum_shares, weight_rows, weight_tile
from ._launch import Config, Launch, Tile, index_type, run, tuned

# By pass and output x input channels a group. A tile of 192 is two accumulators, 128 and 64; a weight's tile that is wider than
# its channels takes several taps. What a step loads is what limits it: 128 x 256 make 85 FLOP a byte, 192 x 192 96, 128 x 48 35.
TILES = {
    "input 128x48": Tile("tile", 128, 48, 64, 4, 4),
    "input 384x256": Tile("tile", 128, 256, 64, 8, 4),
    "input 192x192": Tile("tile", 128, 192, 64, 8, 4),
    "input 128x192": Tile("tile", 128, 192, 64, 8, 4),
    "weight 128x48": Tile("tile", 128, 240, 64, 8, 3),
    "weight 384x256": Tile("tile", 192, 128, 64, 8, 4),
    "weight 192x192": Tile("tile", 192, 192, 64, 8, 4),
    "weight 128x192": Tile("tile", 128, 192, 64, 8, 4),
    "rows": Tile("rows", 128, 128, 64, 8, 3),
    "rows float32": Tile("rows", 64, 64, 32, 4, 3),
}
SUM = Config(block=256)
FILLED = 0.75  # of a tile's images must exist, or pixels become its rows
MULTIPROCESSORS = 132  # of the GPU for which launches are planned on meta tensors
REFILL = 8  # steps that filling and draining a pipeline costs, and
SHARE = 1.5  # steps that storing and adding one more share costs: estimates from the bytes moved, not yet measured


def _columns(count: int, most: int) -> int:
    """The width of tile up to ``most`` that leaves least of itself empty; of equal ones the widest."""
    return min((b for b in (256, 192, 128, 96, 64, 48, 32, 16) if b <= most), key=lambda b: (-(-count // b) * b, -b))


def _default(kind: str, problem: Problem) -> Tile:
    """The tile for channels that :data:`TILES` does not name."""
    if kind == "input":
        columns = _columns(problem.depth, 256)
        depth = math.gcd(problem.width, 64)
        return Tile("tile", 128, columns, depth, 8 if columns > 128 else 4, 3)
    columns = _columns(problem.depth, 128)
    taps = min(problem.columns.taps, 5, 256 // columns) if columns == problem.depth else 1
    return Tile("tile", 128 if problem.width > 64 else 64, columns * taps, 64, 8, 3)


def _fill(count: int, block: int) -> float:
    return count / max(triton.cdiv(count, block) * block, 1)


def tile_of(kind: str, problem: Problem, plain: bool, device: torch.device) -> Tile:
    """The tile that ``kind``, "input" or "weight", is computed in; ``plain`` says whether descriptors can be had."""
    table = TILES | tuned("conv_backward", device, Tile)
    tile = table.get(f"{kind} {problem.width}x{problem.depth}") or _default(kind, problem)
    if plain and tile.form == "tile" and (kind == "weight" or tile.block_k >= 16):
        if kind == "input":
            heights = [replace(tile, block_m=m) for m in (tile.block_m, 64) if m <= tile.block_m]
            fills = [t for t in heights if _fill(problem.images, t.block_m) >= FILLED]
        else:
            depths = [replace(tile, block_k=k) for k in (64, 32, 16) if k <= tile.block_k]
            fills = [t for t in depths if _fill(problem.images, t.block_k) >= FILLED]
        if fills:
            return fills[0]
    tile = table["rows float32" if problem.itemsize == 4 else "rows"]
    if kind == "input":
        return replace(tile, block_n=min(tile.block_n, max(16, triton.next_power_of_2(problem.depth))))
    return replace(tile, block_m=64 if problem.width <= 64 else tile.block_m)


def reaching(axis: Axis) -> tuple[int, ...]:
    """The AXIS of the data gradient: ``axis.constants``, then how many taps, and how many output positions, lie between two
    taps that reach one input position, and the inverse of the second modulo the first."""
    common = math.gcd(axis.stride, axis.dilation)
    step, back = axis.stride // common, axis.dilation // common
    return *axis.constants, step, back, pow(back, -1, step) if step > 1 else 0


def _layout(*tensors: Tensor) -> torch.memory_format:
    """The layout of the first tensor that has only one; a tensor that has neither is copied, one that has both fits either."""
    for x in tensors:
        innermost = x.is_contiguous(memory_format=torch.channels_last)
        if innermost != x.is_contiguous():
            return torch.channels_last if innermost else torch.contiguous_format
    both = tensors[0].is_contiguous()
    return torch.channels_last if both else torch.contiguous_format


def _matrix(x: Tensor) -> Tensor:
    """A channels_last tensor as the matrix [N, H·W·C] that it is in memory."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], math.prod(x.shape[1:]))


def _describable(*matrices: Tensor) -> bool:
    """Whether the copy engine takes them: a 16-bit type, rows that begin at multiples of 16 bytes, at least one row."""
    return all(
        m.element_size() == 2 and m.data_ptr() % 16 == 0 and m.shape[1] % 8 == 0 and m.shape[0] > 0 for m in matrices
    )


def _constants(problem: Problem) -> dict[str, Any]:
    sizes = {"CHANNELS": problem.depth, "OUTPUTS": problem.width, "GROUPS": problem.groups}
    return {"ROWS": problem.rows.constants, "COLUMNS": problem.columns.constants} | sizes


def _input_grid(problem: Problem, tile: Tile) -> tuple[int, int, int]:
    """Programs along pixels, columns of all groups, and images (tile) or residue classes (rows)."""
    axes = (problem.rows, problem.columns)
    columns = triton.cdiv(problem.depth, tile.block_n) * problem.groups
    if tile.form == "tile":
        return problem.rows.size * problem.columns.size, columns, triton.cdiv(problem.images, tile.block_m)
    classes = math.prod(min(a.size, a.stride) for a in axes)
    return triton.cdiv(problem.images * _places(problem), tile.block_m), columns, classes


def _places(problem: Problem) -> int:
    """Pixels of an image in the largest residue class."""
    return math.prod(triton.cdiv(a.size, a.stride) for a in (problem.rows, problem.columns))


def plan_input(
    dy: Tensor, packed: Tensor, mask: Tensor | None, dx: Tensor, problem: Problem, precision: str, summed: bool
) -> tuple[Launch, Tensor]:
    """The launch that writes ``dx`` from the gradient and the packed weight [O, KH·KW·C/g], all in the layout of ``dx``, and
    the partial sums [programs, C] of ``dx`` that it writes too if ``summed``."""
    innermost = dx.is_contiguous(memory_format=torch.channels_last)
    tile = tile_of("input", problem, innermost and _describable(_matrix(dy), packed), dy.device)
    grid = _input_grid(problem, tile)
    partial = torch.empty((grid[0] * grid[2] if summed else 0, dx.shape[1]), dtype=torch.float32, device=dx.device)
    out = (dx if mask is None else mask, dx, partial)
    constants = _constants(problem) | {"ROWS": reaching(problem.rows), "COLUMNS": reaching(problem.columns)}
    constants |= {"MASKED": mask is not None, "SUMMED": summed}
    wide, rest = halves(tile.block_n)
    args: tuple[Any, ...]
    if tile.form == "tile":
        kernel, args = input_tile, (*out, TensorDescriptor.from_tensor(_matrix(dy), [tile.block_m, tile.block_k]))
        args += tuple(TensorDescriptor.from_tensor(packed, [tile.block_k, n]) for n in (wide, rest or wide))
        args += (problem.images,)
        constants |= {"INDEX": index_type(tile.block_m * math.prod(dx.shape[1:])), "REST_N": rest}
    else:
        rows = problem.images * _places(problem)
        kernel, args = input_rows, (dy, packed, *out, rows)
        constants |= {"INNERMOST": innermost, "PRECISION": precision, "INDEX": index_type(rows + tile.block_m)}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": wide, "BLOCK_K": tile.block_k}
    work = tile.block_m * tile.block_n
    return Launch(kernel, grid, args, constants, tile.num_warps, work, tile.num_stages), partial


def taps_of(problem: Problem, tile: Tile) -> tuple[int, int]:
    """How many taps of a kernel row the tile of a weight gradient takes, and the channels of each."""
    taps = max(1, tile.block_n // problem.depth)
    return taps, tile.block_n // taps


def splits_of(problem: Problem, tile: Tile, device: torch.device) -> int:
    """Into how many shares K is split: where waves of programs, their steps and the shares' own cost are fewest."""
    tiles, steps = _weight_work(problem, tile)
    cuda = device.type == "cuda"
    at_once = torch.cuda.get_device_properties(device).multi_processor_count if cuda else MULTIPROCESSORS
    at_once *= 1 if tile.num_warps == 8 else 2

    def cost(splits: int) -> float:
        return triton.cdiv(tiles * splits, at_once) * (triton.cdiv(steps, splits) + REFILL) + SHARE * splits

    return min(range(1, max(2, min(steps, 64) + 1)), key=cost)


def _weight_work(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Tiles of the weight, and the steps of the longest of them."""
    outputs = triton.cdiv(problem.width, tile.block_m) * problem.groups
    if tile.form == "rows":
        columns = triton.cdiv(problem.reduction, tile.block_n)
        return outputs * columns, triton.cdiv(problem.images * problem.pixels, tile.block_k)
    taps, columns = taps_of(problem, tile)
    tiles = outputs * triton.cdiv(problem.depth, columns)
    tiles *= problem.rows.taps * triton.cdiv(problem.columns.taps, taps)
    return tiles, triton.cdiv(problem.images, tile.block_k) * problem.pixels


def plan_weight(dy: Tensor, x: Tensor, dw: Tensor, problem: Problem, precision: str) -> tuple[Launch, Launch]:
    """The launch that stores the shares of ``dw``, and the one that adds them; ``dy`` and ``x`` have one layout."""
    innermost = x.is_contiguous(memory_format=torch.channels_last)
    plain = innermost and _describable(_matrix(dy), _matrix(x))
    tile = tile_of("weight", problem, plain, dy.device)
    splits = splits_of(problem, tile, dy.device)
    partial = torch.empty((splits, dw.shape[0], problem.reduction), dtype=torch.float32, device=dy.device)
    constants = _constants(problem)
    args: tuple[Any, ...]
    if tile.form == "tile":
        taps, columns = taps_of(problem, tile)
        (tall, more), (wide, rest) = halves(tile.block_m), halves(columns)
        args = (partial,)
        for matrix, sizes in ((_matrix(dy), (tall, more or tall)), (_matrix(x), (wide, rest or wide))):
            args += tuple(TensorDescriptor.from_tensor(matrix, [tile.block_k, size]) for size in sizes)
        args += (problem.images,)
        constants |= {"TAPS": taps, "BLOCK_M": tall, "REST_M": more, "BLOCK_N": wide, "REST_N": rest}
        kernel = weight_tile
    else:
        rows = problem.images * problem.pixels
        args = (dy, x, partial, rows)
        constants |= {"INNERMOST": innermost, "PRECISION": precision, "INDEX": index_type(rows + tile.block_k)}
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        kernel = weight_rows
    constants |= {"BLOCK_K": tile.block_k}
    grid = (_weight_work(problem, tile)[0], splits)
    work = tile.block_m * tile.block_n
    product_ = Launch(kernel, grid, args, constants, tile.num_warps, work, tile.num_stages)
    return product_, _plan_sum(partial, dw, problem)


def _plan_sum(partial: Tensor, dw: Tensor, problem: Problem) -> Launch:
    config = tuned("conv_backward_sum", dw.device).get("sum_shares", SUM)
    taps = problem.rows.taps * problem.columns.taps
    constants = {"TAPS": taps, "CHANNELS": problem.depth, "BLOCK": config.block}
    args = (partial, dw, dw.numel(), partial.shape[0])
    grid = (triton.cdiv(dw.numel(), config.block),)
    return Launch(sum_shares, grid, args, constants, config.num_warps, config.block)


def pack(weight: Tensor) -> Tensor:
    """[O, C/g, KH, KW] as [O, KH·KW·C/g]: taps outside, channels inside; nothing moves for a channels_last weight."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], math.prod(weight.shape[1:])).contiguous()


def input_gradient(
    dy: Tensor, weight: Tensor, x_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, precision: str, mask: Tensor | None = None, with_bias_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``dx`` in the layout of ``dy`` and its dtype, zero where not ``mask > 0`` or NaN (the activation that the input is), and
    the sum of that over all but channels, in ``dy``'s dtype: the gradient of the bias below."""
    problem = Problem.of(x_shape, weight.shape, stride, padding, dilation, groups, dy.element_size())
    layout = _layout(dy) if mask is None else _layout(dy, mask)
    dy = dy.contiguous(memory_format=layout)
    mask = None if mask is None else mask.contiguous(memory_format=layout)
    dx = torch.empty(tuple(x_shape), dtype=dy.dtype, device=dy.device, memory_format=layout)
    launch, partial = plan_input(dy, pack(weight), mask, dx, problem, precision, with_bias_grad)
    run(launch)
    return dx, partial.sum(0).to(dy.dtype) if with_bias_grad else None


def weight_gradient(
    dy: Tensor, x: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, precision: str,
) -> Tensor:  # fmt: skip
    """``dw`` [O, C/g, KH, KW], contiguous, in the dtype of ``dy``; of no images it is zero."""
    problem = Problem.of(x.shape, weight_shape, stride, padding, dilation, groups, dy.element_size())
    layout = _layout(x, dy)
    dy, x = dy.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    dw = torch.empty(tuple(weight_shape), dtype=dy.dtype, device=dy.device)
    for launch in plan_weight(dy, x, dw, problem, precision):
        run(launch)
    return dw
