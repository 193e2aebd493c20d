"""What the devices did while code ran: NVML's counters for NVIDIA GPUs, CPU time for the rest.

NVML's numbering ignores ``CUDA_VISIBLE_DEVICES``; devices are matched by UUID. A counter that a device does not have (MIG,
older boards) is None, never an error.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch


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
class _Counters:
    utilisation: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    power_w: list[float] = field(default_factory=list)
    sm_clock_mhz: list[float] = field(default_factory=list)


class Monitor:
    """``with Monitor(devices) as monitor: ...``, then ``monitor.usage``: one row for each different device.

    Args:
        devices: those the code runs on.
        interval: seconds between samples of the GPU counters.
    """

    def __init__(self, devices: Sequence[torch.device], interval: float = 0.02) -> None:
        self.devices = tuple(dict.fromkeys(devices))
        self.interval = interval
        self.usage: tuple[Usage, ...] = ()
        self.note: str | None = None
        self._stop = threading.Event()

    def __enter__(self) -> Monitor:
        gpus = [d for d in self.devices if d.type == "cuda"]
        self._handles = self._open(gpus) if gpus else {}
        self._counters = {device: _Counters() for device in self._handles}
        self._began, self._cpu = time.perf_counter(), time.process_time()
        if self._handles:
            self._thread = threading.Thread(target=self._sample, name="nvml-monitor", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
        if self._handles:
            self._stop.set()
            self._thread.join()
            self._nvml.nvmlShutdown()
        self.usage = tuple(
            self._gpu_usage(d, seconds) if d in self._handles else _cpu_usage(d, seconds, cpu) for d in self.devices
        )

    def _open(self, gpus: Sequence[torch.device]) -> dict[torch.device, Any]:
        try:
            import pynvml

            pynvml.nvmlInit()
        except ImportError:
            self.note = (
                "nvidia-ml-py is not installed (pip install 'alexnet-kernels[profile]'): CPU time is shown instead"
            )
            return {}
        except Exception as error:  # NVMLError has no common public base in all releases
            self.note = f"NVML does not answer ({error}): CPU time is shown instead"
            return {}
        self._nvml = pynvml
        uuids = {d: f"GPU-{torch.cuda.get_device_properties(d).uuid}" for d in gpus}
        return {d: pynvml.nvmlDeviceGetHandleByUUID(uuid) for d, uuid in uuids.items()}

    def _sample(self) -> None:
        while not self._stop.is_set():
            for device, handle in self._handles.items():
                self._read(self._counters[device], handle)
            self._stop.wait(self.interval)

    def _read(self, counters: _Counters, handle: Any) -> None:
        nvml = self._nvml
        readers = (
            (counters.utilisation, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            (counters.memory_mib, lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20),
            (counters.power_w, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            (counters.sm_clock_mhz, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        )
        for values, read in readers:
            try:
                values.append(float(read()))
            except nvml.NVMLError:
                continue  # not supported here: stays None

    def _gpu_usage(self, device: torch.device, seconds: float) -> Usage:
        c = self._counters[device]
        mean = lambda values: statistics.fmean(values) if values else None  # noqa: E731
        peak = max(c.memory_mib) if c.memory_mib else None
        return Usage(str(device), "NVML", mean(c.utilisation), peak, mean(c.power_w), mean(c.sm_clock_mhz), seconds)


def _cpu_usage(device: torch.device, seconds: float, cpu_seconds: float) -> Usage:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Usage(str(device), "CPU time", 100 * cpu_seconds / (seconds * cores), _peak_rss_mib(), None, None, seconds)


def _peak_rss_mib() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**10 if os.uname().sysname != "Darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
