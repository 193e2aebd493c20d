"""What a monitor recorded: samples of each device, phases, and their summary as a table, CSV, JSON or a picture."""

from __future__ import annotations

import csv
import json
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import require, write_atomically, write_text
from .nvml import NOT_HELD_BACK, QUANTITIES, REASONS, throttle_words

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

SCHEMA = 1
RATES = tuple(name for name in QUANTITIES if name.endswith("_mib_s"))
Spans = Sequence[tuple[float, float]]


@dataclass
class Series:
    """The samples of one device: times in seconds since the start, and one column for each quantity (NaN: not known)."""

    times: array[float] = field(default_factory=lambda: array("d"))
    columns: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in QUANTITIES})

    def append(self, time: float, values: Mapping[str, float]) -> None:
        self.times.append(time)
        for name, column in self.columns.items():
            column.append(values.get(name, math.nan))

    def within(self, name: str, spans: Spans) -> list[float]:
        """The known values of one quantity in ``spans``."""
        found: list[float] = []
        for begin, end in spans:
            found += self.columns[name][bisect_left(self.times, begin) : bisect_right(self.times, end)]
        return [value for value in found if not math.isnan(value)]

    def mean(self, name: str, spans: Spans) -> float | None:
        """Of samples; a rate instead tells of the time since the sample before, so it counts for as much of ``spans``."""
        if name not in RATES:
            values = self.within(name, spans)
            return math.fsum(values) / len(values) if values else None
        total = weights = 0.0
        for begin, end in spans:
            for i in range(
                max(1, bisect_right(self.times, begin)), min(bisect_left(self.times, end) + 1, len(self.times))
            ):
                weight = min(end, self.times[i]) - max(begin, self.times[i - 1])
                if not math.isnan(self.columns[name][i]):
                    total, weights = total + weight * self.columns[name][i], weights + weight
        return total / weights if weights else None

    def count(self, spans: Spans) -> int:
        return sum(bisect_right(self.times, end) - bisect_left(self.times, begin) for begin, end in spans)


@dataclass
class CpuSeries(Series):
    """Of processes: besides the samples, the CPU seconds used until each, so that any span has its exact share."""

    seconds: array[float] = field(default_factory=lambda: array("d"))

    def used(self, spans: Spans) -> float:
        return sum(self._until(end) - self._until(begin) for begin, end in spans)

    def _until(self, time: float) -> float:
        after = bisect_left(self.times, time)
        if not self.times:
            return 0.0
        if after in (0, len(self.times)):
            return self.seconds[min(after, len(self.times) - 1)]
        t0, t1 = self.times[after - 1], self.times[after]
        s0, s1 = self.seconds[after - 1], self.seconds[after]
        return s0 + (s1 - s0) * (time - t0) / (t1 - t0)


@dataclass(frozen=True)
class Device:
    """One row of every table. ``source`` is ``"NVML"`` or ``"CPU time"``; ``lost`` the time at which the GPU went away."""

    label: str
    source: str
    uuid: str | None = None
    name: str | None = None
    mig: bool = False
    lost: float | None = None


@dataclass(frozen=True)
class ProcessUse:
    """CPU seconds and peak resident memory of one process."""

    pid: int
    name: str
    cpu_seconds: float
    peak_memory_mib: float | None


@dataclass(frozen=True)
class Phase:
    """Every stretch of time with one name. ``depth`` counts the phases around the first of them."""

    name: str
    depth: int
    spans: tuple[tuple[float, float], ...]

    @property
    def seconds(self) -> float:
        return sum(end - begin for begin, end in self.spans)


@dataclass(frozen=True)
class Row:
    """One device in one phase (``None``: all the time). A quantity that was not measured is None in both mappings."""

    phase: str | None
    device: str
    source: str
    seconds: float
    samples: int
    mean: Mapping[str, float | None]
    peak: Mapping[str, float | None]
    throttled: Mapping[str, float]
    """The share of samples in which the clocks were held back, for each reason."""


