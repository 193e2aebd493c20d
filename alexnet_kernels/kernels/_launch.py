"""The one guarded launch every Triton kernel goes through, and the rule for offsets beyond 2^31.

The rule: a program's own block starts at an int64 offset, whatever lies inside the block is int32. A kernel that divides a
flat index does so in :func:`index_type`. Nothing else in ``kernels`` touches the current device.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA's, for x, y and z
# Compiled handles: the second launch of a kind calls what the first one compiled, past Triton's own look-up. They are asked
# for by ALEXNET_KERNELS_HANDLES=1 until a GPU has run them, and only taken with the Triton whose launcher they were written to.
HANDLES = os.environ.get("ALEXNET_KERNELS_HANDLES") == "1" and triton.__version__.startswith("3.6.")
_handles: dict[tuple[Any, ...], Any] = {}
_stages: dict[tuple[Any, ...], int] = {}  # of the launches whose own did not fit into shared memory


@dataclass(frozen=True)
class Config:
    """What tuning may choose: things a program computes, and warps that share them."""

    block: int
    num_warps: int = 4


@dataclass(frozen=True)
class Tile:
    """What tuning may choose of a matrix product: how its rows are formed (``form``, whose meaning is the kernel file's), the
    tile of results a program computes, the depth of a step, warps, and how many steps are in flight."""

    form: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Launch:
    """A kernel and everything it is called with: run it, or compile it for a GPU that is not there.

    ``args`` are positional, tensors first, then descriptors; on meta tensors a launch can be planned and compiled but not run.
    ``elements`` is how many results one program computes. ``num_stages`` says nothing to a kernel whose loops have no product.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    elements: int
    num_stages: int = 3

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.lstrip("_")


_Choice = TypeVar("_Choice", Config, Tile)


def table_of(gpu: str) -> Path:
    """Where the tuned table of a GPU of that name stands, or would."""
    return Path(__file__).with_name("tuned") / (re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@functools.cache
def tuned(family: str, device: torch.device, kind: type[_Choice] = Config) -> dict[str, _Choice]:
    """What ``make tune`` chose on this GPU for the kernels of one file, as ``kind``; empty where it has not run."""
    path = table_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if path is None or not path.exists():
        return {}
    try:
        return {name: kind(**row) for name, row in json.loads(path.read_text())["kernels"].get(family, {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is no tuned table ({error}); the built-in configurations are used", stacklevel=2)
        return {}


def run(launch: Launch) -> None:
    """Launch on the device of the first tensor, which need not be the current one; an empty grid is no launch at all."""
    for axis, blocks, limit in zip("xyz", launch.grid, GRID_LIMITS, strict=False):
        if blocks > limit:
            raise ValueError(f"{launch.name}: grid {axis} = {blocks} is over CUDA's limit of {limit}; split the batch")
    if 0 in launch.grid:
        return
    with torch.cuda.device_of(launch.args[0]):  # does nothing for CPU tensors, which the interpreter takes
        key = handle_key(launch) if HANDLES and _plain(launch) else None
        if key is not None and key in _handles:
            _run_handle(_handles[key], launch)
            return
        compiled = _launched(launch)
        if key is not None:
            _handles[key] = compiled


def _launched(launch: Launch) -> Any:
    """Launch with as many steps in flight as fit: a block has 227 KB of shared memory on sm_90, 163 on sm_80, and 99 on sm_86,
    sm_89 and sm_120. How many that are is found out once for a kind of launch.

    Raises:
        RuntimeError: one step alone does not fit.
    """
    stages = _stages.get(_kind(launch), launch.num_stages) if _stages else launch.num_stages
    while True:
        options = {"num_warps": launch.num_warps, "num_stages": stages}
        try:
            compiled = launch.kernel[launch.grid](*launch.args, **launch.constants, **options)
        except OutOfResources as error:
            if stages == 1:
                what = f"{launch.name} asks for {error.required} of {error.name}, the GPU has {error.limit}"
                raise RuntimeError(f"{what}; use backend 'auto' or 'reference'") from error
            stages -= 1
            continue
        if stages < launch.num_stages:
            _stages[_kind(launch)] = stages
        return compiled


def _kind(launch: Launch) -> tuple[Any, ...]:
    """What shared memory depends on: the kernel, the types it works on, its constants, and what was asked for."""
    bases = (value.base if isinstance(value, TensorDescriptor) else value for value in launch.args)
    dtypes = tuple(base.dtype for base in bases if isinstance(base, Tensor))
    options = launch.num_warps, launch.num_stages
    return id(launch.kernel), launch.args[0].device, options, dtypes, tuple(launch.constants.items())


def handle_key(launch: Launch) -> tuple[Any, ...]:
    """All that Triton 3.6 compiles by: two launches with one key run the same machine code.

    Of a tensor that is its dtype and whether it starts at a multiple of 16 bytes; of an integer whether it is 1 (then it is a
    constant), a multiple of 16, and beyond int32; of a float nothing.
    """
    kinds: list[Any] = []
    for value in launch.args:
        if isinstance(value, Tensor):
            kinds.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int):
            kinds.append((value == 1, value % 16 == 0, -(2**31) <= value < 2**31))
        else:
            kinds.append(float)
    options = launch.num_warps, launch.num_stages
    return id(launch.kernel), launch.args[0].device, options, tuple(kinds), tuple(launch.constants.items())


def _plain(launch: Launch) -> bool:
    """Whether nothing but the launch itself is wanted of Triton: no interpreter, hooks, debugging or instrumentation, and no
    descriptors, which Triton encodes anew at each launch."""
    knobs = triton.knobs
    hooked = knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls
    watched = knobs.runtime.debug or knobs.compilation.instrumentation_mode or hooked
    described = any(isinstance(value, TensorDescriptor) for value in launch.args)
    return (
        isinstance(launch.kernel, triton.JITFunction) and not launch.kernel.pre_run_hooks and not (watched or described)
    )


def _run_handle(handle: Any, launch: Launch) -> None:
    """What the end of ``JITFunction.run`` does; a kernel's constants stand behind its arguments, in the order of its names."""
    names = launch.kernel.arg_names[len(launch.args) :]
    grid = (*launch.grid, 1, 1)
    stream = triton.runtime.driver.active.get_current_stream(launch.args[0].device.index)
    handle.run(
        *grid[:3], stream, handle.function, handle.packed_metadata, None, None, None,
        *launch.args, *(launch.constants[name] for name in names),
    )  # fmt: skip


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up. Triton's own takes 1.4 us on the host, as much as all else of a plan (one EPYC core, 2026-11-25)."""
    return -(-a // b)


def resident(registers: int, shared_bytes: int, num_warps: int) -> int:
    """Blocks that one multiprocessor of an H100 or H200 holds at once: 64 K registers given out by 256 a warp, 228 KB of shared
    memory of which each block costs 1 KB more than it asks for, 64 warps, 32 blocks."""
    a_warp = -(-registers * 32 // 256) * 256
    return min(65536 // (a_warp * num_warps), 233472 // (shared_bytes + 1024), 64 // num_warps, 32)


def index_type(count: int) -> tl.dtype:
    """The narrowest integer that holds every flat index below ``count``."""
    return tl.int32 if count <= 2**31 else tl.int64


def plane_index(count: int, plane: int, elements: int, block: int) -> tl.dtype:
    """INDEX of :func:`plane_block` for ``count`` things, ``plane`` of them a plane, where a plane has ``elements`` in memory."""
    return index_type(max(count + block, (block // max(plane, 1) + 2) * elements))


@triton.jit
def block_of(index, count, BLOCK: tl.constexpr):
    """Block ``index`` of ``count`` things: its first (a scalar, int64), its lanes (int32), and which of them exist."""
    start = index.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    return start, lane, lane < tl.minimum(count - start, BLOCK).to(tl.int32)


@triton.jit
def plane_block(index, count, PLANE: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """Block ``index`` of ``count`` things, PLANE of them a plane: its first plane (a scalar, int64), its lanes as INDEX, counted
    from the first thing of that plane, and which of them exist."""
    start = tl.cast(index, INDEX) * BLOCK
    plane = start // PLANE
    lane = tl.arange(0, BLOCK)
    return plane.to(tl.int64), (start - plane * PLANE) + lane, lane < tl.minimum(count - start, BLOCK).to(tl.int32)
