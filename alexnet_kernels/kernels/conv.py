"""Convolution with bias and ReLU, an implicit GEMM.

``y[n, o, p] = max(0, b_o + Σ_{t, c} x[n, c, p·stride - padding + t·dilation] w[o, t, c])``, the channels c of the group of o.

Sums are fp32; bias and ReLU are applied to them before the one rounding. Nothing is saved: backward needs x, w and y. How the
rows of a tile are formed is its form; :func:`choose` takes the first that can and wastes little:

group_major   a tile's rows are images at one output pixel, and the channels of all taps of a kernel row lie together in memory:
              of an ordinary channels_last x where there is one group, or of a buffer [groups, N, H, W, C/groups] that its owner
              passes to :func:`forward_group_major`. For channel counts that do not fill a step (48)
batch_tile    the same rows, taps one by one: any channels_last x, 16·m channels a group, from about 64 images on
pixel_pair    images at two neighbouring output pixels, which share inputs and weights: more arithmetic a byte, fewer tiles. Only
              where it is asked for, by name or by the tuned table, and only on sm_90
pointer_rows  a tile's rows are output pixels, over images: everything else, by strides and with masks; everything before sm_90

An NCHW x with 8·m channels a group is copied to channels_last and y back, which costs less than reading two bytes at a time;
one with other channel counts is read as it is. fp32 is multiplied as ``precision`` says, always explicitly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._conv_choice import CONFIGS, choose, name_of, programs, shared_bytes, why_not
from ._conv_geometry import Problem, depths, halves
from ._conv_rows import pointer_rows
from ._conv_tiles import batch_tile, pixel_pair
from ._launch import Launch, Tile, index_type, run, tuned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = ("tf32", "tf32x3", "ieee")


def pack(weight: Tensor) -> Tensor:
    """``weight`` [O, C/groups, KH, KW] as [O, KH·KW·C/groups], channels innermost: a view of a channels_last one."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous()


def supports(x: Tensor, weight: Tensor) -> str | None:
    """Why these kernels cannot take ``x`` and ``weight``, or None."""
    if x.dtype not in DTYPES:
        return f"the Triton kernels take fp32, fp16 and bf16, not {x.dtype}"
    if weight.dtype != x.dtype:
        return f"x is {x.dtype} but weight is {weight.dtype}; the Triton kernels multiply one dtype"
    if x[:1].numel() >= 2**31:
        return f"an image of {x[:1].numel()} elements; the Triton kernels index an image by 31 bits"
    return None


def _dense(x: Tensor) -> bool:
    """Whether each image is [H, W, C] without gaps, whatever lies between images; a dimension of one has any stride."""
    _, channels, height, width = x.shape
    sizes, wanted = (channels, height, width), (1, width * channels, channels)
    return all(size == 1 or s == w for size, s, w in zip(sizes, x.stride()[1:], wanted, strict=True))


def _described(x: Tensor, packed: Tensor, problem: Problem) -> bool:
    """Whether descriptors can read both: everything begins at multiples of 16 bytes, an image is dense, its channels innermost.

    Without a TMA unit (before sm_90) Triton 3.6 lowers a descriptor of 16-bit elements to loads of one element each.
    """
    row = problem.depth * problem.groups * problem.rows.size * problem.columns.size
    pitch = x.stride(0) if x.shape[0] > 1 else row
    begins = (x.data_ptr(), packed.data_ptr(), *(n * x.element_size() for n in (pitch, row, problem.reduction)))
    aligned = all(begin % 16 == 0 for begin in begins)
    return _dense(x) and aligned and pitch >= row and _generation(x.device) >= 9


