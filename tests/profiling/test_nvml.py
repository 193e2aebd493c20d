"""GpuMonitor through the real nvidia-ml-py, on a stub of the driver's library that tests/profiling/stub_nvml.c describes."""

from __future__ import annotations

import copy
import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console

from alexnet_kernels.profiling import GpuMonitor
from alexnet_kernels.profiling.nvml import Board, throttle_words, visible_boards
from alexnet_kernels.profiling.recording import CpuSeries, Series

A, B = "GPU-aaaaaaaa-1111-2222-3333-444444444444", "GPU-bbbbbbbb-1111-2222-3333-444444444444"
C, D = "MIG-cccccccc-1111-2222-3333-444444444444", "MIG-dddddddd-1111-2222-3333-444444444444"

# A process that has imported torch, and forks for each test's code: a fresh NVML without the seconds of an import. The
# code finds torch without CUDA, wherever the tests run, and what it leaves in `found` comes back.
SERVER = """
import json, os, sys, threading, time, traceback
import torch
torch.cuda.is_available = lambda: False
from alexnet_kernels.profiling import GpuMonitor

def watch(seconds=0.15, **arguments):
    with GpuMonitor(**arguments) as monitor:
        time.sleep(seconds)
    return monitor.summary().to_json()

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    os.environ.update(asked["environment"])
    try:
        exec(asked["code"], globals())
        answer = {"found": found}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    os.write(1, json.dumps(answer).encode() + b"\\n")
    os._exit(0)
"""


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libnvidia-ml.so.1 in it, for LD_LIBRARY_PATH."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux"):
        pytest.skip(f"nvidia-ml-py looks for libnvidia-ml.so.1 on Linux only, this is {sys.platform}")
    if compiler is None:
        pytest.skip("no C compiler: the stub of libnvidia-ml.so.1 cannot be built")
    if find_spec("pynvml") is None:
        pytest.skip("nvidia-ml-py is not installed")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("stub_nvml.c")
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, "-o", str(folder / "libnvidia-ml.so.1"), str(source)], check=True)
    return folder


@pytest.fixture(scope="session")
def server(stub: Path):
    settings = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")} | {"LD_LIBRARY_PATH": str(stub)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def on_stub(server: subprocess.Popen[str]):
    """Runs code in a process whose NVML is the stub, and returns its ``found``."""

    def run(code: str, mode: str = "two", visible: str | None = None, **environment: str):
        settings = {"STUB_NVML": mode, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **environment}
        if visible is not None:
            settings["CUDA_VISIBLE_DEVICES"] = visible
        server.stdin.write(json.dumps({"code": code, "environment": settings}) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["found"]

    return run


def test_two_gpus_and_every_counter(on_stub) -> None:
    summary = on_stub("found = watch(seconds=0.4)")
    first = {row["device"]: row for row in summary["rows"]}
    assert summary["notes"] == []
    assert [(d["label"], d["source"], d["uuid"], d["name"]) for d in summary["devices"]] == [
        ("cuda:0", "NVML", A, "Stub A"),
        ("cuda:1", "NVML", B, "Stub B"),
        ("cpu", "CPU time", None, None),
    ]
    mean = first["cuda:0"]["mean"]
    known = {"utilisation": 90, "power_w": 650, "sm_clock_mhz": 1980, "memory_clock_mhz": 2619, "temperature_c": 55}
    assert {name: mean[name] for name in known} == known
    assert first["cuda:0"]["peak"]["memory_mib"] == 10 * 1024
    assert first["cuda:0"]["throttled"] == {"power cap": 1.0, "too hot (hardware)": 1.0}
    assert first["cuda:1"]["throttled"] == {}  # an idle GPU is not held back
    # 2 MiB (1 for each GPU) and 1 GiB more at each of about 50 readings a second; the short PCIe counter wraps at the second
    samples, seconds = first["cuda:0"]["samples"], first["cuda:0"]["seconds"]
    rate = samples / seconds
    assert mean["pcie_tx_mib_s"] == pytest.approx(2 * rate, rel=0.35)
    assert mean["nvlink_rx_mib_s"] == pytest.approx(1024 * rate, rel=0.35)
    assert first["cuda:1"]["mean"]["nvlink_tx_mib_s"] is None
    assert 5 <= samples <= 22


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1,0", [B, A]),
        ("1", [B]),
        (f"{B},{A}", [B, A]),
        ("GPU-bbbb", [B]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [A]),
        ("0,7,1", [A]),
        ("0,0", []),
        ("GPU-", []),
        ("nonsense", []),
    ],
)
def test_cuda_visible_devices(on_stub, visible: str, expected: list[str]) -> None:
    summary = on_stub("found = watch(seconds=0.05)", visible=visible)
    assert [d["uuid"] for d in summary["devices"]] == [*expected, None]
    wanted = [] if expected else [f"no GPU is visible (CUDA_VISIBLE_DEVICES={visible!r})"]
    assert summary["notes"] == wanted


