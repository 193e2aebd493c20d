"""The ruler: contenders timed in one process, taking turns in random order, summarised by medians.

A sample is the wall time of one call (``perf_counter_ns``), every GPU concerned synchronised before and after it.
Taking turns makes a slow spell of the machine hit all contenders alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Clock = Callable[[], int]


@dataclass(frozen=True)
class Timing:
    """Samples of one contender, in milliseconds."""

    samples: tuple[float, ...]

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
    """Time every contender once a round, in an order drawn anew each round.

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
