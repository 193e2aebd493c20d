"""What the drop-in modules cost on a CPU before they compute anything: operations on one number, so that only Python is left.

    pytest bench/test_overhead.py --benchmark-only

``FusedSequential`` beside the ``Sequential`` of the same children, and one call of an operation beside ``torch.nn``'s. The
contenders take turns (``profiling.timer.interleave``), a measurement is made five times, and the least median of each, ours or
torch's, and their difference stand in ``extra_info``: a shared machine only ever adds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alexnet_kernels import nn
from alexnet_kernels.profiling.timer import interleave

from .rows import best_of

CALLS = 20  # a measurement, so that the clock's own cost does not show


def measure(benchmark, ours: Callable[[], object], torchs: Callable[[], object], parts: int) -> None:
    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def several() -> None:
            for _ in range(CALLS):
                call()

        return several

    def once() -> None:
        found = interleave({"ours": repeated(ours), "torch": repeated(torchs)}, rounds=50)
        measurements.append({name: timing.median * 1e3 / (CALLS * parts) for name, timing in found.items()})

    measurements: list[dict[str, float]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            benchmark.pedantic(once, rounds=5, iterations=1)
    finally:
        torch.set_num_threads(threads)
    best = best_of(measurements)
    benchmark.extra_info.update({f"{name}, us each": round(value, 3) for name, value in best.items()})
    benchmark.extra_info["ours - torch, us each"] = round(best["ours"] - best["torch"], 3)
    print(f"\n{benchmark.name}: {benchmark.extra_info}")


CHILDREN = {
    "20 Identity": lambda: [torch.nn.Identity() for _ in range(20)],
    "20 Conv2d, no run": lambda: [torch.nn.Conv2d(1, 1, 1) for _ in range(20)],
    "10 Conv2d + ReLU": lambda: [m for _ in range(10) for m in (torch.nn.Conv2d(1, 1, 1), torch.nn.ReLU(inplace=True))],
    "10 Linear + ReLU": lambda: [m for _ in range(10) for m in (torch.nn.Linear(1, 1), torch.nn.ReLU(inplace=True))],
    "1 Conv2d + ReLU": lambda: [torch.nn.Conv2d(1, 1, 1), torch.nn.ReLU(inplace=True)],
}


@pytest.mark.parametrize("name", CHILDREN)
def test_fused_sequential(benchmark, name: str) -> None:
    """Microseconds a child; below 1 more than ``Sequential``'s is what is wanted."""
    theirs = torch.nn.Sequential(*CHILDREN[name]())
    ours = nn.FusedSequential(*theirs)
    x = torch.randn(1, 1, 1, 1)
    measure(benchmark, lambda: ours(x), lambda: theirs(x), len(theirs))


OPERATIONS = {
    "LocalResponseNorm": (nn.LocalResponseNorm(5), torch.nn.LocalResponseNorm(5), (1, 5, 1, 1)),
    "MaxPool2d": (nn.MaxPool2d(2), torch.nn.MaxPool2d(2), (1, 1, 2, 2)),
    "ConvReLU2d": (
        nn.ConvReLU2d(1, 1, 1),
        torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.ReLU()),
        (1, 1, 1, 1),
    ),
    "LinearReLU": (nn.LinearReLU(1, 1), torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU()), (1, 1)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_operation(benchmark, name: str) -> None:
    """Microseconds a call on the smallest of inputs; below 5 more than ``torch.nn``'s is what is wanted."""
    ours, theirs, shape = OPERATIONS[name]
    x = torch.randn(shape)
    measure(benchmark, lambda: ours(x), lambda: theirs(x), 1)
