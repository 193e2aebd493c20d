"""The ruler, on a clock that the test winds."""

from __future__ import annotations

import math
import random

import pytest
import torch

from alexnet_kernels.profiling.timer import Timing, interleave, measure, ratio, relative_error, rotation


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


CPU = torch.device("cpu")


def noisy(clock: Clock, name: str, milliseconds: float, generator: random.Random):
    """A call with 5% of noise, and one in twenty that takes half as long again."""

    def call() -> None:
        slow = 1.5 if generator.random() < 0.05 else 1.0
        clock.work(name, milliseconds * slow * generator.gauss(1.0, 0.05))()

    return call


def trial(seed: int, baseline_ms: float, ours_ms: float) -> str:
    clock, generator = Clock(), random.Random(seed)
    calls = {
        "baseline": [noisy(clock, "baseline", baseline_ms, generator)],
        "ours": [noisy(clock, "ours", ours_ms, generator)],
    }
    found = measure(calls, device=CPU, samples=60, sample_ms=0.1, seed=seed, clock=clock)
    return ratio(found["baseline"], found["ours"], seed=seed, resamples=500).verdict


def test_a_planted_difference_is_found() -> None:
    assert sum(trial(seed, 1.1, 1.0) == "faster" for seed in range(100)) >= 90
    assert sum(trial(seed, 1.0, 1.1) == "slower" for seed in range(100)) >= 90


def test_no_difference_is_a_tie() -> None:
    assert sum(trial(seed, 1.0, 1.0) == "tie" for seed in range(100)) >= 90


def test_ratio() -> None:
    found = ratio(Timing((2.0,) * 9), Timing((1.0,) * 9))
    assert (found.value, found.low, found.high, found.verdict) == (2.0, 2.0, 2.0, "faster")


def test_a_sample_lasts_long_enough_and_uses_every_set() -> None:
    clock = Clock()
    calls = [clock.work("a", 0.1), clock.work("b", 0.3)]
    found = measure({"x": calls}, device=CPU, samples=5, sample_ms=1.0, warmup=1, clock=clock)
    assert found["x"].median == pytest.approx(0.2)
    assert clock.order.count("a") == clock.order.count("b")
    assert len(clock.order) == 2 + 2 + 5 * 6  # warm-up, calibration, and 3 rounds over both a sample
    assert found["x"].how == "calls"


def test_measure_keeps_its_budget() -> None:
    clock = Clock()
    found = measure({"a": [clock.work("a", 1000)]}, device=CPU, samples=100, seconds=4.5, warmup=1, clock=clock)
    assert len(found["a"].samples) == 5


def test_measure_by_the_real_clock() -> None:
    x = torch.ones(64)
    found = measure({"add": [lambda: x + 1]}, device=CPU, samples=4, sample_ms=0.1)
    assert 0 < found["add"].median < 100


@pytest.mark.parametrize(
    ("contenders", "options", "message"),
    [
        ({}, {"samples": 0}, "samples=0 and warmup=3 must be at least 1"),
        ({}, {"warmup": 0}, "warmup=0 must be at least 1"),
        ({"a": []}, {}, "contenders='a' has no call"),
    ],
)
def test_measure_refuses(contenders, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(contenders, device=CPU, **options)


def test_percentiles() -> None:
    timing = Timing(tuple(map(float, range(101))))
    assert (timing.percentile(5), timing.percentile(95)) == (5.0, 95.0)


def test_rotation_on_a_cpu() -> None:
    assert rotation(1, CPU) == 1


def test_relative_error() -> None:
    exact = (torch.ones(3, dtype=torch.float64),)
    assert relative_error(lambda: torch.tensor([1.0, 1.0, 1.5]), exact) == pytest.approx(0.5 / 3**0.5)
    assert math.isnan(relative_error(lambda: torch.tensor([1.0, 1.0, math.nan]), exact))
    assert math.isnan(relative_error(lambda: torch.ones(4), exact))
    assert math.isnan(relative_error(lambda: (torch.ones(3), torch.ones(3)), exact))


@pytest.mark.gpu
def test_a_graph_is_replayed() -> None:
    device = torch.device("cuda")
    x, y = torch.ones(1 << 20, device=device), torch.zeros(1 << 20, device=device)
    found = measure({"copy": [lambda: y.copy_(x)], "item": [lambda: x[0].item()]}, device=device, samples=5)
    assert found["copy"].how == "graph"
    assert found["item"].how == "calls"  # reads the result back, which no graph can
    assert rotation(1 << 20, device) == 64