def test_visibility_rules() -> None:
    a, b = Board("GPU-aa11", "A", None), Board("GPU-ab22", "B", None)
    split = Board("GPU-ff00", "F", None, instances=(Board("MIG-c1", "F", None, True), Board("MIG-c2", "F", None, True)))

    def found(text: str | None, *boards: Board) -> list[str]:
        return [board.uuid for board in visible_boards(text, boards)]

    assert found(None, a, b) == ["GPU-aa11", "GPU-ab22"]
    assert found("GPU-a", a, b) == []  # ambiguous
    assert found("GPU-ab,GPU-aa", a, b) == ["GPU-ab22", "GPU-aa11"]
    assert found("GPU-ab,0", a, b) == ["GPU-ab22"]  # not mixed
    assert found(" 1 , 0 ", a, b) == ["GPU-ab22", "GPU-aa11"]
    assert found("GPU-ab,GPU-ab22", a, b) == []  # twice
    assert found("1", a, split) == ["MIG-c1"]
    assert found("MIG-c2,MIG-c1", a, split) == ["MIG-c2", "MIG-c1"]
    assert found("GPU-ff", a, split) == ["MIG-c1"]


def test_torch_tells_the_uuids_where_cuda_works(on_stub) -> None:
    """Whatever CUDA_DEVICE_ORDER and CUDA_VISIBLE_DEVICES say: torch's first GPU is NVML's second."""
    code = f"""
from types import SimpleNamespace
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 2)
uuids = [{B[4:]!r}, "99999999-0000-0000-0000-000000000000"]
torch.cuda.get_device_properties = lambda i: SimpleNamespace(uuid=uuids[i])
found = watch(seconds=0.05, devices=[torch.device("cuda:0"), "cuda:1"])
"""
    summary = on_stub(code, visible="0,1", CUDA_DEVICE_ORDER="FASTEST_FIRST")
    assert [(d["label"], d["name"]) for d in summary["devices"]] == [("cuda:0", "Stub B"), ("cuda:1", "N/A")]
    assert summary["rows"][0]["mean"]["sm_clock_mhz"] == 1200
    assert summary["rows"][1]["mean"]["sm_clock_mhz"] is None
    assert any("does not list the GPU with UUID 99999999" in note for note in summary["notes"])


def test_different_gpus_without_cuda_are_numbered_by_nvml_and_it_says_so(on_stub) -> None:
    (note,) = on_stub("found = watch(seconds=0.05)['notes']", CUDA_DEVICE_ORDER="FASTEST_FIRST")
    assert "their numbers are NVML's" in note


@pytest.mark.parametrize(("visible", "uuid"), [(None, C), ("1,0", C), (D, D), ("MIG-dddd", D)])
def test_mig_is_not_available_and_not_a_crash(on_stub, visible: str | None, uuid: str) -> None:
    summary = on_stub("found = watch()", mode="mig", visible=visible)
    (device,) = [d for d in summary["devices"] if d["mig"]]
    assert device["uuid"] == uuid
    (row,) = [row for row in summary["rows"] if row["device"] == device["label"]]
    assert row["peak"]["memory_mib"] == 5 * 1024  # the one thing that NVML knows of an instance
    assert {name for name, value in row["mean"].items() if value is not None} == {"memory_mib"}
    assert row["throttled"] == {}
    assert f"{device['label']} is in MIG mode: NVML counts little of it, the rest is N/A" in summary["notes"]


