"""``alexnet-kernels profile``: any command, its exit code, its signals, its output."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from alexnet_kernels.profiling.process import profile

PROFILE = [sys.executable, "-m", "alexnet_kernels", "profile"]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

# Says when it is ready, then which signals come, and ends at SIGTERM or at the end of its time.
LISTENER = """
import signal, sys, time
def note(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number != signal.SIGINT: sys.exit(5)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, note)
print("ready", flush=True)
until = time.monotonic() + float(sys.argv[1])
while time.monotonic() < until: time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts what it puts in the background with SIGINT ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def said() -> Console:
    return Console(file=io.StringIO(), width=160)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_command_gets_its_arguments_and_keeps_its_output() -> None:
    """What looks like an option of ours is the command's once the command has begun; the table goes to stderr."""
    code = "import sys; print(sys.argv[1:]); print('err', file=sys.stderr); sys.exit(1)"
    arguments = ["--hz", "3", "--", "-x", "--help"]
    result = subprocess.run([*PROFILE, "--hz", "20", "--", sys.executable, "-c", code, *arguments], capture_output=True)
    assert (result.returncode, result.stdout.decode()) == (1, f"{arguments}\n")
    assert result.stderr.startswith(b"err\n")
    assert b"utilisation" in result.stderr


@posix
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["false"], 1),
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -KILL $$"], 128 + 9),
        (["sh", "-c", "kill -SEGV $$"], 128 + 11),
    ],
)
def test_exit_codes(said: Console, command: list[str], code: int) -> None:
    assert profile(command, said) == code
    assert "cpu" in _text(said) or "cuda:0" in _text(said)


@posix
def test_what_cannot_run(said: Console, tmp_path: Path) -> None:
    assert profile(["no-such-command", "x"], said) == 127
    assert _text(said) == "error: cannot run 'no-such-command': no such command; is it on PATH?\n"
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    assert profile([str(script)], said) == 126
    assert "Permission denied" in _text(said)


def test_wrong_arguments_are_found_before_the_command_runs(said: Console, tmp_path: Path) -> None:
    touch = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"]
    with pytest.raises(ValueError, match=r"hz=5.*must be from 20 to 100"):
        profile(touch, said, hz=5)
    with pytest.raises(ValueError, match="devices: 'warp' is none"):
        profile(touch, said, devices="cpu,warp")
    with pytest.raises(OSError, match=r"cannot write .*gone.o.csv: choose a file in a folder that exists"):
        profile(touch, said, csv_file=tmp_path / "gone" / "o.csv")
    with pytest.raises(ValueError, match=r"plot_file='.*o.mp3' must end in one of .*\.png"):
        profile(touch, said, plot_file=tmp_path / "o.mp3")
    assert not list(tmp_path.iterdir())


@posix
def test_cpu_time_of_a_process_tree(said: Console, tmp_path: Path) -> None:
    pytest.importorskip("psutil", reason="psutil is not installed")
    busy = "import time; x = bytearray(60 << 20); t = time.process_time()\nwhile time.process_time() < t + 0.5: pass"
    inner = f"{sys.executable} -c '{busy}'"
    files = {f"{kind}_file": tmp_path / f"o.{end}" for kind, end in (("csv", "csv"), ("json", "json"), ("plot", "png"))}
    assert profile(["sh", "-c", f"{inner} & {inner}; wait"], said, devices="cpu", **files) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    (row,) = found["rows"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert row["mean"]["utilisation"] / 100 * row["seconds"] * cores == pytest.approx(1.1, abs=0.35)
    assert row["peak"]["memory_mib"] > 60
    assert len(found["processes"]) >= 3
    assert max(process["cpu_seconds"] for process in found["processes"]) > 0.3
    with (tmp_path / "o.csv").open() as file:
        assert {line["device"] for line in csv.DictReader(file)} == {"cpu"}
    assert (tmp_path / "o.png").stat().st_size > 1000
    assert " s of CPU time, peak " in _text(said)


@posix
def test_without_psutil_the_totals_are_the_systems(
    said: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    busy = "import time; t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"
    assert profile([sys.executable, "-c", busy], said, devices="cpu", json_file=tmp_path / "o.json") == 0
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["rows"][0]["mean"]["utilisation"] > 0
    assert found["rows"][0]["peak"]["memory_mib"] > 5
    assert found["notes"][-1].startswith("psutil is not installed (pip install 'alexnet-kernels[profile]')")


@posix
def test_an_ignored_signal_stays_ignored_and_handlers_come_back(said: Console) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert profile(["sh", "-c", "kill -HUP $$; exit 3"], said, devices="cpu") == 3
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


@posix
def test_signals_are_handed_on() -> None:
    command = [*PROFILE, "--devices", "cpu", "--", sys.executable, "-c", LISTENER, "30"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)  # no terminal gave it to both
        assert process.stdout.readline() == "SIGINT\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "SIGTERM\n"
        assert process.wait(20) == 5
        assert "utilisation" in process.stderr.read()


@posix
def test_ctrl_c_in_a_terminal_arrives_once(tmp_path: Path) -> None:
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*PROFILE, "--devices", "cpu", "--", sys.executable, "-c", LISTENER, "1.5"])
    seen, pressed = b"", False
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux's way to say that the other side has ended
            break
        if not piece:
            break
        seen += piece
        if b"ready" in seen and not pressed:
            pressed = True
            os.write(terminal, b"\x03")
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert seen.count(b"SIGINT") == 1, seen
    assert os.waitstatus_to_exitcode(status) == 0
    assert b"utilisation" in seen
