"""The gradients of a convolution for its input (dgrad) and its weight (wgrad): what is launched, in which tiles, and why.

The kernels and the mathematics are in ``_conv_dgrad`` and ``_conv_wgrad``. Both have a form for many images, ``tile``, whose
tiles are images at one pixel, and one for everything else, ``rows``. ``tile`` takes 16-bit channels_last tensors whose images
begin at multiples of 16 bytes, and batches that fill its tiles; the data gradient also wants output channels a group in
multiples of 16. Only what is asked for is computed, and equal inputs give equal bits: no atomics, sums in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._conv_backward_choice import (
    MULTIPROCESSORS,
    choose,
    input_tiles,
    places,
    row_tiles,
    splits_of,
    taps_of,
    weight_tiles,
)
from ._conv_dgrad import input_rows, input_tile
from ._conv_geometry import Axis, Problem, halves
from ._conv_wgrad import sum_shares, weight_rows, weight_tile
from ._launch import Config, Launch, Tile, index_type, run, tuned
from .conv import pack

FAMILY = "conv_backward"
SUM = Config(block=256)


def reaching(axis: Axis) -> tuple[int, ...]:
    """The AXIS of the data gradient: ``axis.constants``, then how many taps, and how many output positions, lie between two
    taps that reach one input position, and the inverse of the second modulo the first."""
    common = math.gcd(axis.stride, axis.dilation)
    step, back = axis.stride // common, axis.dilation // common
    return *axis.constants, step, back, pow(back, -1, step) if step > 1 else 0


def _layout(*tensors: Tensor) -> torch.memory_format:
    """The layout of the first tensor that has only one: a map of one pixel has both. A tensor that has neither is copied."""
    for x in tensors:
        innermost = x.is_contiguous(memory_format=torch.channels_last)
        if innermost != x.is_contiguous():
            return torch.channels_last if innermost else torch.contiguous_format
    return torch.contiguous_format


def _read_in(layout: torch.memory_format, problem: Problem) -> torch.memory_format:
    """The layout to work in: a copy with channels innermost moves each byte twice, reading planes takes a load an element."""
    return torch.channels_last if problem.depth % 8 == problem.width % 8 == 0 else layout


def _matrix(x: Tensor) -> Tensor:
    """A channels_last tensor as the matrix [N, H·W·C] that it is in memory."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], math.prod(x.shape[1:]))


def _describable(*matrices: Tensor) -> bool:
    """Whether the copy engine takes them: a 16-bit type, rows that begin at multiples of 16 bytes, at least one row."""
    return all(
        m.element_size() == 2 and m.data_ptr() % 16 == 0 and m.shape[1] % 8 == 0 and m.shape[0] > 0 for m in matrices
    )


def _innermost(*tensors: Tensor) -> bool:
    """Whether channels lie innermost in all of them. One alone does not tell: maps of one pixel, or one channel, lie so too."""
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


def _constants(problem: Problem) -> dict[str, Any]:
    sizes = {"CHANNELS": problem.depth, "OUTPUTS": problem.width, "GROUPS": problem.groups}
    return {"ROWS": problem.rows.constants, "COLUMNS": problem.columns.constants} | sizes


def _tile(kind: str, problem: Problem, described: bool, innermost: bool, like: Tensor) -> Tile:
    """The tile that is measured to be best on the GPU of ``like``, or believed to be; on meta tensors the GPU has wgmma."""
    wgmma = not like.is_cuda or torch.cuda.get_device_capability(like.device)[0] in (9, 10)
    best = tuned(FAMILY, like.device, Tile).get(f"{kind} {problem.width}x{problem.depth}")
    return choose(kind, problem, described, innermost, wgmma, best)


def plan_input(
    dy: Tensor, packed: Tensor, mask: Tensor | None, dx: Tensor, problem: Problem, precision: str, summed: bool
) -> tuple[Launch, Tensor]:
    """The launch that writes ``dx`` from the gradient and the packed weight [O, KH·KW·C/g], all in the layout of ``dx``, and
    the partial sums [programs, C] of ``dx`` that it writes too if ``summed``."""
    innermost = _innermost(dy, dx)
    described = innermost and _describable(_matrix(dy), packed)
    tile = _tile("input", problem, described, innermost, dy)
    partial = torch.empty(
        (row_tiles(problem, tile) if summed else 0, dx.shape[1]), dtype=torch.float32, device=dx.device
    )
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
        rows = problem.images * places(problem)
        kernel, args = input_rows, (dy, packed, *out, rows)
        constants |= {"INNERMOST": innermost, "PRECISION": precision, "INDEX": index_type(rows + tile.block_m)}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": wide, "BLOCK_K": tile.block_k}
    grid = (input_tiles(problem, tile),)
    work = tile.block_m * tile.block_n
    return Launch(kernel, grid, args, constants, tile.num_warps, work, tile.num_stages), partial


