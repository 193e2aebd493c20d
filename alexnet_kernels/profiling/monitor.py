"""GpuMonitor: what the devices did while code ran, phase by phase."""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType

import torch

from .cpu import ProcessTree, cores
from .devices import CPU, check_there, choose, label_of
from .nvml import Counters, GpuLost, Nvml, NvmlMissing
from .recording import CpuSeries, Device, Phase, Row, Series, Summary, merged, summarise

SLOWEST, FASTEST = 20, 100
_PCIE_PAUSE = 0.1  # seconds between readings of the PCIe call that blocks
_PATIENCE = 5.0  # seconds to wait for a driver that does not return


@dataclass(frozen=True)
class Usage:
    """One device over the monitored time. Utilisation in percent (of all cores, for a CPU), power in watts."""

    device: str
    source: str
    utilisation: float | None
    memory_mib: float | None
    power_w: float | None
    sm_clock_mhz: float | None
    seconds: float


@dataclass
class _Gpu:
    counters: Counters
    device: Device
    series: Series = field(default_factory=Series)


@dataclass
class _Phase:
    depth: int
    spans: list[tuple[float, float]] = field(default_factory=list)
    running: list[float] = field(default_factory=list)


class GpuMonitor:
    """``with GpuMonitor() as monitor: ...``, then ``monitor.summary()``.

    A thread samples every counter. The driver itself averages utilisation over 1/6 s to 1 s, and a phase ends when its
    Python code does: call ``torch.cuda.synchronize()`` in it when the GPU's work should fall inside.

    Args:
        devices: what to watch: ``torch.device``, ``"cuda:1"``, a number (as in ``cuda:1``), a UUID or an unambiguous
            beginning of one, ``"cpu"`` (the process and its children). By default every GPU that CUDA shows, and the CPU.
            The CPU stands for what cannot be counted: every device where there is no NVML.
        hz: samples a second, 20 to 100. The CPU time and memory of other processes are read ten times a second.
        processes: whose CPU time and memory; by default this process and its children.

    Raises:
        ValueError: ``hz`` is out of range, or ``devices`` names one that is not there.
    """

    def __init__(
        self,
        devices: Sequence[torch.device | str | int] | None = None,
        hz: float = 50,
        *,
        processes: ProcessTree | None = None,
    ) -> None:
        if not SLOWEST <= hz <= FASTEST:
            raise ValueError(f"hz={hz} must be from {SLOWEST} to {FASTEST} samples a second")
        self.hz = hz
        self._asked = None if devices is None else tuple(devices)
        self._processes = processes
        self._notes: list[str] = []
        self._gpus: list[_Gpu] = []
        self._labels: list[str] = []
        self._watches_cpu = False
        self._cpu = CpuSeries()
        self._nvml: Nvml | None = None
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()
        self._nesting = threading.local()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._thread_seconds = 0.0
        self._began: float | None = None
        self._ended: float | None = None

    def __repr__(self) -> str:
        return f"GpuMonitor(devices={self._asked!r}, hz={self.hz})"

    def __enter__(self) -> GpuMonitor:
        if self._began is not None:
            raise RuntimeError("a GpuMonitor measures once; make another for another measurement")
        asked = None if self._asked is None else [label_of(device) for device in self._asked]
        if asked is None or any(name != CPU for name in asked):
            self._open(asked)
        else:
            self._labels = [CPU]
        self._processes = self._processes or ProcessTree()
        self._watches_cpu = len(self._labels) > len(self._gpus)
        if self._watches_cpu and self._processes.note:
            self._notes.append(self._processes.note)
        self._began = time.perf_counter()
        self._sample_cpu()
        self._start(self._sample_until_stopped, "gpu-monitor")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_PATIENCE)
        if any(thread.is_alive() for thread in self._threads):
            self._notes.append("NVML does not return: what it was asked last is missing")
        else:
            self._sample_cpu(last=True)
            if self._nvml is not None:
                self._nvml.close()
        self._ended = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside; phases may nest, repeat, and run in several threads at once."""
        if self._began is None or self._ended is not None:
            raise RuntimeError(f"phase({name!r}) belongs inside `with GpuMonitor() as monitor:`")
        depth: int = getattr(self._nesting, "depth", 0)
        self._nesting.depth = depth + 1
        begin = self._now()
        with self._lock:
            phase = self._phases.setdefault(str(name), _Phase(depth))
            phase.running.append(begin)
        try:
            yield
        finally:
            self._nesting.depth = depth
            with self._lock:
                phase.running.remove(begin)
                phase.spans.append((begin, self._now()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be measured, and why; a line each."""
        return tuple(dict.fromkeys(self._notes))

    @property
    def usage(self) -> tuple[Usage, ...]:
        """One row for each device over the whole time."""
        rows = self.summary().rows
        found = (row for row in rows if row.phase is None)
        return tuple(
            Usage(
                row.device,
                row.source,
                row.mean["utilisation"],
                row.peak["memory_mib"],
                row.mean["power_w"],
                row.mean["sm_clock_mhz"],
                row.seconds,
            )
            for row in found
        )

    def summary(self) -> Summary:
        """What was recorded so far."""
        if self._began is None or self._processes is None:
            raise RuntimeError("summary() has nothing to tell before `with GpuMonitor() as monitor:`")
        end = self._ended if self._ended is not None else self._now()
        with self._lock:
            cpu = copy.deepcopy(self._cpu)
            gpus = {gpu.device.label: (gpu.device, copy.deepcopy(gpu.series)) for gpu in self._gpus}
            found = [
                (name, phase.depth, phase.spans + [(begin, end) for begin in phase.running])
                for name, phase in self._phases.items()
            ]
        phases = tuple(
            Phase(name, depth, merged((begin, min(stop, end)) for begin, stop in spans)) for name, depth, spans in found
        )
        pairs = [gpus.get(label) or (Device(label, "CPU time"), cpu) for label in self._labels]
        rows: list[Row] = []
        for name, spans in ((None, ((0.0, end),)), *((phase.name, phase.spans) for phase in phases)):
            rows += (summarise(name, device, series, spans, cores()) for device, series in pairs)
        return Summary(
            hz=self.hz,
            seconds=end,
            notes=self.notes,
            devices=tuple(device for device, _ in pairs),
            phases=phases,
            rows=tuple(rows),
            processes=self._processes.uses(),
            sampler_cpu_seconds=self._thread_seconds,
            series={device.label: self._with_share(series) for device, series in pairs},
        )

    def _with_share(self, series: Series) -> Series:
        """For a picture: the CPU's share between each two samples."""
        if isinstance(series, CpuSeries):
            used = series.columns["utilisation"]
            for i in range(1, len(used)):
                seconds = series.times[i] - series.times[i - 1]
                if seconds > 0:
                    used[i] = 100 * (series.seconds[i] - series.seconds[i - 1]) / (seconds * cores())
        return series

    def _open(self, asked: list[str] | None) -> None:
        try:
            self._nvml = Nvml()
        except NvmlMissing as missing:
            for label in asked or ():
                check_there(label)
            self._notes.append(f"{missing}: CPU time and memory of the process are shown instead")
            self._labels = [CPU]
            return
        try:
            boards = choose(asked, self._nvml)
        except BaseException:
            self._nvml.close()
            raise
        self._labels = list(boards)
        for label, board in boards.items():
            if board is not None:
                device = Device(label, "NVML", board.uuid, board.name, board.mig)
                self._gpus.append(_Gpu(Counters(self._nvml, board), device))
                if board.mig or board.instances:
                    self._notes.append(f"{label} is in MIG mode: NVML counts little of it, the rest is N/A")
        if asked is None and not self._gpus:
            setting = os.environ.get("CUDA_VISIBLE_DEVICES")
            why = "" if setting is None else f" (CUDA_VISIBLE_DEVICES={setting!r})"
            self._notes.append(f"no GPU is visible{why}")
        self._notes += self._nvml.notes

    def _now(self) -> float:
        return time.perf_counter() - (self._began or 0.0)

    def _start(self, run: object, name: str) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _sample_until_stopped(self) -> None:
        period, due = 1 / self.hz, time.perf_counter()
        try:
            while not self._stop.is_set():
                self._sample()
                due += period
                late = time.perf_counter() - due
                if late > 0:
                    due += math.ceil(late / period) * period  # ticks that were missed are not made up for
                self._stop.wait(max(0.0, due - time.perf_counter()))
        except Exception as error:
            self._notes.append(f"sampling ended at {self._now():.2f} s ({type(error).__name__}: {error})")
        self._thread_seconds = time.thread_time()

    def _sample(self) -> None:
        for gpu in self._gpus:
            if gpu.device.lost is not None:
                continue
            now = self._now()
            try:
                values = gpu.counters.read(now)
            except GpuLost:
                gpu.device = replace(gpu.device, lost=now)
                self._notes.append(f"{gpu.device.label} was lost at {now:.2f} s; its samples until then are kept")
                continue
            with self._lock:
                gpu.series.append(now, values)
        slow = [gpu.counters for gpu in self._gpus if gpu.counters.pcie_blocks]
        if slow and len(self._threads) == 1:
            self._start(lambda: self._read_pcie(slow), "gpu-monitor-pcie")
        self._sample_cpu()

    def _read_pcie(self, slow: Sequence[Counters]) -> None:
        while not self._stop.wait(_PCIE_PAUSE) and any(counters.pcie_blocks for counters in slow):
            for counters in slow:
                try:
                    counters.read_pcie()
                except GpuLost:  # the other thread says so
                    counters.pcie_blocks = False

    def _sample_cpu(self, last: bool = False) -> None:
        if self._processes is None or not self._watches_cpu:
            return
        now = self._now()
        found = self._processes.sample(now, last)
        if found is not None:
            with self._lock:
                self._cpu.append(now, {"memory_mib": found[1]})
                self._cpu.seconds.append(found[0])
