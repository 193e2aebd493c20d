"""The net itself: bugs planted in a small kernel are caught, and the right kernel passes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

BUGS = {  # number in plants.cu: what the plain build says, what the sanitized one says
    "missing barrier": (1, "wrong result", "wrong result"),
    "global read": (2, "", "heap-buffer-overflow"),  # plain: whatever lies there
    "global write": (3, "", "heap-buffer-overflow"),
    "read between shared arrays": (4, "wrong result", "use-after-poison"),
    "write between shared arrays": (5, "write between shared arrays, before array 1", "use-after-poison"),
    "divergent barrier": (6, "63 at __syncthreads", "63 at __syncthreads"),
    "lane missing in a shuffle": (7, "31 in a warp operation, 33 returned", "31 in a warp operation, 33 returned"),
}


def run(program: Path, bug: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, str(bug)], capture_output=True, text=True, check=False)


def test_the_right_kernel_passes(plants: tuple[Path, bool]) -> None:
    done = run(plants[0], 0)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(plants: tuple[Path, bool], name: str) -> None:
    program, sanitized = plants
    bug, plain_says, sanitized_says = BUGS[name]
    if not sanitized and not plain_says:
        pytest.skip("only a sanitizer sees memory that the host owns")
    done = run(program, bug)
    assert done.returncode != 0
    assert (sanitized_says if sanitized else plain_says) in done.stderr
