"""The ruler, on a clock that the test winds."""

from __future__ import annotations

import pytest

from alexnet_kernels.profiling.timer import Timing, interleave


class Clock:
    """Time passes only when a contender runs."""

    def __init__(self) -> None:
        self.now = 0
        self.order: list[str] = []

    def __call__(self) -> int:
        return self.now

    def work(self, name: str, milliseconds: float):
        def call() -> None:
            self.order.append(name)
            self.now += round(milliseconds * 1e6)

        return call


def test_medians_of_each_contender() -> None:
    clock = Clock()
    found = interleave({"a": clock.work("a", 2.0), "b": clock.work("b", 3.0)}, rounds=9, clock=clock)
    assert (found["a"].median, found["b"].median) == (2.0, 3.0)
    assert len(found["a"].samples) == 9


def test_contenders_take_turns_in_changing_order() -> None:
    clock = Clock()
    interleave({n: clock.work(n, 1) for n in "abc"}, rounds=20, warmup=0, clock=clock)
    rounds = ["".join(clock.order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3


def test_a_budget_ends_it_after_three_rounds() -> None:
    clock = Clock()
    found = interleave({"a": clock.work("a", 1000)}, rounds=100, seconds=2.5, clock=clock)
    assert len(found["a"].samples) == 3


def test_warmup_is_not_timed() -> None:
    clock = Clock()
    found = interleave({"a": clock.work("a", 1)}, rounds=1, warmup=4, clock=clock)
    assert len(clock.order) == 5
    assert found["a"].samples == (1.0,)


def test_spread() -> None:
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).iqr == 2.0
    assert Timing((1.0,)).iqr == 0.0


def test_no_rounds_is_an_error() -> None:
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        interleave({}, rounds=0)
