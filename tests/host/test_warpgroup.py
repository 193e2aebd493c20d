"""The host's products of a warpgroup: exact on integers, and planted bugs are caught."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

WRONG = "wrong result"
OUTSIDE = "wgmma reads outside the shared arrays"
BUGS = {  # in the order of warpgroup.cu: what it says
    "missing wait": WRONG,
    "wait for one group of two": WRONG,
    "group left open": WRONG,
    "missing wgmma.fence": "wgmma without wgmma.fence before it",
    "missing proxy fence": WRONG,
    "proxy fence before the writes": WRONG,
    "missing barrier": WRONG,
    "overwritten before the wait": WRONG,
    "a warp that passes by": "a warp has passed by a product of its warpgroup",
    "a warp's other matrix": "threads of a warpgroup have come for different products",
    "matrix at an odd address": "a matrix of wgmma at an address that is not a multiple of 16",
    "matrix behind the array": OUTSIDE,
    "leading and stride swapped": OUTSIDE,
}


def run(program: Path, bug: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, str(bug)], capture_output=True, text=True, check=False)


def test_products_are_exact(warpgroup: Path) -> None:
    done = run(warpgroup, 0)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(warpgroup: Path, name: str) -> None:
    done = run(warpgroup, 1 + list(BUGS).index(name))
    assert done.returncode != 0
    assert BUGS[name] in done.stderr
