"""The main job, small: it agrees, it notices what does not, and its command tells so."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from alexnet_kernels import _extension, geometry, images, models
from alexnet_kernels.cli import main as command_line
from alexnet_kernels.comparison import check, compare, contenders, report, run
from alexnet_kernels.distributed import exchange

LRN = "reference" if _extension.why_not("cpu") else "cpu"  # what runs it on a CPU
CPUS = (torch.device("cpu"),) * 2
SMALL = geometry.variant("tiny", input_size=67, num_classes=10)
PHOTOGRAPHS = images.Loaded(
    torch.randint(0, 256, (2, 3, 67, 67), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)), ("a", "b")
)


def small(**options: object) -> run.Comparison:
    arguments: dict[str, object] = {"batch": 3, "devices": CPUS, "rounds": 1} | options
    return compare(SMALL, PHOTOGRAPHS, **arguments)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_agree(dtype: str) -> None:
    result = small(dtype=dtype)
    assert result.disagreements == ()
    groups = [g.name for g in SMALL.groups]
    for kind in (check.FORWARD, check.TRAINING):
        for name in (run.STOCK, run.ONE, run.TWO):
            rows = [r for r in result.rows if (r.run, r.contender) == (kind, name)]
            assert [r.group for r in rows] == [*groups, check.TOTAL, check.PIXELS]
            assert all(r.milliseconds > 0 and r.tolerance > 0 for r in rows)
    backends = {(r.contender, r.group): r.backend for r in result.rows}
    for ours in (run.ONE, run.TWO):  # on a CPU convolutions and linear layers are torch's, by way of the reference
        found = {group: backends[ours, group] for group in groups}
        assert found["conv1"] == found["conv2"] == "+".join(sorted({LRN, "reference"}))
        assert found["conv3"] == found["conv4"] == found["fc6"] == found["fc7"] == "reference"
    assert {backend for (name, _), backend in backends.items() if name == run.STOCK} == {"torch"}
    assert "torch.nn prepares them there, ours on the way into conv1" in result.notes[0]
    assert "torch.optim.SGD for torch.nn, this package's for ours" in result.notes[1]
    assert "'peak memory' is the whole process's on a CPU" in result.notes[2]
    forward = sum(t.bytes for t in result.transfers if not t.backward)
    itemsize = 4 if dtype == "fp32" else 2
    assert forward == sum(e.bytes(3, itemsize) * e.directions for e in SMALL.exchanges())


@pytest.mark.parametrize("name", [v for v in geometry.VARIANTS if v not in ("paper", "tiny")])
def test_every_variant_agrees(name: str) -> None:
    variant = geometry.variant(name).narrowed(8)
    pixels = torch.randint(0, 256, (1, 3, *variant.input_size), dtype=torch.uint8)
    result = compare(variant, images.Loaded(pixels, ("noise",)), batch=1, devices=CPUS, rounds=1)
    assert result.disagreements == ()


def _pull_zeros(x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
    return _pull(x * 0, *args, **options)


_pull = exchange.pull


def test_a_cut_exchange_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "pull", _pull_zeros)
    wrong = {(r.contender, r.group, r.run) for r in small().disagreements}
    assert {c for c, _, _ in wrong} == {run.TWO}
    assert (run.TWO, "conv3", check.FORWARD) in wrong
    assert (run.TWO, "conv2", check.FORWARD) not in wrong


def test_a_lost_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is right; only the training rows, from the cut backwards, may complain."""
    original = models.alexnet

    def forgetful(*args: object, **options: object) -> models.AlexNet:
        model = original(*args, **options)
        model.features[2].register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
        return model

    monkeypatch.setattr(run, "alexnet", forgetful)
    wrong = small().disagreements
    assert {r.run for r in wrong} == {check.TRAINING}
    assert {r.contender for r in wrong} == {run.ONE}
    assert {r.group for r in wrong} == {"conv1", check.TOTAL, check.PIXELS}
    assert all("gradient of" in r.worst for r in wrong)


def test_pixels_prepared_otherwise_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows that begin with pixels may complain: the others are given prepared images."""
    original = models.alexnet

    def darker(*args: object, **options: object) -> models.AlexNet:
        model = original(*args, **options)
        mean, scale = model.features[0]._numbers
        model.features[0]._numbers = tuple(m + 1 for m in mean), scale
        return model

    monkeypatch.setattr(run, "alexnet", darker)
    wrong = small().disagreements
    assert {(r.contender, r.group) for r in wrong} == {(run.ONE, check.PIXELS)}
    assert {r.run for r in wrong} == {check.FORWARD, check.TRAINING}
    assert all("from pixels" in r.worst for r in wrong)


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    """In a process of its own, because it lasts. Blocks of 64 MiB, freed and made anew: no page faults once they are there."""
    pytest.importorskip("resource", reason="page faults are counted by POSIX systems")
    code = """
import resource, sys, torch
from alexnet_kernels import geometry, images
from alexnet_kernels.comparison import compare
from alexnet_kernels.comparison.memory import keep_freed_memory
tiny, cpu = geometry.variant("tiny", input_size=67, num_classes=10), torch.device("cpu")
compare(tiny, images.Loaded(torch.zeros(1, 3, 67, 67, dtype=torch.uint8), ("a",)), batch=1, devices=(cpu, cpu), rounds=1)
faults, found = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
for _ in range(12):
    before = faults()
    torch.ones(16 << 20)
    found.append(faults() - before)
