"""Which tile computes a convolution: the built-in configurations as data, and a plain function of shape and type over them."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import triton

from ._conv_geometry import Problem, depths
from ._launch import Tile

SHARED_BYTES = 232_448  # a block may ask for, sm_90
WASTE = 1.18  # most multiplications issued for one of the usual count

# In order of preference, block_k in 16-bit elements. 4 warps and 96 KB: two blocks an SM hide each other's ends.
CONFIGS = {
    "batch_tile": (
        Tile("batch_tile", 128, 128, 64, num_warps=4, num_stages=3),
        Tile("batch_tile", 128, 192, 64, num_warps=8, num_stages=4),
        Tile("batch_tile", 64, 128, 64, num_warps=4, num_stages=4),
        Tile("batch_tile", 64, 192, 64, num_warps=4, num_stages=3),
        Tile("batch_tile", 128, 64, 64, num_warps=4, num_stages=4),
        Tile("batch_tile", 128, 96, 64, num_warps=4, num_stages=3),
        Tile("batch_tile", 64, 64, 64, num_warps=4, num_stages=4),
        Tile("batch_tile", 64, 32, 64, num_warps=4, num_stages=4),
        Tile("batch_tile", 64, 16, 64, num_warps=4, num_stages=4),
    ),
    "pixel_pair": (
        Tile("pixel_pair", 128, 128, 32, num_warps=8, num_stages=3),
        Tile("pixel_pair", 128, 128, 16, num_warps=8, num_stages=3),
        Tile("pixel_pair", 64, 128, 32, num_warps=4, num_stages=3),
        Tile("pixel_pair", 128, 64, 32, num_warps=4, num_stages=3),
        Tile("pixel_pair", 64, 64, 16, num_warps=4, num_stages=3),
        Tile("pixel_pair", 64, 16, 16, num_warps=4, num_stages=3),
    ),
    "pointer_rows": (
        Tile("pointer_rows", 128, 128, 64, num_warps=4, num_stages=3),
        Tile("pointer_rows", 128, 64, 64, num_warps=4, num_stages=3),
        Tile("pointer_rows", 64, 64, 64, num_warps=4, num_stages=4),
        Tile("pointer_rows", 64, 32, 64, num_warps=4, num_stages=4),
        Tile("pointer_rows", 64, 16, 64, num_warps=4, num_stages=4),
    ),
    # single elements at a time, or no tensor cores, or three products by way of registers: what fits into registers
    "pointer_rows small": (
        Tile("pointer_rows", 64, 64, 32, num_warps=4, num_stages=3),
        Tile("pointer_rows", 64, 32, 32, num_warps=4, num_stages=3),
        Tile("pointer_rows", 64, 16, 32, num_warps=4, num_stages=3),
    ),
}
CONFIGS["group_major"] = tuple(replace(tile, form="group_major") for tile in CONFIGS["batch_tile"])
_PROCESSORS = 132  # of an H100 or H200: fewer programs than these, and smaller tiles are better


def shared_bytes(problem: Problem, tile: Tile) -> int:
    """Shared memory of the main loop of a tile: the operands of a step, as often as steps are in flight."""
    operands = tile.block_m + tile.block_n
    depth = tile.block_k
    if tile.form == "pixel_pair":
        operands += problem.columns.taps * operands - tile.block_n
    elif tile.form != "pointer_rows":
        depth, _ = depths(problem.depth, tile.block_k, tile.form == "group_major")
    return tile.num_stages * operands * depth * problem.itemsize


def why_not(problem: Problem, tile: Tile, precision: str) -> str | None:
    """Why ``tile`` cannot compute ``problem``, or None; ``precision`` matters for fp32."""
    if tile.form == "pointer_rows":
        return None
    if problem.depth % 16:
        return f"{problem.depth} channels a group are no multiple of 16"
    if problem.itemsize == 4 and precision != "tf32":
        return f"precision {precision} goes through registers, which pointer rows do in smaller tiles"
    if tile.form == "group_major" and problem.columns.dilation != 1:
        return f"dilation {problem.columns.dilation} parts the taps of a kernel row"
    if tile.form == "pixel_pair":
        if problem.columns.stride != problem.columns.dilation:
            return (
                f"stride {problem.columns.stride} is not dilation {problem.columns.dilation}: two pixels share no input"
            )
        if problem.depth % tile.block_k:
            return f"{problem.depth} channels a group are no multiple of block_k = {tile.block_k}"
    if shared_bytes(problem, tile) > SHARED_BYTES - 1024:
        return f"{shared_bytes(problem, tile)} bytes of shared memory are too many"
    return None


def programs(problem: Problem, tile: Tile) -> int:
    """The grid of a launch: tiles of a group's output channels innermost, then groups, pixels, images."""
    columns = triton.cdiv(problem.width, tile.block_n) * problem.groups
    if tile.form == "pointer_rows":
        return columns * triton.cdiv(problem.images * problem.pixels, tile.block_m)
    pixels = problem.pixels
    if tile.form == "pixel_pair":
        pixels = problem.rows.outputs * triton.cdiv(problem.columns.outputs, 2)
    return columns * pixels * triton.cdiv(problem.images, tile.block_m)


