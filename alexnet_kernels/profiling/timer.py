"""The ruler: contenders timed in one process, taking turns in random order, summarised by medians.

:func:`interleave` times whole calls by the wall clock, on several devices too; :func:`measure` times what is short, on one
device: many calls a sample, from a CUDA graph where there is a GPU. :func:`ratio` says whether a difference is one.
Taking turns makes a slow spell of the machine hit all contenders alike.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Clock = Callable[[], int]

_MOST_SETS = 64
_MOST_CALLS = 10_000  # a sample


@dataclass(frozen=True)
class Timing:
    """Samples of one contender, in milliseconds a call; ``how`` they were made: ``"graph"`` replay, or ``"calls"``."""

    samples: tuple[float, ...]
    how: Literal["graph", "calls"] = "calls"

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def iqr(self) -> float:
        """The distance between the quartiles; 0 for a single sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def percentile(self, p: int) -> float:
        """The sample that ``p`` percent do not exceed (1 to 99), interpolated."""
        if len(self.samples) < 2:
            return self.samples[0]
        return statistics.quantiles(self.samples, n=100, method="inclusive")[p - 1]


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    seconds: float = float("inf"),
    warmup: int = 1,
    devices: Sequence[torch.device] = (),
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Time one call of every contender each round, in an order drawn anew, all ``devices`` synchronised around it.

    Args:
        contenders: name to a call without arguments.
        rounds: samples of each; at least 1.
        seconds: begin no further round after this long (3 are made in any case, or ``rounds`` if that is fewer).
        warmup: untimed calls of each before the first round.
        devices: synchronised around each sample; CPUs need none.
        seed: of the orders.
        clock: nanoseconds; for tests.

    Raises:
        ValueError: ``rounds`` below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    order, generator = list(contenders), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in order}
    for name in order:
        for _ in range(warmup):
            contenders[name]()
    begin = clock()
    for done in range(rounds):
        if done >= 3 and clock() - begin > seconds * 1e9:
            break
        generator.shuffle(order)
        for name in order:
            _synchronise(devices)
            start = clock()
            contenders[name]()
            _synchronise(devices)
            samples[name].append((clock() - start) / 1e6)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _synchronise(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ratio:
    """How many times longer the baseline takes: its median over ours, and the 95% interval of that by bootstrap."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["faster", "slower", "tie"]:
        """``"tie"`` unless the interval leaves 1 out."""
        if self.low <= 1 <= self.high:
            return "tie"
        return "faster" if self.value > 1 else "slower"


def ratio(baseline: Timing, ours: Timing, *, seed: int = 0, resamples: int = 2000) -> Ratio:
    """``baseline.median / ours.median`` with its percentile bootstrap interval (Efron 1979).

    Rounds are drawn, not samples, where both have as many: a slow spell of the machine then moves both medians together.
    """
    a, b = (torch.tensor(timing.samples, dtype=torch.float64) for timing in (baseline, ours))
    generator = torch.Generator().manual_seed(seed)
    i = torch.randint(len(a), (resamples, len(a)), generator=generator)
    j = i if len(a) == len(b) else torch.randint(len(b), (resamples, len(b)), generator=generator)
    drawn = a[i].quantile(0.5, dim=1) / b[j].quantile(0.5, dim=1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(baseline.median / ours.median, low, high)


def relative_error(call: Callable[[], object], exact: Sequence[Tensor]) -> float:
    """The worst ``|result - exact| / |exact|`` (L2) of a call's results; NaN for a wrong shape or number of them.

    Memory of their sizes is filled with NaN and freed beforehand, so that an element which is not written shows.
    """
    poison = [torch.full_like(t, math.nan, dtype=torch.float32) for t in exact]
    del poison
    results = call()
    got = (results,) if isinstance(results, Tensor) else tuple(results)  # type: ignore[arg-type]
    if [t.shape for t in got] != [t.shape for t in exact]:
        return math.nan
    found = [float((t.double() - want).norm() / (want.norm() or 1)) for t, want in zip(got, exact, strict=True)]
    return math.nan if any(map(math.isnan, found)) else max(found)


def rotation(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of buffers, used in turn, exceed a GPU's second-level cache four times (256 MiB at least); at most 64.

    ``bytes_per_set`` is what a call reads of its own set: what no call reads, or what all write to one place, makes nothing
    cold. One on a CPU, whose caches other processes share.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_SETS, max(1, -(-max(4 * cache, 256 << 20) // max(1, bytes_per_set))))


def measure(
    contenders: Mapping[str, Sequence[Callable[[], object]]],
    *,
    device: torch.device,
    samples: int = 200,
    sample_ms: float = 1.0,
    seconds: float = float("inf"),
    warmup: int = 3,
    seed: int = 0,
    graphs: bool = True,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time contenders that take turns in random order; a sample is the mean of K calls, K such that it lasts ``sample_ms``.

    On a GPU the K calls are one CUDA graph, replayed between two events; a contender that cannot be captured is called
    between the events instead, and its ``Timing.how`` says so. Elsewhere ``perf_counter_ns`` stands around the calls.

    Args:
        contenders: name to its calls, one for each set of buffers, which are used in turn (see :func:`rotation`).
        device: where they run.
        samples, sample_ms: of each contender, and the least milliseconds a sample lasts.
        seconds: begin no further round of samples after this long; 3 are made in any case.
        warmup: untimed calls on each set of buffers, on the stream that is then captured.
        seed: of the orders.
        graphs: False: no capture.
        clock: nanoseconds; for tests, and only for calls that are over when they return.

    Raises:
        ValueError: ``samples`` or ``warmup`` below 1, or a contender without a call.
    """
    if samples < 1 or warmup < 1:
        raise ValueError(f"samples={samples} and warmup={warmup} must be at least 1")
    empty = [name for name, calls in contenders.items() if not calls]
    if empty:
        raise ValueError(f"contenders={empty[0]!r} has no call; give one for each set of buffers")
    on_gpu = device.type == "cuda" and clock is None
    now = clock or time.perf_counter_ns
    make = _OnGpu if on_gpu else _OnCpu
    runners = {name: make(calls, device, sample_ms, warmup, graphs, now) for name, calls in contenders.items()}
    order, generator, begin = list(contenders), random.Random(seed), now()
    found: dict[str, list[float]] = {name: [] for name in order}
    for done in range(samples):
        if done >= 3 and now() - begin > seconds * 1e9:
            break
        generator.shuffle(order)
        for name in order:
            found[name].append(runners[name].sample())
    return {name: Timing(tuple(values), runners[name].how) for name, values in found.items()}


class _OnCpu:
    """K calls between two readings of the clock."""

    how: Literal["graph", "calls"] = "calls"

    def __init__(
        self,
        calls: Sequence[Callable[[], object]],
        device: torch.device,
        sample_ms: float,
        warmup: int,
        graphs: bool,
        now: Clock,
    ) -> None:
        self.calls, self.now, self.count = calls, now, len(calls)
        for _ in range(warmup):
            self.sample()
        self.count = _calls_for(sample_ms, self.sample(), len(calls))

    def sample(self) -> float:
        start = self.now()
        for i in range(self.count):
            self.calls[i % len(self.calls)]()
        return (self.now() - start) / 1e6 / self.count


class _OnGpu:
    """K calls between two events on a stream of their own, as one graph where they can be captured."""

    how: Literal["graph", "calls"] = "calls"

    def __init__(
        self,
        calls: Sequence[Callable[[], object]],
        device: torch.device,
        sample_ms: float,
        warmup: int,
        graphs: bool,
        now: Clock,
    ) -> None:
        self.calls, self.device, self.count = calls, device, len(calls)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream(device)
        for _ in range(warmup):
            self.sample()
        self.count = _calls_for(sample_ms, self.sample(), len(calls))
        if graphs and self._capture():  # without the launches in between, a call is shorter
            again = _calls_for(sample_ms, self.sample(), len(calls))
            if again > self.count:
                self.count = again
                self._capture()
                self.sample()

    def _capture(self) -> bool:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self.stream):
                self._run()
        except Exception:  # whatever a contender cannot do while it is captured
            torch.cuda.synchronize(self.device)
            self.graph, self.how = None, "calls"
        else:
            self.graph, self.how = graph, "graph"
        return self.graph is not None

    def _run(self) -> None:
        for i in range(self.count):
            self.calls[i % len(self.calls)]()

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            start.record()
            if self.graph is None:
                self._run()
            else:
                self.graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.count


def _calls_for(sample_ms: float, call_ms: float, sets: int) -> int:
    """The fewest calls that last ``sample_ms`` and use every set of buffers equally often."""
    rounds = math.ceil(sample_ms / max(call_ms, 1e-6) / sets)
    return sets * min(max(rounds, 1), -(-_MOST_CALLS // sets))