print(min(found), keep_freed_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    faults, kept = done.stdout.split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    assert kept == "False" or int(faults) < 100


def test_nan_disagrees() -> None:
    row = run.Row("conv1", check.FORWARD, run.ONE, 1.0, 0.0, 1.0, "x", float("nan"), 1.0, "output of conv1")
    assert not row.agrees


def test_groups_chain_to_the_whole_network() -> None:
    model = models.alexnet(SMALL).eval()
    two = models.TwoDeviceAlexNet.from_one_device(model, ("cpu", "cpu"))
    x = torch.randn(2, 3, 67, 67)
    for contender in (contenders.OneDevice("one", model), contenders.TwoDevices("two", two)):
        state = contender.enter(x)
        for group in SMALL.groups:
            state = contender.run_group(group.name, state)
        torch.testing.assert_close(contender.merged(state), model(x))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("dtype='int8' is unknown; use fp32", {"dtype": "int8"}),
        ("dtype='tf32' needs a CUDA device", {"dtype": "tf32"}),
        ("batch=0 must be at least 1", {"batch": 0}),
    ],
)
def test_errors(message: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu", "must name two devices"),
        ("cpu,cpu,cpu", "must name two devices"),
        ("cpu,lpu", "devices='cpu,lpu'"),
        ("cpu,meta", "devices='cpu,meta': nothing runs on meta; use cpu, cuda, mps, xpu"),
    ],
)
def test_devices_are_parsed_with_care(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.parse_devices(text)


@pytest.mark.parametrize(
    ("count", "pair", "words"),
    [
        (0, ("cpu", "cpu"), "no GPU is visible"),
        (1, ("cuda:0", "cuda:0"), "on two streams"),
        (4, ("cuda:0", "cuda:1"), "4 GPUs are visible"),
    ],
)
def test_devices_that_are_there(count: int, pair: tuple[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    devices, why = run.parse_devices(None)
    assert tuple(map(str, devices)) == pair
    assert words in why
    assert "\n" not in why


def test_report_and_plot(tmp_path: Path) -> None:
    result = small()
    console = Console(width=120, record=True, file=(tmp_path / "out.txt").open("w"))
    report.show(result, console)
    text = console.export_text()
    for words in ("forward", "training step", "conv5", "total", LRN, "tower 1 → 0", "CPU time"):
        assert words in text
    report.plot(result, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OSError, match=r"cannot write .*nowhere"):
        report.plot(result, tmp_path / "nowhere" / "ratios.png")
    assert list(tmp_path.glob(".*")) == []


def invoke(*arguments: str):
    return CliRunner().invoke(command_line.app, ["compare", *arguments])


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    file = tmp_path / "result.json"
    missing = tmp_path / "missing.png"
    photograph = images.default_photographs()[0]
    options = ["--variant", "tiny", "--batch", "2", "--rounds", "1", "--devices", "cpu,cpu", "--json", str(file)]
    found = invoke(str(photograph), str(missing), *options)
    assert found.exit_code == 0, found.output
    assert "missing.png: does not exist" in found.output.replace("\n", "")
    assert "1 images (astronaut.png), 1 skipped" in found.output
    assert "all results agree with fp64" in found.output
    result = json.loads(file.read_text())
    assert result["schema"] == 1
    assert len(result["rows"]) == 2 * 3 * 10


def test_the_command_exits_1_and_names_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    monkeypatch.setattr(exchange, "pull", _pull_zeros)
    found = invoke("--variant", "tiny", "--batch", "1", "--rounds", "1", "--devices", "cpu,cpu")
    assert found.exit_code == 1
    assert "wrong: output of conv3 of 'two devices'" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/nowhere/a.json"], "error: cannot write /nowhere/a.json: choose a file in a folder that exists"),
        (["--plot", "/nowhere/a.png"], "error: cannot write /nowhere/a.png: choose a file in a folder that exists"),
        (["--plot", "a.xyz"], "error: plot_file='a.xyz' must end in one of ."),
        (["--plot", "a.png"], "error: matplotlib is needed for a.png: pip install"),
    ],
)
def test_what_cannot_be_written_is_found_before_anything_is_measured(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if "matplotlib" in message:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("alexnet_kernels.cli.compare.run_comparison", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr("sys.argv", ["alexnet-kernels", "compare", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_verdict_comes_before_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exchange, "pull", _pull_zeros)
    monkeypatch.setattr("alexnet_kernels.cli.compare.write_text", full)
    options = ["--variant", "tiny", "--batch", "1", "--rounds", "1", "--devices", "cpu,cpu"]
    monkeypatch.setattr("sys.argv", ["alexnet-kernels", "compare", *options, "--json", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert "No space left on device" in said.err
    assert "wrong: output of conv3 of 'two devices'" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--variant", "vgg"], "error: variant='vgg' is unknown; the variants are paper"),
        (["compare", "--devices", "cpu"], "error: devices='cpu' must name two devices"),
        (["compare", "/nowhere/at/all.png"], "error: images: none can be used"),
        (["compare", "--batch", "none"], "Invalid value"),
        (["compare", "--nonsense"], "No such option"),
    ],
)
def test_no_traceback(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["alexnet-kernels", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_one_gpu(dtype: str) -> None:
    result = small(devices=(torch.device("cuda:0"),) * 2, dtype=dtype, batch=8)
    assert result.disagreements == ()
    backends = {r.backend for r in result.rows if r.contender == run.ONE and r.group == "conv1"}
    assert all({"triton", "cuda"} & set(backend.split("+")) for backend in backends)