def test_a_gpu_that_is_lost_keeps_its_samples(on_stub, tmp_path: Path) -> None:
    code = f"""
with GpuMonitor(hz=50) as monitor:
    time.sleep(1.0)
s = monitor.summary()
s.write_csv({str(tmp_path / "lost.csv")!r})
s.plot({str(tmp_path / "lost.png")!r})
found = s.to_json()
"""
    summary = on_stub(code, mode="lost", STUB_LOST_AFTER="10")
    kept, lost, _ = summary["rows"]
    assert lost["samples"] == 10
    assert lost["mean"]["utilisation"] == 30
    assert kept["samples"] > 12
    when = summary["devices"][1]["lost"]
    assert 0.1 < when < 1.0
    assert summary["notes"] == [f"cuda:1 was lost at {when:.2f} s; its samples until then are kept"]
    with (tmp_path / "lost.csv").open() as file:
        times = [float(row["seconds"]) for row in csv.DictReader(file) if row["device"] == "cuda:1"]
    assert len(times) == 10 and max(times) < when
    assert (tmp_path / "lost.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpu_lost_before_the_first_sample(on_stub) -> None:
    summary = on_stub("found = watch()", mode="lost", STUB_LOST_AFTER="-1")
    assert summary["rows"][1]["samples"] == 0
    assert summary["rows"][1]["mean"]["power_w"] is None


def test_counters_that_are_not_supported(on_stub) -> None:
    summary = on_stub("found = watch()", mode="unsupported")
    row = summary["rows"][1]
    assert row["peak"]["memory_mib"] == 20 * 1024
    assert {name for name, value in row["mean"].items() if value is not None} == {"memory_mib"}
    assert row["samples"] > 2
    assert summary["notes"] == []


def test_an_older_driver(on_stub) -> None:
    """No cumulative PCIe counters: the call that blocks 20 ms is made in a thread of its own, so the rate is kept."""
    row = on_stub("found = watch(seconds=0.8, hz=100)", mode="old")["rows"][0]
    assert row["mean"]["power_w"] == 111  # the mean over a second, for want of the power now
    assert row["mean"]["pcie_tx_mib_s"] == pytest.approx(2048 * 1000 / 2**20)
    assert row["mean"]["pcie_rx_mib_s"] == pytest.approx(4096 * 1000 / 2**20)
    assert row["samples"] > 20  # about 80; were the call made between them, at most 10


@pytest.mark.parametrize("mode", ["refuse", "absent"])
def test_without_nvml_it_says_so_and_shows_the_process(on_stub, mode: str) -> None:
    absent = "import ctypes, pynvml\ndef nothing(name): raise OSError(name)\npynvml.CDLL = nothing\n"
    sees = "torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 2)\n"
    code = f"{sees}found = watch(seconds=0.1, devices=['cuda:0', 'cuda:1'])"
    summary = on_stub((absent if mode == "absent" else "") + code, mode=mode)
    (note,) = summary["notes"]
    assert note == (
        f"NVML does not answer ({'Driver Not Loaded' if mode == 'refuse' else 'NVML Shared Library Not Found'}): "
        "CPU time and memory of the process are shown instead"
    )
    (row,) = summary["rows"]  # and not the CPU's numbers under the name of each GPU
    assert (row["device"], row["source"]) == ("cpu", "CPU time")
    assert row["mean"]["utilisation"] >= 0
    assert row["peak"]["memory_mib"] > 20
    assert row["mean"]["power_w"] is None


@pytest.mark.parametrize(
    ("devices", "named"),
    [
        ("['cuda:0', 'cuda:7']", "cuda:7"),
        ("['GPU-bb']", "GPU-bb"),
        ("['meta']", "meta"),
    ],
)
@pytest.mark.parametrize("mode", ["refuse", "two"])
def test_a_device_that_torch_does_not_know_is_an_error(on_stub, mode: str, devices: str, named: str) -> None:
    """With NVML and without; NVML itself knows the second."""
    code = f"""
from types import SimpleNamespace
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
torch.cuda.get_device_properties = lambda i: SimpleNamespace(uuid={A[4:]!r})
found = ""
try:
    watch(devices={devices})
except ValueError as error:
    found = str(error)
"""
    known = mode == "two" and named == "GPU-bb"
    assert on_stub(code, mode=mode).startswith("" if known else f"devices: {named} is not there; ")
    assert (on_stub(code, mode=mode) == "") == known


def test_without_nvidia_ml_py_or_psutil(on_stub) -> None:
    summary = on_stub("sys.modules['pynvml'] = sys.modules['psutil'] = None\nfound = watch()")
    (note,) = summary["notes"]
    assert note.startswith(
        "nvidia-ml-py is not installed (pip install 'alexnet-kernels[profile]'): CPU time and memory"
    )
    assert [row["device"] for row in summary["rows"]] == ["cpu"]
    assert summary["rows"][0]["peak"]["memory_mib"] > 20


def test_devices_by_number_name_and_uuid(on_stub) -> None:
    code = "found = [d['uuid'] for d in watch(devices=[1, 'cuda:0', 'GPU-bb', 'cpu', '1'])['devices']]"
    assert on_stub(code) == [B, A, B, None]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("['cuda:2']", "devices: cuda:2 is not there; visible: cuda:0, cuda:1"),
        ("['GPU-']", "devices: 'GPU-' names 2 GPUs"),
        ("['GPU-12']", "devices: 'GPU-12' names 0 GPUs"),
        ("['gpu one']", "devices: 'gpu one' is none; name cpu, a GPU as in cuda:0 or 0, or a UUID"),
    ],
)
def test_devices_that_are_not_there(on_stub, devices: str, message: str) -> None:
    code = f"try:\n    watch(devices={devices})\nexcept ValueError as error:\n    found = str(error)"
    assert message in on_stub(code)


