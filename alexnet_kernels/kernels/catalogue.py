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
    """One launch, compiled; ``tile`` is what one program computes."""

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
    """``family label`` and launch of all that ``pattern``, a regular expression, finds.

    Raises:
        ValueError: ``pattern`` is no regular expression.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"pattern={pattern!r} is no regular expression ({error}); put a backslash before what is meant literally"
        ) from error
    for family, module in FAMILIES.items():
        for label, launch in module.shipped():
            name = f"{family} {label}"
            if wanted.search(name):
                yield name, launch


def rows(pattern: str, arch: int) -> Iterator[Row]:
    """The same compiled for sm_``arch``, one after the other: about half a second each.

    Raises:
        ValueError: ``pattern`` is no regular expression, or finds nothing.
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
    """``128x(128+64)x64``, rows x columns x depth, of a product; the number of a block's things elsewhere."""
    c = launch.constants
    if "BLOCK_M" in c:
        parts = ([c[f"BLOCK_{axis}"], c.get(f"REST_{axis}", 0)] for axis in "MNK")
    elif isinstance(c.get("BLOCK"), tuple):
        m, n, *rest = c["BLOCK"]
        parts = ([m], [n, rest[0]], rest[1:]) if len(rest) == 3 else ([m], [n], rest[:1])
    else:
        return str(c.get("BLOCK", ""))
    sums = ("+".join(map(str, filter(None, part))) for part in parts)
    return "x".join(f"({one})" if "+" in one else one for one in sums)
