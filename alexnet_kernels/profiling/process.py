"""Profile any command: run it, watch the devices and its processes, and end as it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import check_plottable, check_writable
from .cpu import ProcessTree
from .monitor import GpuMonitor

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console

    from .recording import Summary

CANNOT_RUN, NOT_FOUND, KILLED = 126, 127, 128  # a shell's exit codes; KILLED + the signal's number
_FORWARDED = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_KEYBOARD = ("SIGINT", "SIGQUIT")


class CannotRun(RuntimeError):
    """The command did not start. ``code`` is what a shell would exit with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run(command: Sequence[str], monitor: GpuMonitor, processes: ProcessTree) -> int:
    """Run ``command`` inside ``monitor`` and return its exit code; 128 + N when signal N ended it.

    Its input, output and environment are this process's. Signals that arrive here are handed on to it, except those of
    the keyboard that the terminal has already given to both.

    Raises:
        CannotRun: there is no such command, or it cannot be executed.
    """
    with monitor, _forwarding() as follow:
        try:
            child = subprocess.Popen(list(command))
        except FileNotFoundError as error:
            raise CannotRun(f"cannot run {command[0]!r}: no such command; is it on PATH?", NOT_FOUND) from error
        except OSError as error:
            raise CannotRun(f"cannot run {command[0]!r}: {error.strerror}", CANNOT_RUN) from error
        processes.follow(child.pid)
        follow(child)
        code = child.wait()
    return KILLED - code if code < 0 else code


def profile(
    command: Sequence[str],
    console: Console,
    *,
    devices: str | None = None,
    hz: float = 50,
    csv_file: str | Path | None = None,
    json_file: str | Path | None = None,
    plot_file: str | Path | None = None,
) -> int:
    """Run ``command``, print what the devices did to ``console``, write what was asked for; the command's exit code.

    Args:
        devices: as in ``"cuda:0,cuda:1"``, ``"1"`` or ``"GPU-8c2a,cpu"``; by default all that are visible.

    Raises:
        ValueError: a wrong argument, before the command runs.
        OSError: a file cannot be written; a wrong folder is found before the command runs.
        ImportError: a picture is wanted and matplotlib is not installed, before the command runs.
    """
    for path in (csv_file, json_file, plot_file):
        if path is not None:
            check_writable(Path(path))
    if plot_file is not None:
        check_plottable(Path(plot_file))
    processes = ProcessTree(own=False)
    monitor = GpuMonitor(None if devices is None else devices.split(","), hz, processes=processes)
    try:
        code = run(command, monitor, processes)
    except CannotRun as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return error.code
    summary = monitor.summary()
    console.print(summary)
    _write(summary, csv_file, json_file, plot_file)
    return code


def _write(
    summary: Summary, csv_file: str | Path | None, json_file: str | Path | None, plot_file: str | Path | None
) -> None:
    if csv_file is not None:
        summary.write_csv(csv_file)
    if json_file is not None:
        summary.write_json(json_file)
    if plot_file is not None:
        summary.plot(plot_file)


class _Follow:
    """Hands signals on to a child; those that come before it exists wait for it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._waiting: list[int] = []

    def __call__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        while self._waiting:
            child.send_signal(self._waiting.pop(0))

    def handle(self, number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name in _KEYBOARD and _terminal_gave_it_to_both():
            return
        if self._child is None:
            self._waiting.append(number)
        else:
            self._child.send_signal(number)


@contextmanager
def _forwarding() -> Iterator[_Follow]:
    """Signals go to the child instead of ending this process; one that is ignored stays ignored, by both."""
    follow, before = _Follow(), {}
    if threading.current_thread() is threading.main_thread():
        for name in _FORWARDED:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, follow.handle)
    try:
        yield follow
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminal_gave_it_to_both() -> bool:
    """Whether a key press reaches the child without help: both are in the terminal's foreground."""
    if not hasattr(os, "tcgetpgrp"):  # Windows: a console's Ctrl-C reaches every process in it
        return True
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