def test_the_sampling_thread_does_not_disturb(on_stub) -> None:
    """0.4 to 0.6 ms a sample for two GPUs: 2 to 3% of a core at 50 Hz (2026-11-24, two shared cores). No tick is made up for."""
    summary = on_stub("found = watch(seconds=1.5, hz=100)")
    share = summary["sampler_cpu_seconds"] / summary["seconds"]
    assert 0 < share < 0.2
    assert summary["rows"][0]["samples"] <= 155


@pytest.mark.parametrize("hz", [0, 19.9, 101, float("nan"), -50])
def test_hz_is_checked(hz: float) -> None:
    with pytest.raises(ValueError, match=r"hz=.* must be from 20 to 100 samples a second"):
        GpuMonitor(hz=hz)


def test_throttle_reasons_are_words() -> None:
    assert throttle_words(0) == ()
    assert throttle_words(0x88) == ("hardware slowdown", "power brake")
    assert throttle_words(0x8000 | 1) == ("idle", "reason 0x8000")


# ------------------------------------------------------------------------------------- phases and outputs, on the CPU alone


def test_phases_nest_repeat_and_run_in_threads() -> None:
    def exchange() -> None:
        with monitor.phase("exchange"):
            time.sleep(0.3)

    with GpuMonitor(["cpu"]) as monitor:
        for _ in range(2):
            with monitor.phase("step"), monitor.phase("[forward]"):
                time.sleep(0.05)
        threads = [threading.Thread(target=exchange) for _ in range(2)]
        for thread in threads:
            thread.start()
        during = monitor.summary()
        for thread in threads:
            thread.join()
        with pytest.raises(KeyError), monitor.phase("fails"):
            raise KeyError
    summary = monitor.summary()
    phases = {phase.name: phase for phase in summary.phases}
    assert [(p.name, p.depth, len(p.spans)) for p in summary.phases] == [
        ("step", 0, 2),
        ("[forward]", 1, 2),
        ("exchange", 0, 1),  # at the same time, so once
        ("fails", 0, 1),
    ]
    assert phases["step"].seconds >= phases["[forward]"].seconds >= 0.1
    assert 0.3 <= phases["exchange"].seconds < 0.55
    assert [row.phase for row in summary.rows] == [None, "step", "[forward]", "exchange", "fails"]
    assert during.seconds < summary.seconds
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(summary)
    text = console.export_text()
    assert "  [forward]" in text
    assert "N/A" in text


def test_cpu_time_falls_into_its_phase() -> None:
    with GpuMonitor(["cpu"], hz=100) as monitor:
        with monitor.phase("idle"):
            time.sleep(0.3)
        with monitor.phase("busy"):
            until = time.perf_counter() + 0.3
            while time.perf_counter() < until:
                pass
    idle, busy = (row.mean["utilisation"] for row in monitor.summary().rows[1:])
    assert idle is not None and busy is not None
    assert busy > 2 * idle


