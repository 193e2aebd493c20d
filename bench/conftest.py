"""What every benchmark gets: the device and its budgets, and where rows go.

    pytest bench --benchmark-only [--result DIR]

``--result DIR`` writes one immutable result file, ``DIR/<gpu or cpu>/<date>-<digest>.json``, at the end, failed tests or not, but
not of a run that was interrupted; by default nothing is written. The file says whether it is complete: all files of benchmarks
were asked for, and none of their tests was selected away, or left out when ``--seconds`` were over. The limits of time that a CPU
has by itself belong to the suite. ``--rows FILE`` appends each row as it is measured, ``--seconds N`` skips what does not fit:
``make gpu`` uses both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from . import rows


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("alexnet-kernels")
    group.addoption("--result", metavar="DIR", type=Path, help="write a result file below DIR")
    group.addoption("--rows", metavar="FILE", type=Path, help="append each row to FILE, as JSON")
    group.addoption(
        "--seconds",
        metavar="N",
        type=float,
        help="begin no row after N seconds; they are skipped, and say so",
    )
    group.addoption(
        "--gpu-profile", choices=("quick", "full", "all"), default="all", help="on a GPU: how much is compiled"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    config.stash[_BEGAN] = {}
    config.stash[_LEFT_OUT] = []


_ROWS = pytest.StashKey[list[dict[str, Any]]]()
_BEGAN = pytest.StashKey[dict[str, float]]()
_LEFT_OUT = pytest.StashKey[list[str]]()  # names of tests
# On a CPU each file ends in time: what comes later is less important, and is skipped with the reason.
CPU_SECONDS = {"test_ceilings.py": 15.0, "test_layers.py": 70.0, "test_model.py": 55.0}


@dataclass(frozen=True)
class Budget:
    """How long one row may take. Each contender gets ``samples`` of ``sample_ms``, or as many as ``seconds`` allow."""

    seconds: float
    samples: int
    sample_ms: float
    compiled: Literal["none", "first", "all"]  # torch.compile: nowhere; for what is fused, in the first batch and track
    autotune: bool


BUDGETS = {
    "cpu": Budget(seconds=0.25, samples=15, sample_ms=0.2, compiled="all", autotune=False),
    "quick": Budget(seconds=0.6, samples=100, sample_ms=1.0, compiled="none", autotune=False),
    "full": Budget(seconds=1.5, samples=200, sample_ms=1.0, compiled="first", autotune=False),
    "all": Budget(seconds=5.0, samples=200, sample_ms=1.0, compiled="all", autotune=True),
}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def budget(device: torch.device, request: pytest.FixtureRequest) -> Budget:
    return BUDGETS["cpu" if device.type == "cpu" else request.config.getoption("--gpu-profile")]


@pytest.fixture
def collect(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]:
    """Run one interleaved measurement inside pytest-benchmark, keep its row, and put its figures into ``extra_info``."""
    config = request.config
    limit, clock = config.getoption("--seconds"), "all files"
    if limit is None and not torch.cuda.is_available():
        limit, clock = CPU_SECONDS.get(request.path.name), request.path.name
    began = config.stash[_BEGAN].setdefault(clock, time.monotonic())
    if limit is not None and time.monotonic() - began > limit:
        if clock == "all files":
            config.stash[_LEFT_OUT].append(request.node.nodeid)
        pytest.skip(f"no time: {limit:.0f} s are over")

    def run(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found: list[dict[str, Any]] = []
        benchmark.pedantic(lambda: found.append(measure()), rounds=1, iterations=1)
        row = found[0]
        config.stash[_ROWS].append(row)
        file = config.getoption("--rows")
        if file is not None:
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
        benchmark.extra_info.update(_figures(row))
        return row

    return run


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    info = {
        f"{name} ms": round(c["milliseconds"], 4)
        for name, c in row.get("contenders", {}).items()
        if "milliseconds" in c
    }
    info |= {name: c["status"] for name, c in row.get("contenders", {}).items() if c["status"] != "ok"}
    for name in ("ours", "baseline", "per second", "note"):
        if name in row:
            info[name] = row[name]
    if "ratio" in row:
        info["baseline / ours"] = round(row["ratio"]["value"], 3)
        info["verdict"] = row["ratio"]["verdict"]
    return info


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_ROWS]:
        terminalreporter.section("baseline / ours: over 1, ours is faster")
        terminalreporter.write(rows.summary(config.stash[_ROWS]))


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        item.config.stash[_LEFT_OUT].append(item.nodeid)


def is_complete(session: pytest.Session) -> bool:
    """Every file of benchmarks was collected whole, and nothing of that was left out."""
    config, folder = session.config, Path(__file__).parent
    every = set(folder.glob("test_*.py")) <= {item.path for item in session.items}
    named = any("::" in argument for argument in config.args)
    return every and not (named or config.stash[_LEFT_OUT] or session.shouldstop or session.shouldfail)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    folder, measured = session.config.getoption("--result"), session.config.stash[_ROWS]
    if folder is None or not measured:
        return
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print("\nwrote", rows.publish(measured, folder, is_complete(session)))
    else:
        print(f"\nno result file: the run did not end by itself (exit status {int(exitstatus)})")
