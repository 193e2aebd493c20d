"""The host's asynchronous copies, matrix loads and products: exact on integers, and planted bugs are caught."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

BUGS = {  # number in tensor_core.cu: what it says
    "missing wait": (1, "wrong result"),
    "group left open": (2, "wrong result"),
    "missing barrier": (3, "wrong result"),
    "copy to an odd address": (4, "cp.async to an address that is not a multiple of 16"),
    "one lane's other operation": (5, "lanes of a warp have come for different operations"),
}


def run(program: Path, bug: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, str(bug)], capture_output=True, text=True, check=False)


def test_products_are_exact(tensor_core: Path) -> None:
    done = run(tensor_core, 0)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(tensor_core: Path, name: str) -> None:
    bug, says = BUGS[name]
    done = run(tensor_core, bug)
    assert done.returncode != 0
    assert says in done.stderr