@functools.cache
def _generation(device: torch.device) -> int:
    """The major compute capability; without a GPU, that of an H100."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def plan(
    x: Tensor, packed: Tensor, bias: Tensor | None, y: Tensor, problem: Problem, relu: bool, precision: str,
    form: str | None = None,
) -> Launch:  # fmt: skip
    """The launch that writes ``y``. ``x`` is [N, C, H, W] of any strides, or [groups, N, H, W, C/groups], dense, for the form
    group_major; ``y`` is dense. What the tuned table names replaces the built-in tile where it can compute the problem."""
    described = _described(x, packed, problem) if x.dim() == 4 else packed.data_ptr() % 16 == 0
    tile = tile_of(problem, precision, form, described, x.device)
    return launch_of(x, packed, bias, y, problem, relu, precision, tile)


@functools.lru_cache(maxsize=4096)
def tile_of(problem: Problem, precision: str, form: str | None, described: bool, device: torch.device) -> Tile:
    """:func:`choose`, and the tuned table of the device; kept, for counting what every tile would issue takes 2 ms."""
    tile = choose(problem, precision, form, described)
    if tile.form == "pixel_pair" and _generation(device) != 9:
        raise ValueError(f"form='pixel_pair' on {device}: Triton 3.6 compiles it for sm_90 only; use form='batch_tile'")
    if form is None:
        better = tuned("conv", device, Tile).get(name_of(problem, tile, precision))
        # Group-major maps are another layout of x, which no shape tells: a table cannot ask for it.
        allowed = ("batch_tile", "pixel_pair", "pointer_rows") if described else ("pointer_rows",)
        if better is not None and better.form in allowed and why_not(problem, better, precision) is None:
            return better
    return tile


def launch_of(
    x: Tensor, packed: Tensor, bias: Tensor | None, y: Tensor, problem: Problem, relu: bool, precision: str, tile: Tile
) -> Launch:
    """The launch of a given tile."""
    constants: dict[str, Any] = {
        "ROWS": problem.rows.constants,
        "COLUMNS": problem.columns.constants,
        "CHANNELS": problem.depth,
        "OUTPUTS": problem.width,
        "GROUPS": problem.groups,
        "BIASED": bias is not None,
        "RELU": relu,
        "PRECISION": precision if problem.itemsize == 4 else "tf32",  # 16 bits have one way only
    }
    make = {"pointer_rows": _rows, "pixel_pair": _pair}.get(tile.form, _batch)
    kernel, args, more = make(x, packed, y, problem, tile)
    work = tile.block_m * tile.block_n * (2 if tile.form == "pixel_pair" else 1)
    args = (y, y if bias is None else bias.contiguous(), *args)
    grid = (programs(problem, tile),)
    return Launch(kernel, grid, args, constants | more, tile.num_warps, work, tile.num_stages)


_Parts = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments after y and bias, constants of its own


def _rows(x: Tensor, packed: Tensor, y: Tensor, problem: Problem, tile: Tile) -> _Parts:
    step = [0 if size == 1 else s for size, s in zip(x.shape, x.stride(), strict=True)]  # nobody steps along one
    places = y.stride()
    vector = math.gcd(16 // problem.itemsize, problem.depth, *(step[i] for i in (0, 2, 3))) if step[1] == 1 else 1
    constants = {
        "BLOCK": (tile.block_m, tile.block_n, tile.block_k, vector),
        "INDEX": index_type(problem.images * problem.pixels + tile.block_m),
    }
    strides = (*step, places[0], places[3], places[1])
    return pointer_rows, (x, packed, problem.images, *strides), constants


def _matrix(x: Tensor, problem: Problem) -> Tensor:
    """``x`` as the matrix of which a tile is a rectangle: images by what lies in one."""
    if x.dim() == 5:
        return x.view(x.shape[0] * x.shape[1], -1)
    row = problem.depth * problem.groups * problem.rows.size * problem.columns.size
    return x.as_strided((x.shape[0], row), (x.stride(0) if x.shape[0] > 1 else row, 1))


def _batch(x: Tensor, packed: Tensor, y: Tensor, problem: Problem, tile: Tile) -> _Parts:
    merged = tile.form == "group_major"
    first, more = halves(tile.block_n)
    step, rest = depths(problem.depth, tile.block_k, merged)
    matrix = _matrix(x, problem)

    def described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
        return TensorDescriptor.from_tensor(tensor, [rows, columns]) if rows and columns else None

    descriptors = [
        described(*d) for k in (step, rest) for d in ((matrix, tile.block_m, k), (packed, first, k), (packed, more, k))
    ]
    constants = {"MERGED": merged, "BLOCK": (tile.block_m, first, more, step, rest)}
    return batch_tile, (*descriptors, problem.images), constants


def _pair(x: Tensor, packed: Tensor, y: Tensor, problem: Problem, tile: Tile) -> _Parts:
    inputs = TensorDescriptor.from_tensor(_matrix(x, problem), [tile.block_m, tile.block_k])
    weights = TensorDescriptor.from_tensor(packed, [tile.block_n, tile.block_k])
    return pixel_pair, (inputs, weights, problem.images), {"BLOCK": (tile.block_m, tile.block_n, tile.block_k)}


# --------------------------------------------------------------------------------------------------------------- running


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, precision: str, form: str | None = None,
) -> Tensor:  # fmt: skip
    """``reference.conv2d_relu``, without the ReLU unless ``relu``, of an ``x`` [N, C, H, W] of any strides.

    The result is channels_last if the channels of ``x`` lie together, else contiguous; one that is both counts as contiguous.
    """
    problem = Problem.of(x.shape, weight.shape, stride, padding, dilation, groups, x.element_size())
    shape = (problem.images, weight.shape[0], problem.rows.outputs, problem.columns.outputs)
    if math.prod(shape[1:]) >= 2**31:
        raise ValueError(f"a result of {math.prod(shape[1:])} elements an image: it is indexed by 31 bits; use torch's")
    last = torch.channels_last if _dense(x) and not x.is_contiguous() else torch.contiguous_format
    copied = not _dense(x) and problem.depth % 8 == 0
    if copied:
        x = x.contiguous(memory_format=torch.channels_last)
    inner = torch.channels_last if _dense(x) else torch.contiguous_format
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=inner)
    if y.numel():
        run(plan(x, pack(weight), bias, y, problem, relu, precision, form))
    return y.contiguous(memory_format=last)


def forward_group_major(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    precision: str,
) -> Tensor:
    """The same of a dense ``x`` [groups, N, H, W, C/groups]: one tower's map after the other. The result is channels_last.

    This layout is never guessed from strides: whoever owns such a buffer says so by calling this.
    """
    groups, images, height, width, depth = x.shape
    if not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(f"x of strides {x.stride()} must be contiguous and begin at a multiple of 16 bytes; copy it")
    problem = Problem.of(
        (images, groups * depth, height, width), weight.shape, stride, padding, (1, 1), groups, x.element_size()
    )
    shape = (images, weight.shape[0], problem.rows.outputs, problem.columns.outputs)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel():
        run(plan(x, pack(weight), bias, y, problem, relu, precision, "group_major"))
    return y


# -------------------------------------------------------------------------------------------------------------- shipping

# input channels, input size, output channels, kernel, padding, groups: conv2 to conv5 in the paper's network, in one of its
# towers where that differs, and in torchvision's
LAYERS = {
    "paper conv2": (96, 27, 256, 5, 2, 2),
    "paper conv3": (256, 13, 384, 3, 1, 1),
    "paper conv4": (384, 13, 384, 3, 1, 2),
    "paper conv5": (384, 13, 256, 3, 1, 2),
    "tower conv2": (48, 27, 128, 5, 2, 1),
    "tower conv3": (256, 13, 192, 3, 1, 1),
    "tower conv4": (192, 13, 192, 3, 1, 1),
    "tower conv5": (192, 13, 128, 3, 1, 1),
    "torchvision conv2": (64, 27, 192, 5, 2, 1),
    "torchvision conv3": (192, 13, 384, 3, 1, 1),
    "torchvision conv4": (384, 13, 256, 3, 1, 1),
    "torchvision conv5": (256, 13, 256, 3, 1, 1),
}


def _planned(
    layer: tuple[int, ...], images: int, dtype: torch.dtype, precision: str, form: str | None, tile: Tile | None = None
) -> tuple[Problem, Tile, Launch]:
    """The launch of a layer on meta tensors, in the form's best tile or in the one that is given."""
    channels, size, outputs, kernel, padding, groups = layer
    x = torch.empty((images, channels, size, size), dtype=dtype, device="meta", memory_format=torch.channels_last)
    weight = torch.empty((outputs, channels // groups, kernel, kernel), dtype=dtype, device="meta")
    problem = Problem.of(x.shape, weight.shape, (1, 1), (padding, padding), (1, 1), groups, dtype.itemsize)
    y = torch.empty((images, outputs, size, size), dtype=dtype, device="meta", memory_format=torch.channels_last)
    bias = torch.empty(outputs, dtype=dtype, device="meta")
    if form == "group_major":
        x = torch.empty((groups, images, size, size, channels // groups), dtype=dtype, device="meta")
    tile = choose(problem, precision, form) if tile is None else tile
    return problem, tile, launch_of(x, pack(weight), bias, y, problem, True, precision, tile)


def _shipped() -> Iterator[tuple[str, Problem, Tile, Launch]]:
    half, single = torch.bfloat16, torch.float32
    cases: list[tuple[str, torch.dtype, str, int, str | None]] = []
    cases += [(name, half, "tf32", images, None) for name in LAYERS for images in (256, 1)]
    cases += [(name, single, "tf32", 256, None) for name in LAYERS if name.startswith("paper")]
    cases += [("paper conv3", torch.float16, "tf32", images, None) for images in (256, 64)]
    cases += [("paper conv3", single, precision, images, None) for precision in PRECISIONS for images in (256, 1)]
    cases += [
        ("paper conv2", dtype, "tf32", 256, form) for dtype in (half, single) for form in CONFIGS if " " not in form
    ]
    cases += [(f"paper conv{i}", half, "tf32", 256, form) for i in (3, 4, 5) for form in ("pointer_rows", "pixel_pair")]
    for name, dtype, precision, images, form in dict.fromkeys(cases):
        problem, tile, launch = _planned(LAYERS[name], images, dtype, precision, form)
        kind = precision if dtype == single else str(dtype)[6:]
        yield f"{tile.form} {name} {kind} batch {images}", problem, tile, launch
    for name, tiles in CONFIGS.items():  # and every tile there is, on a layer with as many output channels
        for tile in tiles:
            channels, groups = (3, 1) if " " in name else (96, 2)  # conv2's 48 a group, or single elements
            layer = (channels, 27, groups * tile.block_n, 5, 2, groups)
            problem, tile, launch = _planned(layer, 256, half, "tf32", tile.form, tile)
            if why_not(problem, tile, "tf32") is None:
                yield f"{name} {tile.block_m}x{tile.block_n}x{tile.block_k} bfloat16", problem, tile, launch


def shipped() -> Iterator[tuple[str, Launch]]:
    """The built-in launches of the networks' layers, each with a label and planned on meta tensors: for offline compilation."""
    for label, _, _, launch in _shipped():
        yield label, launch


def tiles() -> Iterator[tuple[str, dict[str, Any]]]:
    """The same launches as numbers: their tile, shared memory, programs, loops, and multiplications issued for one of the usual
    count."""
    for label, problem, tile, launch in _shipped():
        loops = 2 if launch.constants["BLOCK"][4:] > (0,) else 1
        figures = {"shared bytes": shared_bytes(problem, tile), "programs": launch.grid[0], "loops": loops}
        yield label, asdict(tile) | figures | {"issued / nominal": problem.issued(tile) / problem.nominal}
