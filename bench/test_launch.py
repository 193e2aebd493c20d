"""What a launch costs the host: planning it, then Triton's own way to the driver or a compiled handle (``kernels/_launch.py``).

    pytest bench/test_launch.py --benchmark-only

Both ways end in the same launch. On a GPU they are timed as they are, asynchronously: fewer launches at once than its queue
holds. Without one the kernel is compiled for sm_90 and a stand-in takes the launch where the driver would: what is left is the
Python of both ways, without ``cuLaunchKernel``, and the row's name says so.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from alexnet_kernels.profiling.timer import Timing

from . import rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CALLS, ROUNDS = 200, 60
WINDOW = (3, 3, 2, 2, 0, 0, 1, 1)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: the interpreter launches nothing"
)


class Driver:
    """Enough of Triton's driver to compile for an H100, and to launch into nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 232_448}
        )
        self.launches = 0

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        def launch(*_: object) -> None:
            self.launches += 1

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int | None) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver | None]:
    """The stand-in where there is no GPU; ``None`` where there is one."""
    from triton.runtime import driver as active

    from alexnet_kernels.kernels import _launch

    monkeypatch.setattr(_launch, "HANDLES", False)
    monkeypatch.setattr(_launch, "_handles", {})
    if DEVICE.type == "cuda":
        yield None
        return
    before, stand_in = active._active, Driver()
    active.set_active(stand_in)
    try:
        yield stand_in
    finally:
        active._active = before


def _lrn() -> Callable[[], object]:
    from alexnet_kernels.kernels import lrn

    x = torch.randn(2, 96, 5, 5, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    return lambda: lrn.plan((x, y), 5, 2e-5, 0.75, 2.0, 2)


def _pool() -> Callable[[], object]:
    from alexnet_kernels.kernels import pool

    x = torch.randn(2, 96, 5, 5, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last)
    y = torch.empty(2, 96, 2, 2, dtype=x.dtype, device=DEVICE, memory_format=torch.channels_last)
    place = torch.empty_like(y, dtype=torch.uint8)
    return lambda: pool.plan_forward(x, None, y, place, WINDOW)


def _milliseconds(contenders: dict[str, Callable[[], object]]) -> dict[str, Timing]:
    """A call of each: CALLS at a time, taking turns in random order; a GPU is empty at the start of each turn."""
    order, generator = list(contenders), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(ROUNDS):
        generator.shuffle(order)
        for name in order:
            call = contenders[name]
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)
            begin = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            samples[name].append((time.perf_counter_ns() - begin) / 1e6 / CALLS)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


@pytest.mark.parametrize("kernel", [_lrn, _pool], ids=["lrn", "pool"])
def test_launch(kernel: Callable[[], Callable[[], object]], driver: Driver | None, collect) -> None:
    from alexnet_kernels.kernels import _launch

    plan = kernel()
    launch = plan()
    asked = _launch.triton.__version__.startswith("3.6.")  # the launcher that handles were written to

    def by(handles: bool) -> Callable[[], None]:
        def call() -> None:
            _launch.HANDLES = handles
            _launch.run(launch)

        return call

    def measure() -> rows.Row:
        contenders = {"plan": plan, "triton": by(False)} | ({"ours handle": by(True)} if asked else {})
        timings = _milliseconds(contenders)
        planning = timings.pop("plan")
        row: rows.Row = {
            "section": "launch",
            "case": f"{launch.name}{'' if driver is None else ', Python alone'}",
            "device": DEVICE.type,
            "plan": rows.described(planning),
            "contenders": {name: {"status": "ok", **rows.described(timing)} for name, timing in timings.items()},
        }
        rows.settle(row, timings)
        return row

    row = collect(measure)
    print(f"\n{row['case']}: plan {row['plan']['milliseconds'] * 1e3:.2f} us")
    if asked:
        assert len(_launch._handles) == 1  # so the handle was what ran
    if driver is not None:
        assert driver.launches == len(row["contenders"]) * ROUNDS * (CALLS + 1)