def plan_weight(dy: Tensor, x: Tensor, dw: Tensor, problem: Problem, precision: str) -> tuple[Launch, Launch]:
    """The launch that stores the shares of ``dw``, and the one that adds them; ``dy`` and ``x`` have one layout."""
    innermost = _innermost(dy, x)
    described = innermost and _describable(_matrix(dy), _matrix(x))
    tile = _tile("weight", problem, described, innermost, dy)
    multiprocessors = (
        torch.cuda.get_device_properties(dy.device).multi_processor_count if dy.is_cuda else MULTIPROCESSORS
    )
    splits = splits_of(problem, tile, multiprocessors)
    partial = torch.empty((splits, dw.shape[0], problem.reduction), dtype=torch.float32, device=dy.device)
    constants = _constants(problem)
    args: tuple[Any, ...]
    if tile.form == "tile":
        taps, columns = taps_of(problem, tile)
        (tall, more), (wide, rest) = halves(tile.block_m), halves(columns)
        args = (partial,)
        for matrix, sizes in ((_matrix(dy), (tall, more or tall)), (_matrix(x), (wide, rest or wide))):
            args += tuple(TensorDescriptor.from_tensor(matrix, [tile.block_k, size]) for size in sizes)
        args += (problem.images, splits)
        constants |= {"TAPS": taps, "BLOCK_M": tall, "REST_M": more, "BLOCK_N": wide, "REST_N": rest}
        kernel = weight_tile
    else:
        rows = problem.images * problem.pixels
        args = (dy, x, partial, rows, splits)
        constants |= {"INNERMOST": innermost, "PRECISION": precision, "INDEX": index_type(rows + tile.block_k)}
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        kernel = weight_rows
    constants |= {"BLOCK_K": tile.block_k}
    grid = (weight_tiles(problem, tile) * splits,)
    work = tile.block_m * tile.block_n
    shares = Launch(kernel, grid, args, constants, tile.num_warps, work, tile.num_stages)
    return shares, plan_sum(partial, dw, problem)


def plan_sum(partial: Tensor, dw: Tensor, problem: Problem) -> Launch:
    """The launch that adds ``partial`` [splits, O, KH·KW·C/g] and writes ``dw``."""
    config = tuned(FAMILY + "_sum", dw.device).get("sum_shares", SUM)
    taps = problem.rows.taps * problem.columns.taps
    constants = {"TAPS": taps, "CHANNELS": problem.depth, "BLOCK": config.block}
    args = (partial, dw, dw.numel(), partial.shape[0])
    grid = (triton.cdiv(dw.numel(), config.block),)
    return Launch(sum_shares, grid, args, constants, config.num_warps, config.block)


def input_gradient(
    dy: Tensor, weight: Tensor, x_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, precision: str, mask: Tensor | None = None, with_bias_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``dx`` in the dtype and layout of ``dy`` (whose maps of one pixel have both: then in the mask's, or the weight's).

    ``mask`` is the activation that the input was, ``relu(z)``: ``dx`` is zero where it is <= 0, so that NaN lets it through.
    Then the sum of ``dx`` over all but channels, in the same dtype, is the gradient of the bias below; it adds fp32 values.
    """
    problem = Problem.of(x_shape, weight.shape, stride, padding, dilation, groups, dy.element_size())
    given = _layout(dy, weight if mask is None else mask, weight)
    layout = _read_in(given, problem)
    dy = dy.contiguous(memory_format=layout)
    mask = None if mask is None else mask.contiguous(memory_format=layout)
    dx = torch.empty(tuple(x_shape), dtype=dy.dtype, device=dy.device, memory_format=layout)
    launch, partial = plan_input(dy, pack(weight), mask, dx, problem, precision, with_bias_grad)
    run(launch)
    dx = dx.contiguous(memory_format=given)
    return dx, partial.sum(0).to(dy.dtype) if with_bias_grad else None


def weight_gradient(
    dy: Tensor, x: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, precision: str,
) -> Tensor:  # fmt: skip
    """``dw`` [O, C/g, KH, KW], contiguous, in the dtype of ``dy``; of no images it is zero."""
    problem = Problem.of(x.shape, weight_shape, stride, padding, dilation, groups, dy.element_size())
    layout = _read_in(_layout(x, dy), problem)
    dy, x = dy.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    dw = torch.empty(tuple(weight_shape), dtype=dy.dtype, device=dy.device)
    for launch in plan_weight(dy, x, dw, problem, precision):
        run(launch)
    return dw


def shipped() -> Iterator[tuple[str, Launch]]:
    """AlexNet's gradients in tiles and in rows, each with a label and planned on meta tensors: for offline compilation.

    Its channels are not read in planes ("nchw"); odd ones are, by the same kernels.
    """
    layers = {"conv2": (96, 27, 256, 5, 2), "conv3": (256, 13, 384, 3, 1), "conv4": (384, 13, 384, 3, 2)}
    layers["conv5"] = (384, 13, 256, 3, 2)
    cases = [(*case, "nhwc", "tf32") for case in product((torch.bfloat16, torch.float16), (128, 256))]
    cases += [(torch.bfloat16, images, "nhwc", "tf32") for images in (8, 64)] + [(torch.bfloat16, 128, "nchw", "tf32")]
    cases += [(torch.float32, 128, *case) for case in product(("nhwc", "nchw"), ("tf32", "tf32x3", "ieee"))]
    for (name, layer), (dtype, images, order, precision) in product(layers.items(), cases):
        channels, size, outputs, taps, groups = layer
        layout = torch.channels_last if order == "nhwc" else torch.contiguous_format
        shapes = ((images, c, size, size) for c in (channels, outputs))
        x, dy = (torch.empty(shape, dtype=dtype, device="meta", memory_format=layout) for shape in shapes)
        w = torch.empty((outputs, channels // groups, taps, taps), dtype=dtype, device="meta")
        same = ((1, 1), (taps // 2, taps // 2), (1, 1), groups)
        problem = Problem.of(x.shape, w.shape, *same, x.element_size())
        where = f"{str(dtype)[6:]} {order} {name} batch {images}"
        where += f" {precision}" if dtype == torch.float32 else ""
        for fused in (False, True):
            launch, _ = plan_input(dy, pack(w), x if fused else None, x, problem, precision, fused)
            yield f"{launch.name} {where}{' mask bias' if fused else ''}", launch
        for launch in plan_weight(dy, x, w, problem, precision):
            yield f"{launch.name} {where}", launch
