"""Every launch that this package ships, by the file it stands in; what each needs of a multiprocessor, once compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from . import activation, conv, conv_backward, fused, fused_backward, lrn, optim, pool
from ._compile import compile_launch
from ._launch import Launch

FAMILIES = {
    "lrn": lrn,
    "pool": pool,
    "fused": fused,
    "fused_backward": fused_backward,
    "conv": conv,
    "conv_backward": conv_backward,
    "activation": activation,
    "optim": optim,
}


@dataclass(frozen=True)
class Row:
    """One launch, compiled. ``tile`` holds its sizes that are powers of two of a block, as its constants name them."""

    label: str
    programs: int
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    tile: str


def launches(pattern: str = "") -> Iterator[tuple[str, Launch]]:
    """``family label`` and launch of all that ``pattern``, a regular expression, finds."""
    for family, module in FAMILIES.items():
        for label, launch in module.shipped():
            name = f"{family} {label}"
            if re.search(pattern, name):
                yield name, launch


def rows(pattern: str, arch: int) -> Iterator[Row]:
    """The same compiled for sm_``arch``, one after the other: about half a second each.

    Raises:
        ValueError: ``pattern`` finds nothing.
        RuntimeError: as :func:`compile_launch`.
    """
    found = dict(launches(pattern))
    if not found:
        raise ValueError(f"pattern={pattern!r} finds none of the launches of {', '.join(FAMILIES)}; '' finds all")
    for label, launch in found.items():
        made = compile_launch(launch, arch)
        yield Row(
            label,
            launch.grid[0],
            launch.num_warps,
            launch.num_stages,
            made.registers,
            made.spill_bytes,
            made.shared_bytes,
            made.blocks_per_sm,
            _tile(launch),
        )


def _tile(launch: Launch) -> str:
    """``128x(128+64)x64`` of a product's tuple of sizes; the number of a block's lanes elsewhere."""
    block = launch.constants.get("BLOCK", "")
    return "x".join(map(str, block)) if isinstance(block, tuple) else str(block)
