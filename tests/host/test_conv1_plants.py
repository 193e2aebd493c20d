"""Bugs planted in the first layer's own source: host execution catches each."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Build = Callable[[Path, list[str], bool], Path]
BARRIER, WAIT = "__syncthreads();", "copy_async_wait<0>();"
FORWARD, TILE, WARPGROUP = "conv1_forward.cu", "conv1_tile.h", "conv1_warpgroup.h"
BEHIND, POISONED = "heap-buffer-overflow", "use-after-poison"
UNEQUAL, NOTHING = "another result", "NaN in the result"
PLANTS = {  # file, text, how often it is there, which of these, what stands in its place, what is said
    **{f"barrier {i} missing": (FORWARD, BARRIER, 9, i, "", (UNEQUAL, NOTHING)) for i in range(9)},
    **{f"wait {i} missing": (FORWARD, WAIT, 2, i, "", (UNEQUAL, NOTHING)) for i in range(2)},
    "vote without a barrier": (FORWARD, "return barrier_vote(special);", 1, 0, "return special;", (UNEQUAL, NOTHING)),
    "proxy fence missing": (FORWARD, "    proxy_fence();", 1, 0, "", (UNEQUAL, NOTHING)),
    "a line not cleared": (FORWARD, "clear_last_line(strip, threadIdx.x);", 1, 0, "", (UNEQUAL, NOTHING)),
    "wait for wgmma missing": (WARPGROUP, "warpgroup_wait<0>(sums);", 1, 0, "", (UNEQUAL, NOTHING)),
    "wgmma.fence missing": (WARPGROUP, "warpgroup_fence(sums);", 1, 0, "", ("without wgmma.fence before it",)),
    "wgmma behind the strip": (
        WARPGROUP,
        "(kRowPixels + kTaps - 1)",
        1,
        0,
        "kRowPixels",
        ("outside the shared arrays",),
    ),
    "a pixel beside the image": (TILE, "x < in.width &&", 1, 0, "x <= in.width &&", (BEHIND,)),
    "a row below the image": (TILE, "row < in.height;", 1, 0, "row <= in.height;", (BEHIND,)),
    "a prefetch below the image": (TILE, "y < in.height)", 1, 0, "y <= in.height)", (BEHIND,)),
    "a line behind the strip": (TILE, "row < kStripRows;", 1, 0, "row < kStripRows + 5;", (POISONED,)),
    "a window behind the strip": (FORWARD, "row * kStride * kPlanes", 1, 0, "4 * row * kStride * kPlanes", (POISONED,)),
    "weights behind their end": (FORWARD, "i < T::kWeightBytes;", 1, 0, "i <= T::kWeightBytes;", (BEHIND, POISONED)),
    "a result beside the picture": (FORWARD, "column >= p.pooled_width", 1, 0, "column > p.pooled_width", (BEHIND,)),
    "a row of windows too many": (FORWARD, "step < p.pooled_height", 1, 0, "step <= p.pooled_height", (BEHIND,)),
}


def plant(folder: Path, file: str, text: str, count: int, which: int, instead: str) -> list[str]:
    """The sources, one of them with ``text`` replaced at one place; paths from the repository's root."""
    source = (ROOT / "csrc" / file).read_text()
    assert source.count(text) == count, f"{text!r} is {source.count(text)} times in {file}"
    pieces = source.split(text)
    bugged = text.join(pieces[: which + 1]) + instead + text.join(pieces[which + 1 :])
    for one in (ROOT / "csrc" / FORWARD, *(ROOT / "csrc").glob("conv1_*.h")):  # headers find those beside them
        (folder / one.name).write_text(bugged if one.name == file else one.read_text())
    return [str(folder / FORWARD), "tests/host/conv1_driver.cpp"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTS)
def test_planted_bugs_are_caught(build_host: Build, tmp_path: Path, name: str) -> None:
    file, text, count, which, instead, says = PLANTS[name]
    sanitize = BEHIND in says or POISONED in says
    program = build_host(tmp_path / "bugged", plant(tmp_path, file, text, count, which, instead), sanitize)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert any(one in done.stderr for one in says), done.stderr