def test_rates_are_weighted_by_the_time_that_they_tell_of() -> None:
    series = Series()
    for moment, rate in ((0.0, float("nan")), (1.0, 10.0), (4.0, 2.0)):
        series.append(moment, {"pcie_tx_mib_s": rate, "power_w": rate})
    assert series.mean("pcie_tx_mib_s", [(0.0, 4.0)]) == (10 + 3 * 2) / 4
    assert series.mean("pcie_tx_mib_s", [(0.5, 1.5), (2.0, 3.0)]) == (0.5 * 10 + 1.5 * 2) / 2
    assert series.mean("power_w", [(0.0, 4.0)]) == 6
    assert series.mean("power_w", [(1.5, 3.0)]) is None
    cpu = CpuSeries()
    for moment, used in ((0.0, 1.0), (2.0, 3.0)):
        cpu.append(moment, {})
        cpu.seconds.append(used)
    assert cpu.used([(0.5, 1.0), (1.5, 9.0)]) == 1.0


def test_csv_json_and_picture(tmp_path: Path) -> None:
    with GpuMonitor(["cpu"]) as monitor, monitor.phase("outer"):
        with monitor.phase("inner"):
            time.sleep(0.1)
        time.sleep(0.1)
    summary = monitor.summary()
    summary.write_csv(tmp_path / "o.csv")
    summary.write_json(tmp_path / "o.json")
    summary.plot(tmp_path / "o.png")
    with (tmp_path / "o.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["phase"] for line in lines} >= {"outer / inner", "outer"}
    assert all(line["power_w"] == "" and line["device"] == "cpu" for line in lines)
    assert float(lines[-1]["utilisation"]) >= 0
    loaded = json.loads((tmp_path / "o.json").read_text())
    assert loaded == summary.to_json()
    assert (loaded["schema"], loaded["kind"]) == (1, "alexnet-kernels profile")
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.csv", "o.json", "o.png"]


def test_a_summary_is_a_value() -> None:
    with GpuMonitor(["cpu"]) as monitor:
        pass
    summary = monitor.summary()
    assert pickle.loads(pickle.dumps(summary)) == summary == copy.deepcopy(summary)
    assert "Summary(" in repr(summary)
    assert repr(GpuMonitor(["cpu"])) == "GpuMonitor(devices=('cpu',), hz=50)"


def test_a_monitor_measures_once_and_phases_belong_inside() -> None:
    monitor = GpuMonitor(["cpu"])
    with pytest.raises(RuntimeError, match=r"phase\('early'\) belongs inside"), monitor.phase("early"):
        pass
    with pytest.raises(RuntimeError, match="nothing to tell before"):
        monitor.summary()
    with monitor:
        pass
    with pytest.raises(RuntimeError, match="measures once"), monitor:
        pass


def test_processes_that_it_starts_are_counted() -> None:
    pytest.importorskip("psutil", reason="psutil is not installed")
    with GpuMonitor(["cpu"]) as monitor:
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; t = time.time()\nwhile time.time() < t + 1.6: pass"]
        )
        child.wait()
    summary = monitor.summary()
    assert child.pid in {process.pid for process in summary.processes}
    assert (summary.rows[0].mean["utilisation"] or 0) > 5


# ----------------------------------------------------------------------------------------- one row a device, for comparison


def test_cpu_time_is_measured() -> None:
    a = torch.randn(400, 400)
    with GpuMonitor([torch.device("cpu")] * 2) as monitor:
        for _ in range(30):
            a @ a
    (usage,) = monitor.usage  # one device, named twice
    assert usage.source == "CPU time"
    assert usage.utilisation is not None
    assert usage.utilisation > 0
    assert usage.power_w is None


@pytest.mark.gpu
def test_nvml_sees_the_gpu_of_the_tensors() -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    a = torch.randn(4096, 4096, device="cuda")
    with GpuMonitor([torch.device("cuda:0")]) as monitor:
        for _ in range(300):
            a = (a @ a).tanh()
        torch.cuda.synchronize()
    assert monitor.notes == ()
    (usage,) = monitor.usage
    assert usage.source == "NVML"
    assert usage.memory_mib is not None
    assert usage.memory_mib > 100
