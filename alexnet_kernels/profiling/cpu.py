"""CPU time and memory of a process and of those that it started: psutil where it is installed, the system's totals elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from .recording import ProcessUse

# Seconds between looks for new processes, which read all of /proc: rarer where that would hold up what is measured.
_RESCAN, _RESCAN_OWN = 0.2, 1.0
_REFRESH = 0.1  # seconds between readings of other processes, whose CPU time advances in steps of 10 ms
LISTED = 10

NO_PSUTIL = (
    "psutil is not installed (pip install 'alexnet-kernels[profile]'): "
    "the CPU time is that of all processes together, the memory that of the largest"
)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessTree:
    """Cumulative CPU seconds and resident memory of a process tree: this one, or that of ``follow(pid)``.

    Args:
        own: True for this process; False for a child that ``follow`` names later.
    """

    def __init__(self, own: bool = True) -> None:
        self.own = own
        self.psutil = _psutil()
        self._root: Any = None
        self._children: list[Any] = []
        self._scanned = self._refreshed = -math.inf
        self._began: dict[int, float] = {}  # CPU seconds of each process when monitoring began
        self._uses: dict[int, ProcessUse] = {}
        self._seconds = 0.0
        self._others = (0.0, 0.0)
        self._reaped = reaped_seconds()
        if own:
            self.follow(os.getpid())

    @property
    def note(self) -> str | None:
        return None if self.psutil or self.own else NO_PSUTIL

    def follow(self, pid: int) -> None:
        """The tree's root; call it once, right after the process has started."""
        if self.psutil is not None:
            try:
                self._root = self.psutil.Process(pid)
            except self.psutil.Error:  # already gone: its totals come with `finish`
                self._root = None

    def sample(self, now: float, last: bool = False) -> tuple[float, float] | None:
        """CPU seconds so far and the resident MiB last read (NaN: not known); None when it is too early to look again."""
        if not self.own and (last or self._root is None):
            return self._totals(last)
        due = last or now - self._refreshed >= _REFRESH
        if due:
            self._others = self._read_others(now)
            self._refreshed = now
        if self.own:
            seconds = time.process_time() + self._others[0]
        elif due:
            seconds = self._others[0]
        else:
            return None
        self._seconds = max(self._seconds, seconds)  # what leaves the tree must not be taken back
        return self._seconds, self._others[1]

    def _totals(self, last: bool) -> tuple[float, float] | None:
        """Of a followed child: nothing before it runs, and what the system knows once it has been waited for."""
        if last:
            return reaped_seconds() - self._reaped, math.nan if self.psutil else _peak_mib(children=True)
        first, self._refreshed = self._refreshed == -math.inf, 0.0
        return (0.0, math.nan) if first else None

    def uses(self) -> tuple[ProcessUse, ...]:
        """The processes seen, those first that used the most; at most ten."""
        return tuple(sorted(self._uses.values(), key=lambda use: -use.cpu_seconds)[:LISTED])

    def _read_others(self, now: float) -> tuple[float, float]:
        # The reaped before the living: a process that ends in between is late by one reading, and never counted twice.
        seconds, memory = (reaped_seconds() - self._reaped if self.own else 0.0), 0.0
        if self._root is None:
            return seconds, _own_memory_mib()
        first = self._scanned == -math.inf
        if now - self._scanned >= (_RESCAN_OWN if self.own else _RESCAN):
            self._scanned = now
            try:
                self._children = self._root.children(recursive=True)
            except self.psutil.Error:
                self._children = []
        for process in (self._root, *self._children):
            try:
                times, resident, name = process.cpu_times(), process.memory_info().rss / 2**20, process.name()
            except self.psutil.Error:
                continue  # it ended: its parent has its time, once it has waited for it
            self._remember(process.pid, name, times.user + times.system, resident, first and self.own)
            memory += resident
            if not self.own or process is not self._root:  # whose own seconds are known more finely
                seconds += sum((times.user, times.system, times.children_user, times.children_system))
        return seconds, memory

    def _remember(self, pid: int, name: str, seconds: float, resident: float, first: bool) -> None:
        began = self._began.setdefault(pid, seconds if first else 0.0)
        before = self._uses.get(pid)
        peak = max(resident, before.peak_memory_mib or 0.0) if before else resident
        self._uses[pid] = ProcessUse(pid, name, seconds - began, peak)


def reaped_seconds() -> float:
    """CPU seconds of all children that ended and were waited for, and of theirs."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _own_memory_mib() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    except OSError:
        return _peak_mib()


def _peak_mib(children: bool = False) -> float:
    """The largest that the process, or the largest of its children, has ever been."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _psutil() -> Any:
    try:
        import psutil
    except ImportError:
        return None
    return psutil