@dataclass(frozen=True)
class Summary:
    """Means and peaks, phase by phase and device by device. Rich prints it as a table."""

    hz: float
    seconds: float
    notes: tuple[str, ...]
    devices: tuple[Device, ...]
    phases: tuple[Phase, ...]
    rows: tuple[Row, ...]
    processes: tuple[ProcessUse, ...]
    sampler_cpu_seconds: float
    series: Mapping[str, Series] = field(repr=False, compare=False)

    def table(self) -> Table:
        """The rows, without the columns that nothing filled."""
        from rich import box
        from rich.table import Table

        columns = [c for c in _COLUMNS if c[0] in _ALWAYS or any(c[2](row) != "N/A" for row in self.rows)]
        table = Table(
            title=f"{self.seconds:.2f} s",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        table.add_column("phase", no_wrap=True)
        table.add_column("device", no_wrap=True)
        for heading, unit, _ in columns:
            table.add_column(f"{heading}\n[dim]{unit}[/dim]", justify="left" if heading == "held back by" else "right")
        depth = {phase.name: phase.depth for phase in self.phases}
        for before, row in zip((None, *self.rows), self.rows, strict=False):
            begins = before is None or before.phase != row.phase
            if before is not None and begins:
                table.add_section()
            name = "all" if row.phase is None else "  " * depth[row.phase] + _plain(row.phase)
            table.add_row(name if begins else "", row.device, *(text(row) for _, _, text in columns))
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()
        for process in self.processes if len(self.processes) > 1 else ():
            memory = _number(process.peak_memory_mib, "{:,.0f}")
            text = f"process {process.pid} {process.name}: {process.cpu_seconds:.2f} s of CPU time, peak {memory} MiB"
            yield _plain(text)
        for note in self.notes:
            yield _plain(f"note: {note}")

    def to_json(self) -> dict[str, object]:
        """The summary without the samples. ``schema`` grows when a key changes its meaning."""
        return {
            "schema": SCHEMA,
            "kind": "alexnet-kernels profile",
            "hz": self.hz,
            "seconds": self.seconds,
            "sampler_cpu_seconds": self.sampler_cpu_seconds,
            "notes": list(self.notes),
            "devices": [asdict(device) for device in self.devices],
            "phases": [_phase_json(phase) for phase in self.phases],
            "rows": [asdict(row) for row in self.rows],
            "processes": [asdict(process) for process in self.processes],
        }

    def write_json(self, path: str | Path) -> None:
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def write_csv(self, path: str | Path) -> None:
        """Every sample: one line for each time and device, empty where nothing was measured."""
        write_atomically(path, self._write_csv)

    def _write_csv(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("seconds", "device", "phase", *QUANTITIES))
            for label, series in self.series.items():
                for i, (time, phase) in enumerate(zip(series.times, self._phases_at(series.times), strict=True)):
                    values = [series.columns[name][i] for name in QUANTITIES]
                    cells = ["" if math.isnan(v) else f"{v:.6g}" for v in values[:-1]]
                    words = "" if math.isnan(values[-1]) else " + ".join(throttle_words(int(values[-1]))) or "none"
                    writer.writerow((f"{time:.4f}", label, phase, *cells, words))

    def _phases_at(self, times: Sequence[float]) -> Iterator[str]:
        starts = [[begin for begin, _ in phase.spans] for phase in self.phases]
        for time in times:
            inside = []
            for phase, begins in zip(self.phases, starts, strict=True):
                i = bisect_right(begins, time) - 1
                if i >= 0 and time <= phase.spans[i][1]:
                    inside.append(phase.name)
            yield " / ".join(inside)

    def plot(self, path: str | Path) -> None:
        """The timeline into ``path``; its suffix names the format (PNG, SVG, PDF).

        Raises:
            ImportError: matplotlib is not installed.
            OSError: ``path`` cannot be written.
        """
        require("matplotlib", str(path))
        from .timeline import draw

        figure = draw(self)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))


def _phase_json(phase: Phase) -> dict[str, object]:
    spans = [list(span) for span in phase.spans]
    return {"name": phase.name, "depth": phase.depth, "seconds": phase.seconds, "spans": spans}


def merged(spans: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Sorted, and without overlaps: what two threads did at once happened once.

    >>> merged([(3, 4), (0, 2), (1, 2.5)])
    ((0, 2.5), (3, 4))
    """
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return tuple(found)


def summarise(phase: str | None, device: Device, series: Series, spans: Spans, cores: int) -> Row:
    """One row: ``series`` within ``spans``."""
    seconds = sum(end - begin for begin, end in spans)
    values = {name: series.within(name, spans) for name in QUANTITIES[:-1]}
    mean = {name: series.mean(name, spans) for name in values}
    peak = {name: max(v) if v else None for name, v in values.items()}
    if isinstance(series, CpuSeries) and seconds > 0:
        mean["utilisation"] = 100 * series.used(spans) / (seconds * cores) if series.times else None
    bits = [int(value) for value in series.within("throttle", spans)]
    shares = {word: sum(bool(b & bit) for b in bits) / len(bits) for bit, word in REASONS.items() if bits}
    shares = {word: share for word, share in shares.items() if share and word != REASONS[NOT_HELD_BACK]}
    return Row(phase, device.label, device.source, seconds, series.count(spans), mean, peak, shares)


def _number(value: float | None, form: str = "{:,.0f}") -> str:
    return "N/A" if value is None else form.format(value)


def _pair(row: Row, bus: str) -> str:
    tx, rx = row.mean[f"{bus}_tx_mib_s"], row.mean[f"{bus}_rx_mib_s"]
    return "N/A" if tx is None or rx is None else f"{tx / 1024:.2f} / {rx / 1024:.2f}"


def _held_back(row: Row) -> str:
    if row.source != "NVML" or row.mean["sm_clock_mhz"] is None:
        return "N/A"
    return ", ".join(f"{word} {share:.0%}" for word, share in row.throttled.items()) or "-"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


_ALWAYS = ("time", "samples", "utilisation", "memory", "power", "SM clock")
_COLUMNS = (
    ("time", "s", lambda row: f"{row.seconds:.2f}"),
    ("samples", "", lambda row: str(row.samples)),
    ("utilisation", "mean %", lambda row: _number(row.mean["utilisation"])),
    ("memory", "peak MiB", lambda row: _number(row.peak["memory_mib"])),
    ("power", "mean W", lambda row: _number(row.mean["power_w"])),
    ("SM clock", "mean MHz", lambda row: _number(row.mean["sm_clock_mhz"])),
    ("mem clock", "mean MHz", lambda row: _number(row.mean["memory_clock_mhz"])),
    ("temp", "peak °C", lambda row: _number(row.peak["temperature_c"])),
    ("PCIe", "out / in GiB/s", lambda row: _pair(row, "pcie")),
    ("NVLink", "out / in GiB/s", lambda row: _pair(row, "nvlink")),
    ("held back by", "share of samples", _held_back),
)
