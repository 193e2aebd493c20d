"""The one guarded launch every Triton kernel goes through, and the rule for offsets beyond 2^31.

The rule: a program's own block starts at an int64 offset, whatever lies inside the block is int32. A kernel that divides a
flat index does so in :func:`index_type`. Nothing else in ``kernels`` touches the current device.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA's, for x, y and z


@dataclass(frozen=True)
class Config:
    """What tuning may choose: things a program computes, and warps that share them."""

    block: int
    num_warps: int = 4


@dataclass(frozen=True)
class Launch:
    """A kernel and everything it is called with: run it, or compile it for a GPU that is not there.

    ``args`` are positional, tensors first; on meta tensors a launch can be planned and compiled but not run.
    ``elements`` is how many results one program computes.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    elements: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.lstrip("_")


def table_of(gpu: str) -> Path:
    """Where the tuned table of a GPU of that name stands, or would."""
    return Path(__file__).with_name("tuned") / (re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@functools.cache
def tuned(family: str, device: torch.device) -> dict[str, Config]:
    """What ``make tune`` chose on this GPU for the kernels of one file; empty where it has not run."""
    path = table_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if path is None or not path.exists():
        return {}
    try:
        return {name: Config(**row) for name, row in json.loads(path.read_text())["kernels"].get(family, {}).items()}
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
        launch.kernel[launch.grid](*launch.args, **launch.constants, num_warps=launch.num_warps)


def index_type(count: int) -> tl.dtype:
    """The narrowest integer that holds every flat index below ``count``."""
    return tl.int32 if count <= 2**31 else tl.int64


@triton.jit
def block_of(index, count, BLOCK: tl.constexpr):
    """Block ``index`` of ``count`` things: its first (a scalar, int64), its lanes (int32), and which of them exist."""
    start = index.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    return start, lane, lane < tl.minimum(count - start, BLOCK).to(tl.int32)