def choose(problem: Problem, precision: str = "tf32", form: str | None = None, described: bool = True) -> Tile:
    """The built-in tile for a problem: of the first form that issues at most ``WASTE`` times the usual multiplications.

    ``form`` asks for one; ``described`` says whether descriptors can read x: an image is dense, its channels innermost, and
    images begin at multiples of 16 bytes.

    Raises:
        ValueError: the form that is asked for cannot take the problem.
    """
    if form is not None:
        return _best(form, problem, precision, described)
    alone = problem.groups == 1 and problem.depth % (128 // problem.itemsize) != 0
    for name in ("group_major", "batch_tile") if alone else ("batch_tile",):
        with contextlib.suppress(ValueError):
            tile = _best(name, problem, precision, described)
            if problem.issued(tile) <= WASTE * problem.nominal:
                return tile
    return _best("pointer_rows", problem, precision, described)


def _best(form: str, problem: Problem, precision: str, described: bool) -> Tile:
    """Of the tiles of a form, the first that issues within 5 % of the least and fills the GPU, or else the smallest of them."""
    if form not in CONFIGS:
        raise ValueError(f"form={form!r} is none of {', '.join(name for name in CONFIGS if ' ' not in name)}")
    tiles = _tiles(form, problem, precision)
    reasons = [why_not(problem, tile, precision) for tile in tiles]
    if not described and form != "pointer_rows":
        reasons = ["x is not dense with its channels innermost, or something is not aligned to 16 bytes"] * len(tiles)
    fit = [tile for tile, reason in zip(tiles, reasons, strict=True) if reason is None]
    if not fit:
        raise ValueError(f"form={form!r} cannot take this convolution: {reasons[-1]}; form='pointer_rows' takes any")
    least = min(problem.issued(tile) for tile in fit)
    near = [tile for tile in fit if problem.issued(tile) <= 1.05 * least]
    filling = [tile for tile in near if programs(problem, tile) >= _PROCESSORS]
    return filling[0] if filling else max(near, key=lambda tile: programs(problem, tile))


def _tiles(form: str, problem: Problem, precision: str) -> list[Tile]:
    """The built-in tiles of a form, for the type of the problem."""
    awkward = problem.depth % 8 or (problem.itemsize == 4 and precision != "tf32")
    name = "pointer_rows small" if form == "pointer_rows" and awkward else form
    return [replace(tile, block_k=max(16, tile.block_k * 2 // problem.itemsize)) for tile in CONFIGS[name]]


def name_of(problem: Problem, tile: Tile, precision: str) -> str:
    """Under which name the tuned table may replace ``tile``: many images or few, the channels and taps, the type."""
    size = "few" if tile.form == "pointer_rows" else "many"
    kind = f"{problem.itemsize * 8} bits" if problem.itemsize == 2 else precision
    return f"{size} {problem.depth}x{problem.rows.taps}x{problem.columns.taps}-{problem.width} {kind}"
