"""The benchmarks themselves, without a GPU: what would run, what is counted, who is compared with, how tuning ends."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alexnet_kernels import geometry
from alexnet_kernels.kernels import _conv_backward_choice, _conv_choice, _launch
from alexnet_kernels.ops import _choice
from alexnet_kernels.profiling import results
from alexnet_kernels.profiling.timer import Timing, relative_error
from bench import (
    baselines,
    choose,
    conftest,
    cudnn,
    gpu,
    rows,
    small_cases,
    test_conv,
    test_cpu,
    test_dropout,
    test_layers,
    test_model,
    test_overhead,
    test_stem,
    tune,
    tune_cases,
    warm,
)
from bench.cases import PASSES, TRACKS, Problem, Unit, precision, problems, tensors, units

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def unit(name: str, variant: str | geometry.Variant = "paper") -> Unit:
    return next(u for u in units(variant) if u.name == name)


# --------------------------------------------------------------------------------------------------------------- cases


def test_units_of_the_paper() -> None:
    names = [u.name for u in units("paper")]
    assert names[:5] == ["conv1+relu1", "norm1", "norm1+pool1", "pool1", "conv1 group"]
    assert names[-3:] == ["fc6+relu6", "fc7+relu7", "fc8"]
    assert len(names) == len(set(names))
    assert {u.kind for u in units("paper")} >= {"conv+relu", "lrn", "pool", "lrn+pool", "linear+relu", "linear"}


@pytest.mark.parametrize("name", geometry.VARIANTS)
def test_counts_equal_geometry(name: str) -> None:
    variant, batch = geometry.variant(name), 3
    weighted = [u for u in units(name) if any(f.macs for f in u.facts) and "group" not in u.name]
    forward = sum(Problem(u, "forward", "fp32", batch).flops for u in weighted)
    backward = sum(Problem(u, "backward", "fp32", batch).flops for u in weighted)
    assert forward == batch * variant.flops()
    assert forward + backward == batch * variant.flops(training=True)
    for u in units(name):
        if u.facts == variant.facts(u.facts[0].group):
            assert Problem(u, "forward", "bf16", batch).bytes == variant.group_bytes(u.facts[0].group, batch, 2)


def test_backward_bytes() -> None:
    pool = Problem(unit("pool1"), "backward", "bf16", 2)
    small, large = 96 * 27 * 27, 96 * 55 * 55
    assert pool.bytes == 2 * (2 * small + small + 2 * large)
    conv = Problem(unit("conv1+relu1"), "backward", "fp32", 1)
    assert conv.bytes == 4 * (96 * 55 * 55 + 3 * 227 * 227 + 2 * (96 * 363 + 96))


def test_bytes_under_autocast() -> None:
    """What multiplies gives bf16, and backward has its operands in bf16; gradients of fp32 tensors are fp32."""
    small, large, parameters = 384 * 13 * 13, 256 * 13 * 13, 384 * (256 * 9 + 1)
    conv = Problem(unit("conv3+relu3"), "forward", "amp", 2)
    assert conv.bytes == 2 * (4 * large + 2 * small) + 4 * parameters
    backward = dataclasses.replace(conv, run="backward")
    assert backward.bytes == 2 * (2 * small + 2 * large + 4 * large) + (2 + 4) * parameters
    norm = Problem(unit("norm1"), "forward", "amp", 1)
    assert norm.bytes == dataclasses.replace(norm, track="fp32").bytes
    whole = test_model.Whole("paper", "inference", "amp", 8)
    halves, singles = (dataclasses.replace(whole, track=track).bytes for track in ("bf16", "fp32"))
    fp32 = 4 * (8 * 3 * 227 * 227 + whole.variant.parameters)
    assert whole.bytes == halves + fp32 // 2 < singles


@pytest.mark.parametrize("name", ["conv2+relu2", "norm1", "pool1", "conv2 group", "fc6+relu6"])
def test_outputs_have_the_type_that_is_counted(name: str) -> None:
    for track in ("fp32", "bf16", "amp"):
        problem = Problem(unit(name, "tiny"), "forward", track, 2)
        for contender in baselines.contenders(problem, compiled=False)[0]:
            assert contender.build(problem, tensors(problem))().dtype == problem.output_dtype, (track, contender.name)


def test_a_set_of_buffers_counts_what_a_pass_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No result, and no gradient in forward: they would make less than the caches hold look like more."""
    asked: list[int] = []
    monkeypatch.setattr(rows.timer, "rotation", lambda bytes_per_set, device: asked.append(bytes_per_set) or 1)
    limits = {"seconds": 0.0, "samples": 1, "sample_ms": 0.001, "chosen": baselines.BASELINES[:1]}
    for run in PASSES:
        problem = Problem(unit("conv2+relu2", "tiny"), run, "fp32", 2)
        data, row = tensors(problem), rows.measure_problem(problem, **limits)
        weights = sum(w.nbytes for w in data.weights)
        assert asked.pop() == data.x.nbytes + weights + (data.grad.nbytes if run == "backward" else 0)
        assert row["buffer sets"] == 1
    pool = Problem(unit("pool1"), "backward", "bf16", 2)
    assert pool.bytes_read == 2 * 96 * 27 * 27 * (2 + 1)
    facts = test_conv.facts_of("forward", Problem(unit("conv2+relu2", "tiny"), "forward", "tf32", 2))
    x, weight, dz, bias = choose.tensors(facts, torch.device("cpu"))
    for run, read in {"forward": (x, weight), "dgrad": (dz, weight), "wgrad": (dz, x)}.items():
        counted = choose.bytes_read(facts._replace(run=run), x, weight, dz, bias)
        assert counted == sum(t.nbytes for t in read)
    stem = Problem(unit("conv1 group"), "forward", "bf16", 4)
    image, y = 4 * 3 * 227 * 227, 4 * 96 * 27 * 27
    assert test_stem.bytes_read(test_stem.Start(stem, "uint8", "inference")) == image
    assert test_stem.bytes_read(test_stem.Start(stem, "fp32", "training")) == 4 * image + 2 * y


def test_a_gradient_is_cast_before_it_is_timed() -> None:
    problem = Problem(unit("conv2+relu2", "tiny"), "backward", "amp", 2)
    call = baselines.Backward(problem, baselines.stock_network(problem.unit.facts), tensors(problem))
    call()
    cast = call.grad
    assert cast.dtype == torch.bfloat16
    call()
    assert call.grad is cast


def test_inputs_are_the_same_and_half_zero() -> None:
    problem = Problem(unit("conv5+relu5"), "forward", "bf16", 1)
    a, b = tensors(problem), tensors(problem)
    assert torch.equal(a.x, b.x)
    assert all(torch.equal(v, w) for v, w in zip(a.weights, b.weights, strict=True))
    assert a.x.dtype == torch.bfloat16
    assert 0.45 < float((a.x == 0).float().mean()) < 0.55
    first = tensors(Problem(unit("conv1+relu1"), "forward", "fp32", 1))
    assert float((first.x == 0).float().mean()) < 0.01
    assert float(a.weights[0].float().std()) == pytest.approx((2 / a.weights[0][0].numel()) ** 0.5, rel=0.05)


def test_precision_sets_and_restores() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    for track in TRACKS:
        with precision(track):
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is (track == "tf32")
            assert torch.backends.cudnn.benchmark
    after = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    assert after == before


# ----------------------------------------------------------------------------------------------------------- baselines


def names(problem: Problem, **options: bool) -> set[str]:
    return {c.name for c in baselines.contenders(problem, **options)[0]}


def test_who_is_compared_with_on_a_gpu() -> None:
    conv = names(Problem(unit("conv2+relu2"), "forward", "bf16", 256, "cuda"))
    assert conv >= {"eager nchw", "eager channels_last", "eager split towers nchw", "compile split towers"}
    assert conv >= {"cudnn_convolution_relu nchw", "max-autotune nchw", "max-autotune channels_last"}
    assert not any("LRN" in name or "pooling" in name for name in conv)
    lrn = names(Problem(unit("norm1"), "backward", "bf16", 256, "cuda"))
    assert "cuDNN LRN nchw" in lrn
    assert "cuDNN LRN channels_last" not in lrn  # towers as images
    assert "cuDNN LRN channels_last" in names(Problem(unit("norm1", "caffe"), "forward", "fp32", 1, "cuda"))
    assert "cuDNN pooling channels_last" in names(Problem(unit("pool2"), "backward", "fp16", 1, "cuda"))
    assert not any(
        "cuDNN" in name or "cudnn" in name for name in names(Problem(unit("pool2"), "forward", "amp", 1, "cuda"))
    )
    assert names(Problem(unit("fc8"), "forward", "bf16", 1, "cuda")).isdisjoint(
        {"eager channels_last", "ours channels_last"}
    )


def test_who_is_left_out_says_why() -> None:
    problem = Problem(unit("conv3+relu3"), "backward", "fp32", 16)
    found, left_out = baselines.contenders(problem)
    assert {c.name for c in found} == {"ours nchw", "ours channels_last", "eager nchw", "eager channels_last"}
    assert len(found) + len(left_out) == len(baselines.OURS) + len(baselines.BASELINES)
    assert left_out["eager split towers nchw"] == "no grouped convolution"
    assert left_out["cudnn_convolution_relu nchw"] == "has no backward"
    on_gpu = Problem(unit("norm1"), "forward", "fp32", 16, "cuda")
    assert not any(n.startswith("max-autotune") for n in names(on_gpu, autotune=False))
    assert not any(n.startswith(("compile", "max")) for n in names(on_gpu, compiled=False))


@pytest.mark.parametrize("name", ["conv1+relu1", "norm1", "norm1+pool1", "pool1", "conv2 group", "fc6+relu6", "fc8"])
@pytest.mark.parametrize("run", PASSES)
def test_contenders_are_right(name: str, run: str) -> None:
    problem = Problem(unit(name, "tiny"), run, "fp32", 2)
    data = tensors(problem)
    exact = baselines.truth(problem, data)
    for contender in baselines.contenders(problem, compiled=False)[0]:
        call = contender.build(problem, data.copy())
        assert relative_error(call, exact) < rows.tolerance(problem), contender.name
        assert relative_error(call, exact) < rows.tolerance(problem), f"{contender.name}, second call"


def test_a_wrong_contender_is_refused() -> None:
    exact = (torch.ones(100, dtype=torch.float64),)
    builders = {
        "ours nchw": lambda: [lambda: torch.ones(100)],
        "eager nchw": lambda: [lambda: torch.ones(100) * 1.01],
        "compile nchw": lambda: [drifting([torch.ones(100)] * 3 + [torch.zeros(100)])],
        "cuDNN": lambda: 1 / 0,
    }
    row = {"contenders": {}}
    limits = {"seconds": 1.0, "samples": 5, "sample_ms": 0.01}
    rows.measure_builders(row, builders, exact, 1e-3, torch.device("cpu"), **limits)
    states = {name: entry["status"] for name, entry in row["contenders"].items()}
    assert states == {"ours nchw": "ok", "eager nchw": "wrong", "compile nchw": "wrong", "cuDNN": "failed"}
    assert [n for n, entry in row["contenders"].items() if "milliseconds" in entry] == ["ours nchw"]
    assert "baseline" not in row
    assert "ratio" not in row


def drifting(results: list[torch.Tensor]):
    """Right at first, wrong for good once it is warm."""
    return lambda: results.pop(0) if len(results) > 1 else results[0]


def test_cudnn_symbols() -> None:
    try:
        library = cudnn.library()
    except cudnn.CudnnError as error:
        pytest.skip(str(error))
    assert library.cudnnGetVersion() >= 90000
    for name, arguments in cudnn.SIGNATURES.items():
        assert getattr(library, name).argtypes == arguments
    counts = {"cudnnLRNCrossChannelForward": 9, "cudnnLRNCrossChannelBackward": 13}
    counts |= {"cudnnPoolingForward": 8, "cudnnPoolingBackward": 12, "cudnnSetTensor4dDescriptorEx": 10}
    assert {name: len(cudnn.SIGNATURES[name]) for name in counts} == counts  # of cudnn_ops.h


def test_cudnn_descriptors() -> None:
    try:
        cudnn.library()
    except cudnn.CudnnError as error:
        pytest.skip(str(error))
    cudnn._tensor(torch.empty(2, 8, 5, 5).to(memory_format=torch.channels_last))
    cudnn._Descriptor("LRN", "cudnnSetLRNDescriptor", 5, 1e-4, 0.75, 2.0)
    with pytest.raises(cudnn.CudnnError, match="cudnnSetLRNDescriptor"):
        cudnn._Descriptor("LRN", "cudnnSetLRNDescriptor", 99, 1e-4, 0.75, 2.0)


def test_problems_of_the_cpu() -> None:
    found = problems("cpu")
    assert {p.batch for p in found} == {1, 16}
    assert {p.track for p in found} == {"fp32", "bf16"}
    assert not any("max-autotune" in n for p in found for n in names(p))
    assert problems("cuda")[0].batch == 256


# --------------------------------------------------------------------------------------------- forms of the convolution


@pytest.mark.parametrize("groups", [1, 2])
def test_every_form_of_the_convolution_is_a_contender(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a layer small enough for the interpreter, in small tiles: all that would be timed on a GPU is right."""
    for form in test_conv.FORMS:
        tile = _launch.Tile(form, 32, 16, 16)
        monkeypatch.setitem(_conv_choice.CONFIGS, form, (tile,))
    test_conv.kernel.tile_of.cache_clear()
    conv = geometry.Conv(16, 3, padding=1, groups=groups)
    shapes = ((16 * groups, 2, 3), (16, 2, 3))
    facts = (
        geometry.LayerFacts("conv", "conv", conv, *shapes, macs=9 * 16 * 16 * 6),
        geometry.LayerFacts("relu", "conv", geometry.ReLU(), shapes[1], shapes[1]),
    )
    problem = Problem(Unit("paper", "conv", facts), "forward", "tf32", 3, test_conv.DEVICE)
    ours = [contender for contender in test_conv.chosen(problem) if contender.ours]
    assert len(ours) == 4
    data = tensors(problem)
    exact = baselines.truth(problem, data)
    for contender in ours:
        assert relative_error(contender.build(problem, data), exact) < rows.tolerance(problem)


@pytest.mark.parametrize("run", ["dgrad", "wgrad"])
def test_a_gradient_alone_is_a_row(run: str) -> None:
    """On the CPU, for torch's ways: each is right, the row says which pass it is, and counts one of the unit's two."""
    conv = geometry.Conv(16, 3, padding=1, groups=2)
    shapes = ((32, 2, 3), (16, 2, 3))
    facts = geometry.LayerFacts("conv", "conv", conv, *shapes, macs=9 * 16 * 16 * 6)
    relu = geometry.LayerFacts("relu", "conv", geometry.ReLU(), shapes[1], shapes[1])
    problem = Problem(Unit("paper", "conv+relu", (facts, relu)), "forward", "tf32", 3, test_conv.DEVICE)
    row = test_conv.measure_pass(run, problem, seconds=0.0, samples=2, sample_ms=0.001)
    assert (row["case"], row["pass"]) == (f"paper/conv/{run}/tf32/3", run)
    assert {name for name, entry in row["contenders"].items() if entry["status"] == "ok"} == {
        "ours triton", "cudnn channels_last", "cudnn nchw", "cudnn split towers channels_last", "cudnn split towers nchw"
    }  # fmt: skip
    assert row["flops"] == 2 * 3 * facts.macs
    assert row["ours"] == "ours triton"


def test_the_eight_gradients_come_early() -> None:
    first = [(run, problem.unit.facts[0].name) for run, problem in test_conv.QUESTIONS[:12]]
    assert set(first) == {(run, f"conv{i}") for run in ("forward", "dgrad", "wgrad") for i in (2, 3, 4, 5)}
    assert {(p.track, p.batch) for _, p in test_conv.QUESTIONS[:12]} == {("bf16", 256)}


# ----------------------------------------------------------------------------------------------------------- the stem


@pytest.mark.parametrize("source", test_stem.SOURCES)
@pytest.mark.parametrize("run", test_stem.RUNS)
@pytest.mark.parametrize("name", ["conv1+relu1", "conv1 group"])
def test_everybody_starts_from_the_image(name: str, run: str, source: str) -> None:
    problem = Problem(unit(name, "tiny"), "forward", "fp32", 2, test_stem.DEVICE)
    start = test_stem.Start(problem, source, run)
    exact, made = test_stem.truth(start), test_stem.builders(start, compiled=False)
    assert {"ours channels_last", "eager nchw", "eager channels_last", "eager split towers channels_last"} <= set(made)
    assert ("ours nchw" in made) == (source == "fp32")
    for contender, build in made.items():
        (call,) = build()
        assert relative_error(call, exact) < test_stem.limit(start), contender


def test_a_stem_counts_its_image_as_it_comes() -> None:
    problem = Problem(unit("conv1 group"), "forward", "bf16", 4)
    image = 4 * 3 * 227 * 227
    pixels, floats = (test_stem.counted(test_stem.Start(problem, s, "inference")) for s in test_stem.SOURCES)
    assert pixels["bytes"] == problem.bytes - image
    assert floats["bytes"] == problem.bytes + 2 * image
    both = test_stem.counted(test_stem.Start(problem, "uint8", "training"))
    backward = dataclasses.replace(problem, run="backward")
    assert both == {"flops": problem.flops + backward.flops, "bytes": problem.bytes + backward.bytes - 2 * image}


@pytest.mark.parametrize("name", ["ours", "eager"])
def test_dropout_is_judged_by_what_was_kept(name: str) -> None:
    problem = dataclasses.replace(test_dropout.problem_of("fc6", "fp32", 16, "tiny"), device=test_dropout.DEVICE)
    data, layer = tensors(problem), getattr(test_dropout, name)
    found = test_dropout.call(layer, data)()
    assert test_dropout.why_wrong(problem, data, found) is None
    assert "relative errors" in (test_dropout.why_wrong(problem, data, (*found[:3], found[3] * 1.01)) or "")
    everything = test_dropout.call(lambda *t: torch.relu(torch.nn.functional.linear(*t)) * 2, data)()
    assert "of the outputs were kept" in (test_dropout.why_wrong(problem, data, everything) or "")


def test_a_row_with_dropout() -> None:
    problem = dataclasses.replace(test_dropout.problem_of("fc7", "fp32", 8, "tiny"), device="cpu")
    layers = {"ours": test_dropout.ours, "eager": test_dropout.eager, "compile": lambda *t: 1 / 0}
    row = test_dropout.measure(problem, layers, seconds=0.0, samples=2, sample_ms=0.001)
    assert {name: entry["status"] for name, entry in row["contenders"].items()} == {
        "ours": "ok", "eager": "ok", "compile": "wrong"
    }  # fmt: skip
    assert row["ours"] == "ours" and row["baseline"] == "eager"
    assert "ZeroDivisionError" in row["contenders"]["compile"]["reason"]


# ------------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("run", test_model.RUNS)
def test_networks_as_graphs(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user of ours calls gives what the plain step gives; here without a graph."""
    whole = test_model.Whole("tiny", run, "fp32", 2)
    weights, (x, labels) = test_model._weights(whole), test_model._inputs(whole)
    exact = test_model._truth(whole, weights, x, labels)

    def model() -> torch.nn.Module:
        found = test_model.models.alexnet(whole.variant)
        found.load_state_dict(weights)
        return found.to(test_model.DEVICE)

    calls = [test_model._graphed(whole, model(), x, labels)]
    calls += [test_model._call(whole, model(), x, labels, stepping=test_model._our_step)]
    for call in calls:
        assert relative_error(call, exact) < test_model._tolerance(whole)
        assert relative_error(call, exact) < test_model._tolerance(whole), "second step"
    monkeypatch.setattr(test_model, "DEVICE", torch.device("cuda"))
    budget = dataclasses.make_dataclass("Budget", ["compiled", "autotune"])("first", False)
    found = test_model._builders(dataclasses.replace(whole, network="paper"), weights, x, labels, budget)
    assert "ours graphed channels_last" in found
    assert ("ours graphed at once channels_last" in found) == (run == "inference")
    assert ("ours optim.SGD channels_last" in found) == (run == "training")
    assert not any(name.startswith("compile") for name in found)
    found = test_model._builders(
        dataclasses.replace(whole, network="paper"), weights, x, labels, conftest.BUDGETS["all"]
    )
    theirs = {name for name in found if not name.startswith("ours") and "fused SGD" not in name}
    assert theirs >= {"eager nchw", "eager channels_last", "compile nchw", "max-autotune channels_last"}
    fused = {f"{name} fused SGD" for name in theirs} if run == "training" else set()
    assert {name for name in found if "fused SGD" in name} == fused


def test_the_fused_optimiser_is_a_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = test_model.Whole("tiny", "training", "fp32", 2)
    weights, (x, labels) = test_model._weights(whole), test_model._inputs(whole)
    model = test_model.stock_alexnet(whole.variant)
    model.load_state_dict(weights)
    made, plain = [], torch.optim.SGD.__init__

    def seen(self: torch.optim.SGD, *arguments: object, **options: object) -> None:
        made.append(options.get("fused"))
        plain(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "__init__", seen)
    call = test_model._fused_sgd(whole, model.to(test_model.DEVICE), x, labels)
    assert made == [True]
    exact = test_model._truth(whole, weights, x, labels)
    assert relative_error(call, exact) < test_model._tolerance(whole)


def test_what_a_short_run_compiles() -> None:
    """What a compiler may fuse, once; convolutions with their ReLU have cuDNN's fusion beside them."""
    found = {p.unit.name for p in problems("cuda") if test_layers.is_worth_compiling(p)}
    assert found == {"norm1+pool1", "norm2+pool2", "conv2 group", "conv5 group"}
    assert all((p.track, p.batch) == ("bf16", 256) for p in problems("cuda") if test_layers.is_worth_compiling(p))


def test_both_fused_gradients_are_rows_on_a_gpu() -> None:
    """CUDA's, which comes first, and Triton's by name: which should, ``make gpu`` says."""
    backward = Problem(unit("norm1+pool1"), "backward", "bf16", 256, "cuda")
    both = {"ours by Triton nchw", "ours by Triton channels_last"}
    assert both <= names(backward)
    assert not both & names(dataclasses.replace(backward, run="forward"))
    assert not both & names(dataclasses.replace(backward, device="cpu"))


def test_what_is_warmed_up_can_be_built() -> None:
    names = list(warm.jobs())
    assert len(names) == len(set(names))
    assert {"dgrad paper/conv2+relu2/forward/bf16/256", "optimiser bf16", "model paper/training/bf16/256"} <= set(names)
    assert warm.warm("optimiser fp32") is None
    assert "KeyError" in (warm.warm("no such job") or "")


def test_forms_are_measured_where_they_exist() -> None:
    names = {p.id: [c.name for c in test_conv.chosen(p)] for p in test_conv.PROBLEMS}
    assert "ours pixel_pair" in names["paper/conv3+relu3/forward/bf16/256"]
    assert {"ours group_major", "eager nchw", "eager channels_last"} <= set(names["paper/conv2+relu2/forward/bf16/256"])
    assert not any(name in ("ours nchw", "ours channels_last") for found in names.values() for name in found)


# ------------------------------------------------------------------------------------------------------------ make gpu


def test_dry_run_lists_every_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_DRY_RUN", "1")
    assert gpu.main(["--profile", "full"]) == 0
    out = capsys.readouterr().out
    for step in gpu.STEPS:
        assert f"{step.name:10} {step.seconds['full']:5.0f} s  {step.what}" in out
    assert all(name in out for name in gpu.FILES)


@pytest.mark.parametrize(("profile", "limit"), [("quick", 240), ("full", 540)])
def test_steps_fit_their_profile(profile: str, limit: float) -> None:
    assert sum(step.seconds[profile] for step in gpu.STEPS) <= gpu.PROFILES[profile] < limit


@no_gpu
def test_no_gpu_exits_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 3
    assert tune.main(["--work", str(tmp_path / "out")]) == 3
    assert choose.main(["--work", str(tmp_path / "out")]) == 3
    assert capsys.readouterr().out.count("\n") == 3
    assert not (tmp_path / "out").exists()


def _steps(*names: str) -> list[tuple[gpu.Step, float]]:
    return [(gpu.Step(n, n, {"quick": 10.0}, lambda job, n=n: [[n]]), 10.0) for n in names]


def test_a_failing_step_does_not_stop_the_rest(tmp_path: Path) -> None:
    now, seen = [0.0], []

    def execute(commands: list, environment: dict[str, str], seconds: float, log: object) -> list[gpu.Ended]:
        ((name,),) = commands
        seen.append((name, seconds))
        now[0] += {"fails": 2.0, "hangs": seconds}.get(name, 1.0)
        (tmp_path / f"{name}.jsonl").write_text('{"case": 1}\n{"cut o')
        return [({"fails": 1, "hangs": None}.get(name, 0), "last line")]

    def job(step: gpu.Step, seconds: float) -> gpu.Job:
        return gpu.Job("quick", seconds, tmp_path, tmp_path, tmp_path / f"{step.name}.jsonl")

    planned = [*_steps("good", "fails", "hangs", "late"), (_steps("never")[0][0], 0.0)]
    done = gpu.run_steps(planned, 33.0, job, io.StringIO(), lambda _: None, execute=execute, clock=lambda: now[0])
    assert [(d.step, d.status) for d in done] == [
        ("good", "passed"),
        ("fails", "failed"),
        ("hangs", "stopped"),
        ("late", "left out"),
        ("never", "left out"),
    ]
    assert seen == [("good", 10.0), ("fails", 19.0), ("hangs", 27.0)]  # what a step leaves, the next may use
    assert done[1].rows == [{"case": 1}]
    assert "no time" in done[3].reason


def test_a_small_budget_takes_the_most_important() -> None:
    planned = gpu.plan(gpu.STEPS, "full", 120.0)
    assert [own for _, own in planned] == [60.0, 40.0, 20.0, *[0.0] * (len(gpu.STEPS) - 3)]
    assert [step.name for step, _ in planned][1:3] == ["kernels", "conv"]


def test_steps_side_by_side(tmp_path: Path) -> None:
    """Each gets all of the time, their output is whole, and the worst end is the step's."""
    ends = iter([[(0, "3 passed"), (0, "4 passed")], [(0, "good"), (None, "cut off"), (1, "bad")]])
    asked = []

    def execute(commands: list, environment: dict[str, str], seconds: float, log: object) -> list[gpu.Ended]:
        asked.append((len(commands), seconds))
        return next(ends)

    steps = [gpu.Step(n, n, {"quick": 10.0}, lambda job: [["a"], ["b"]], together=True) for n in ("good", "bad")]
    job = gpu.Job("quick", 10.0, tmp_path, tmp_path, tmp_path / "rows")
    planned = [(step, 10.0) for step in steps]
    made = lambda *_: job  # noqa: E731
    done = gpu.run_steps(planned, 20.0, made, io.StringIO(), lambda _: None, execute=execute, clock=lambda: 0.0)
    assert asked == [(2, 10.0), (2, 20.0)]
    assert [(d.status, d.reason) for d in done] == [
        ("passed", "3 passed; 4 passed"),
        ("failed", "exit status 1: bad"),
    ]


def test_what_the_steps_run(tmp_path: Path) -> None:
    """Every file of benchmarks and of tests on a GPU belongs to a step; no timing runs beside another."""
    root = Path(gpu.__file__).parents[1]
    for profile in gpu.PROFILES:
        job = gpu.Job(profile, 40.0, tmp_path, tmp_path, tmp_path / "rows")
        steps = {step.name: (step, step.commands(job)) for step in gpu.STEPS}
        words = {word for _, commands in steps.values() for command in commands for word in command}
        on_gpu = {path.name for path in (root / "bench").glob("test_*.py")} - {"test_cpu.py", "test_overhead.py"}
        assert {f"bench/{name}" for name in on_gpu} <= words
        tests = {path.relative_to(root).as_posix() for path in (root / "tests").glob("test_*.py")}
        assert tests | {"tests/host", "tests/kernels/test_conv_kernel.py", "tests/kernels/test_handles.py"} <= words
        assert all((root / word).is_file() for word in words if word.endswith(".py"))
        assert {name for name, (step, _) in steps.items() if step.together} == {"kernels", "tests", "sanitizer"}


def test_libraries_are_built_where_they_are_not_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "alexnet_kernels").mkdir()
    for number, name in enumerate(
        ("setup.py", "csrc/a.cu", "alexnet_kernels/_cpu.abi3.so", "alexnet_kernels/_cuda.abi3.so")
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (number, number))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu._no_build() == "built already"
    os.utime(tmp_path / "csrc/a.cu", (9, 9))
    assert gpu._no_build() is None
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    assert gpu._no_build() == "this Python has no setuptools"


def test_run_commands(tmp_path: Path) -> None:
    speaks, hangs = "print('hello'); raise SystemExit(3)", "import time; print('so far', flush=True); time.sleep(60)"
    with (tmp_path / "log").open("w+") as log:
        assert gpu.run_commands([gpu._python("-c", speaks)], {}, 20.0, log) == [(3, "hello")]
        (status, _), other = gpu.run_commands([gpu._python("-c", hangs), gpu._python("-c", speaks)], {}, 2.0, log)
    assert (status, other) == (None, (3, "hello"))
    assert (tmp_path / "log").read_text().count("hello\n") == 2
    assert "so far" in (tmp_path / "log").read_text()


def test_summary_keeps_losing_rows_and_wrong_contenders() -> None:
    ok = {"status": "ok", "milliseconds": 2.0}
    row = {
        "section": "layers", "case": "a", "track": "fp32", "flops": 10, "bytes": 10,
        "contenders": {"ours nchw": ok, "eager nchw": {**ok, "milliseconds": 1.0}, "compile nchw": {"status": "wrong"}},
        "ours": "ours nchw", "baseline": "eager nchw",
        "ratio": {"value": 0.5, "low": 0.4, "high": 0.6, "verdict": "slower"},
    }  # fmt: skip
    text = rows.summary([row])
    assert "0.50x" in text
    assert "compile nchw wrong" in text
    assert rows.against_ceilings(row, {}) == {"of": "ours nchw"}
    assert rows.against_ceilings(row, {"fp32": 10_000.0, "copy": 20_000.0})["% of floor"] == pytest.approx(50)


def test_a_run_leaves_at_most_eight_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that measures, one that fails: numbers, log, and the figures of what was measured."""
    ok = {"status": "ok", "milliseconds": 2.0}
    row = {
        "section": "layers", "case": "a", "unit": "a", "pass": "forward", "track": "fp32", "batch": 2, "flops": 10, "bytes": 10,
        "contenders": {"ours nchw": ok, "eager nchw": ok}, "ours": "ours nchw", "baseline": "eager nchw",
        "ratio": {"value": 1.0, "low": 0.9, "high": 1.1, "verdict": "tie"},
    }  # fmt: skip
    code = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    step = gpu.Step("measures", "", {}, lambda job: [gpu._python("-c", code, str(job.rows), json.dumps(row))])
    fails = gpu.Step("fails", "", {}, lambda job: [gpu._python("-c", "raise SystemExit('planted')")])
    monkeypatch.setattr("alexnet_kernels.comparison.run.environment", lambda devices: {"gpu": "none"})
    out = tmp_path / "out"
    assert gpu.run([(step, 20.0), (fails, 20.0)], "quick", 40.0, out) == 1
    left = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert len(left) <= 8
    assert {"gpu.json", "gpu.log", "report.md"} < set(left)
    assert any(name.endswith("-speedup.png") for name in left)
    states = [(one["step"], one["status"]) for one in json.loads((out / "gpu.json").read_text())["steps"]]
    assert states == [("measures", "passed"), ("fails", "failed")]


def test_a_result_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows.publish([], tmp_path) is None
    written = rows.publish([{"section": "ceilings", "case": "copy", "ceiling": "copy", "per second": 1.0}], tmp_path)
    assert rows.digest() in written.name
    assert list(tmp_path.rglob("*.json")) == [written]


def test_a_result_names_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled to machine code, too."""
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    names = ["setup.py", "csrc/a.cpp", "csrc/a.cu", "csrc/host/a.h", "alexnet_kernels/a.py", "bench/a.py"]
    names.append("alexnet_kernels/kernels/tuned/card.json")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    seen = {rows.digest()}
    for name in names:
        (tmp_path / name).write_text("changed")
        seen.add(rows.digest())
    assert len(seen) == 1 + len(names)
    (tmp_path / "csrc/a.o").touch()
    assert rows.digest() in seen


def _session(
    tmp_path: Path, files: list[Path], arguments: tuple[str, ...] = ("bench",), **state: object
) -> SimpleNamespace:
    config = SimpleNamespace(stash=pytest.Stash(), args=list(arguments), getoption=lambda name: tmp_path)
    conftest.pytest_configure(config)
    config.stash[conftest._ROWS].append({"section": "ceilings", "case": "copy", "ceiling": "copy", "per second": 1.0})
    items = [SimpleNamespace(path=path, config=config, nodeid=path.name) for path in files]
    return SimpleNamespace(**{"config": config, "items": items, "shouldstop": False, "shouldfail": False} | state)


FILES = sorted(Path(conftest.__file__).parent.glob("test_*.py"))


def test_only_a_whole_run_is_complete(tmp_path: Path) -> None:
    assert conftest.is_complete(_session(tmp_path, FILES))
    assert not conftest.is_complete(_session(tmp_path, FILES[1:]))
    assert not conftest.is_complete(_session(tmp_path, FILES, ("bench", "bench/test_cpu.py::test_import")))
    assert not conftest.is_complete(_session(tmp_path, FILES, shouldfail="stopping after 1 failures"))
    session = _session(tmp_path, FILES)
    conftest.pytest_deselected(session.items[:1])
    assert not conftest.is_complete(session)


def test_an_interrupted_run_leaves_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for status in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        conftest.pytest_sessionfinish(_session(tmp_path, FILES), status)
        assert f"no result file: the run did not end by itself (exit status {int(status)})" in capsys.readouterr().out
    assert list(tmp_path.rglob("*.json")) == []
    conftest.pytest_sessionfinish(_session(tmp_path, FILES), pytest.ExitCode.TESTS_FAILED)
    (written,) = tmp_path.rglob("*.json")
    assert results.read(written).complete


def test_a_selection_is_marked_as_a_part(tmp_path: Path) -> None:
    """Really run: the quickest benchmark."""
    root = Path(conftest.__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "bench/test_ceilings.py", "-k", "copy", "--result", str(tmp_path)]
    command += ["--benchmark-only", "-q", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    # a benchmark refuses to run beside others, which it is told by xdist; this one is not judged by its time
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.rglob("*.json")
    found = results.read(written)
    assert not found.complete
    assert [row["ceiling"] for row in found.rows] == ["copy"]


class Pedantic:
    """As much of pytest-benchmark's fixture as a measurement needs."""

    name = "measured"

    def __init__(self) -> None:
        self.extra_info: dict[str, float] = {}

    def pedantic(self, once: Callable[[], None], rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            once()


def test_the_best_of_three_is_everybodys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the measurement that suits us best."""
    several = iter([(10.0, 30.0, 9.0), (12.0, 20.0, 11.0), (11.0, 25.0, 8.0)])

    def measured(calls: dict, rounds: int) -> dict[str, Timing]:
        return {name: Timing((ms,)) for name, ms in zip(calls, next(several), strict=True)}

    monkeypatch.setattr(test_cpu, "interleave", measured)
    benchmark = Pedantic()
    test_cpu.measure(benchmark, dict.fromkeys(("ours", "stock", "default SGD"), lambda: None), rounds=1)
    assert benchmark.extra_info == {
        "ours ms": 10.0, "stock ms": 20.0, "default SGD ms": 8.0, "stock / ours": 2.0, "default SGD / ours": 0.8
    }  # fmt: skip


def test_the_least_overhead_is_everybodys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    several = iter([(0.20, 0.18), (0.12, 0.09), (0.14, 0.06), (0.30, 0.30), (0.13, 0.10)])

    def measured(calls: dict, rounds: int) -> dict[str, Timing]:
        return {name: Timing((ms,)) for name, ms in zip(calls, next(several), strict=True)}

    monkeypatch.setattr(test_overhead, "interleave", measured)
    benchmark = Pedantic()
    test_overhead.measure(benchmark, lambda: None, lambda: None, parts=1)
    assert benchmark.extra_info == {"ours, us each": 6.0, "torch, us each": 3.0, "ours - torch, us each": 3.0}


# --------------------------------------------------------------------------------------------- what the sanitizers watch


def test_a_small_case_runs_and_names_its_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert small_cases.main(["--only", "lrn then pool fp32 nhwc bias"]) == 0
    out = capsys.readouterr().out
    assert "fused.strip_forward, fused_backward.vector_gradient" in out
    assert "dbias: relative error" in out and "1 of 1 cases, 0 errors" in out


def test_a_wrong_kernel_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = small_cases.lrn.forward
    monkeypatch.setattr(small_cases.lrn, "forward", lambda *a: right(*a) * 1.001)
    assert small_cases.main(["--only", "lrn size 5 fp32 nhwc"]) == 1
    assert "WRONG lrn size 5 fp32 nhwc: y: relative error 1.0e-03 is over 3.8e-06" in capsys.readouterr().out
    assert small_cases.main(["--seconds", "-1"]) == 0
    assert "no time for lrn then pool bf16 nhwc bias relu" in capsys.readouterr().out


def test_small_cases_of_the_convolution_run(capsys: pytest.CaptureFixture[str]) -> None:
    for word, kernels in (
        ("conv group_major bf16", "conv.group_major"),
        (
            "conv gradients bf16 nhwc tf32 64",
            "conv_backward.input_tile, conv_backward.sum_shares, conv_backward.weight_tile",
        ),
        ("sgd fp32 nesterov", "optim.sgd"),
        ("dropout bf16", "activation.dropout"),
    ):
        assert small_cases.main(["--only", word]) == 0
        out = capsys.readouterr().out
        assert f"1 Triton kernels ran: {kernels}" in out or f"3 Triton kernels ran: {kernels}" in out
        assert "1 of 1 cases, 0 errors" in out


@no_gpu
@pytest.mark.parametrize("generation", [8, 9, 10, 12])
def test_what_has_to_run_follows_from_the_gpu(generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_cases, "GENERATION", generation)
    expected = small_cases.expected()
    assert {"conv.pointer_rows", "conv_backward.weight_rows", "optim.sgd", "activation.planes_backward"} <= expected
    assert ("conv.batch_tile" in expected) == (generation >= 9)
    assert ("conv.pixel_pair" in expected) == (generation == 9)
    assert ("conv_backward.input_tile" in expected) == (generation in (9, 10))
    forms = [name for name in small_cases.cases() if "pixel_pair" in name]
    assert bool(forms) == (generation == 9)


@no_gpu
def test_small_cases_of_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU on the operations of the same schema that plain torch has: the cases themselves are right."""
    monkeypatch.setattr(small_cases, "why_no_cuda", lambda: None)
    monkeypatch.setattr(small_cases, "compiled", lambda: torch.ops.alexnet_kernels)
    names = [name for name in small_cases.cases() if name.startswith(("conv1 ", "stem "))]
    assert names[0] == next(iter(small_cases.cases())) == "conv1 bf16 nhwc 96 channels"
    for order in ("lrn then pool", "pool then lrn"):
        assert f"stem {order} bf16 nchw 96 channels uint8" in names
        assert f"stem {order} fp32 nhwc 48 channels" in names
    for name in names:
        if name.endswith(("bf16 nhwc 96 channels uint8", "fp32 nchw 48 channels")):
            assert small_cases.run(name)[0] == [], name


@pytest.mark.slow
def test_every_kernel_has_a_small_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert small_cases.main([]) == 0, capsys.readouterr().out
    assert small_cases.main(["--all-cores", "--only", "lrn size 5 fp32"]) == 0
    assert "2 of 2 cases, 0 errors" in capsys.readouterr().out


def test_the_sanitizers_get_warm_kernels(tmp_path: Path) -> None:
    job = gpu.Job("quick", 40.0, tmp_path, tmp_path, tmp_path / "rows")
    steps = {step.name: step.commands(job) for step in gpu.STEPS}
    assert list(steps).index("kernels") < list(steps).index("sanitizer")
    assert steps["kernels"][0][1:] == ["-m", "bench.small_cases", "--all-cores"]
    assert [command[2] for command in steps["sanitizer"]] == ["memcheck", "racecheck", "synccheck"]
    assert all("bench.small_cases" in command for command in steps["sanitizer"])


# ----------------------------------------------------------------------------------------------------------- make tune


def _fakes(log: list[str]) -> tuple[Callable, Callable]:
    def compiler(work, arch, seconds):
        for candidate in work:
            log.append(f"compile {candidate.id}")
            spills = 8 if candidate.config.block == 512 else 0
            shared = 10**6 if candidate.config.num_warps == 8 else 0
            yield candidate, tune.Compiled(40, spills, shared)

    def runner(kernel, chosen):
        log.append(f"run {kernel}: {', '.join(c.id for c in chosen)}")
        assert all(c.config.block != 512 and c.config.num_warps != 8 for c in chosen)
        return {
            c.id: "wrong: far off" if c.config.block == 64 else 1.0 + c.config.block + c.config.num_warps
            for c in chosen
        }

    return compiler, runner


def test_tune_prunes_and_resumes(tmp_path: Path) -> None:
    work = tuple(c for c in tune.candidates() if c.kernel.startswith("lrn.vector"))
    path, log = tmp_path / "tune.json", list[str]()
    compiler, runner = _fakes(log)
    state = tune.State.load(path, "d", "card")
    found = tune.tune(state, 90, 100.0, work=work, compiler=compiler, runner=runner)
    assert found.kernels == {f"lrn.vector_{way}": _launch.Config(128, 2) for way in ("forward", "backward")}
    assert "spills 8 bytes" in found.pruned["lrn.vector_forward block=512 num_warps=2"]
    assert "shared memory" in found.pruned["lrn.vector_forward block=128 num_warps=8"]
    assert "wrong" in found.pruned["lrn.vector_forward block=64 num_warps=2"]
    assert tune.table(found, state)["kernels"] == {
        "lrn": {f"vector_{way}": {"block": 128, "num_warps": 2} for way in ("forward", "backward")}
    }

    log.clear()
    again = tune.tune(tune.State.load(path, "d", "card"), 90, 100.0, work=work, compiler=compiler, runner=runner)
    assert again == found
    assert log == []
    assert tune.State.load(path, "other sources", "card").compiled == {}
    path.write_text("{")
    assert tune.State.load(path, "d", "card").timed == {}


def test_tune_keeps_its_budget(tmp_path: Path) -> None:
    kernels = ("lrn.vector_forward", "fused.strip_forward")
    work, now = tuple(c for c in tune.candidates() if c.kernel in kernels and c.config.block == 128), [0.0]
    compiler, runner = _fakes([])

    def slow(kernel, chosen):
        now[0] += 60.0
        return runner(kernel, chosen)

    state = tune.State.load(tmp_path / "s.json", "d", "card")
    found = tune.tune(state, 90, 50.0, work=work, compiler=compiler, runner=slow, clock=lambda: now[0])
    assert set(found.kernels) == {"lrn.vector_forward"}
    assert found.left_out == ("fused.strip_forward: not timed",)


def test_registers_prune() -> None:
    candidate = tune.Candidate("lrn.vector_forward", _launch.Config(128, 16))
    assert "registers" in (tune.why_pruned(candidate, tune.Compiled(200, 0, 0), 90) or "")
    assert tune.why_pruned(candidate, tune.Compiled(0, 0, 0, "ValueError: x"), 90) == "does not compile: ValueError: x"


def test_tune_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(kernel in out for kernel in tune_cases.KERNELS)
    assert "tuned" in out


@pytest.mark.parametrize("part", [tune, choose])
def test_the_budget_of_the_environment(
    part, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_SECONDS", "abc")
    with pytest.raises(SystemExit) as stopped:
        part.main(["--dry-run"])
    assert stopped.value.code == 2
    assert "argument --budget: invalid float value: 'abc'" in capsys.readouterr().err
    monkeypatch.setenv("TUNE_SECONDS", "")
    assert part.main(["--dry-run"]) == 0


def test_a_choice_stands_for_all_kernel_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device code of the convolution and its epilogue lies in several files, _tile.py among them."""
    monkeypatch.setattr(_launch, "__file__", str(tmp_path / "_launch.py"))
    (tmp_path / "_tile.py").write_text("def activate(): ...")
    before = choose.digest()
    (tmp_path / "_tile.py").write_text("def activate(x): ...")
    assert choose.digest() != before


def test_every_kernel_that_can_be_tuned_is() -> None:
    """Each entry of a family's ``CONFIGS``; of convolutions, under the keys that the kernels ask the table for."""
    plain = {f: module for f, module in tune_cases.FAMILIES.items() if not f.startswith("conv")}
    configured = {f"{family}.{name}" for family, module in plain.items() for name in module.CONFIGS}
    assert configured == {kernel for kernel in tune_cases.KERNELS if not kernel.startswith("conv")}
    assert {f"conv_backward.{name}" for name in _conv_backward_choice.TILES} <= set(tune_cases.KERNELS)
    for key in ("48x5x5-128", "256x3x3-384", "192x3x3-192", "192x3x3-128"):
        assert {f"conv.many {key} 16 bits", f"conv.many {key} tf32"} <= set(tune_cases.KERNELS)
    assert "conv_backward_sum.sum_shares" in tune_cases.KERNELS
    assert list(tune_cases.KERNELS)[:2] == ["conv.many 48x5x5-128 16 bits", "conv.many 256x3x3-384 16 bits"]


def _seen(launches: list[_launch.Launch]) -> set[tuple[object, ...]]:
    return {(x.name, x.grid, x.num_warps, x.num_stages, *map(str, x.constants.items())) for x in launches}


@pytest.mark.parametrize("kernel", tune_cases.KERNELS)
def test_the_launches_of_a_candidate_are_planned_without_memory(kernel: str) -> None:
    """By way of the table, as a GPU will read it: no two candidates of a kernel give the same launch."""
    candidates = [c for c in tune.candidates() if c.kernel == kernel]
    assert 5 <= len(candidates) <= 12
    default = _seen(tune.plans(candidates[0]))
    module, _ = candidates[0].place
    before = module.tuned
    for candidate in candidates[1:3]:
        launches = tune.plans(candidate)
        assert len(launches) in (1, 2, 4, 12)
        assert not default & _seen([x for x in launches if x.name != "sum_shares" or "sum" in kernel]), candidate.id
        assert {launch.num_warps for launch in launches} >= {candidate.config.num_warps}
    assert module.tuned is before


@pytest.mark.slow
def test_candidates_are_compiled_in_processes_of_their_own() -> None:
    work = [tune.built_in("lrn.vector_forward"), tune.built_in("pool.cell_backward")]
    work.append(tune.Candidate("lrn.vector_forward", _launch.Config(100, 4)))  # no power of two
    found = {candidate.id: compiled for candidate, compiled in tune.compile_all(work, 90, 300.0, workers=2)}
    right, pooled, wrong = (found[candidate.id] for candidate in work)
    assert 16 <= right.registers <= 64 and right.spill_bytes == pooled.spill_bytes == 0
    assert tune.why_pruned(work[0], right, 90) is tune.why_pruned(work[1], pooled, 90) is None
    assert "power of 2" in wrong.error


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that the interpreter gets through."""
    monkeypatch.setattr(tune_cases, "_norms", lambda: iter([((2, 16, 5, 5), (5, 2e-2, 0.75, 2.0, 2))]))
    monkeypatch.setattr(tune_cases, "_pools", lambda: iter([(2, 8, 5, 5)]))
    monkeypatch.setattr(tune_cases, "_maps", lambda: iter([(2, 8, 3, 5), (3, 40)]))
    monkeypatch.setattr(tune_cases, "_sizes", lambda: iter([100, 3]))


def _is_judged(kernel: str, config: object, device: str) -> None:
    """What the kernel writes is right, and what it has not written is not."""
    with tune.instead(tune.Candidate(kernel, config)):
        for case in tune.cases(kernel, device):
            launches, truth = case.launches(), case.truth()
            assert tune.why_wrong(case, launches, truth) is None
            nothing = [dataclasses.replace(launch, grid=(0,)) for launch in launches]
            assert "relative error nan" in (tune.why_wrong(case, nothing, truth) or "")


@pytest.mark.parametrize("kernel", [kernel for kernel in tune_cases.KERNELS if not kernel.startswith("conv")])
def test_a_wrong_launch_is_not_timed(small_network: None, kernel: str) -> None:
    """In the interpreter, or on a GPU."""
    block = 64 if kernel.startswith(("activation", "optim")) else 16
    _is_judged(kernel, _launch.Config(block, 1), "cuda" if torch.cuda.is_available() else "cpu")


SMALL = tune_cases.Layer(32, 2, 32, 3, 2)


@no_gpu
def test_a_wrong_convolution_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, by two forms, forward; the table's key is what the kernel asks for."""
    kernel, row = tune_cases.conv_row(SMALL, torch.float32, (64,))
    assert kernel == "conv.many 16x3x3-16 tf32"
    monkeypatch.setitem(tune_cases.KERNELS, kernel, row)
    for form in ("batch_tile", "pixel_pair"):
        tile = _launch.Tile(form, 64, 16, 16)
        with tune.instead(tune.Candidate(kernel, tile)):
            (launch,) = next(tune.cases(kernel, "cpu")).launches()
        assert launch.name == form and launch.constants["BLOCK"][:2] == (64, 16)
        _is_judged(kernel, tile, "cpu")


@no_gpu
@pytest.mark.parametrize("kind", ["input", "weight", "sum"])
def test_a_wrong_gradient_is_not_timed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "sum":
        kernel, row = (
            "conv_backward_sum.sum_shares",
            tune_cases.Kernel((), functools.partial(tune_cases._sum, SMALL, 64)),
        )
        config: object = _launch.Config(64, 1)
    else:
        kernel, row = next(pair for pair in tune_cases.gradient_rows(SMALL, 64) if kind in pair[0])
        config = dataclasses.replace(row.default, block_k=16, num_stages=2)
    monkeypatch.setitem(tune_cases.KERNELS, kernel, row)
    _is_judged(kernel, config, "cpu")


def test_a_tuned_table_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "card.json"
    monkeypatch.setattr(_launch, "table_of", lambda gpu: path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    read = _launch.tuned.__wrapped__
    card = torch.device("cuda", 0)
    assert read("lrn", card) == {}
    path.write_text('{"kernels": {"lrn": {"ring_forward": {"block": 64, "num_warps": 2}}}}')
    assert read("lrn", card) == {"ring_forward": _launch.Config(64, 2)}
    assert read("other", card) == {}
    row = '{"form": "batch_tile", "block_m": 64, "block_n": 128, "block_k": 32, "num_stages": 4}'
    path.write_text('{"kernels": {"conv": {"many 48x5x5-128 16 bits": ' + row + "}}}")
    tile = _launch.Tile("batch_tile", 64, 128, 32, num_stages=4)
    assert read("conv", card, _launch.Tile) == {"many 48x5x5-128 16 bits": tile}
    path.write_text('{"kernels": {"lrn": {"ring_forward": {"blocks": 64}}}}')
    with pytest.warns(UserWarning, match="is no tuned table"):
        assert read("lrn", card) == {}
    assert read("lrn", torch.device("cpu")) == {}


def test_table_of() -> None:
    assert _launch.table_of("NVIDIA H200").name == "nvidia-h200.json"


def test_a_part_of_a_table_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    assert tune.known_table(path) == {}
    path.write_text('{"choices": {"conv2d": []}, "kernels": {}}')
    assert {**tune.known_table(path), "kernels": 1} == {"choices": {"conv2d": []}, "kernels": 1}
    path.write_text("[1]")
    assert tune.known_table(path) == {}


def test_cases_to_choose_for() -> None:
    """Once each, all networks' layers and towers, no gradient for the image, the usual batch first."""
    cases = list(choose.cases())
    names = [choose.id_of(facts) for facts in cases]
    assert len(names) == len(set(names)) == len({(facts.key, facts.batch) for facts in cases})
    assert not [n for n in names if n.startswith("dgrad") and " 3x22" in n]
    first = [facts for facts in cases if facts.batch == 256 and facts.dtype == "bfloat16"]
    assert first == cases[: len(first)]
    conv2 = [f for f in first if f.weight == (256, 48, 5, 5)]
    assert [f.run for f in conv2] == ["forward", "dgrad", "wgrad"]
    assert not any(f.epilogue for f in conv2), "response normalisation takes bias and ReLU over"
    assert all(f.epilogue for f in first if f.run == "forward" and f.weight == (384, 256, 3, 3))
    assert any(f.weight == (128, 48, 5, 5) and f.groups == 1 for f in first), "a tower's"


def timings(**milliseconds: float) -> dict[str, Timing]:
    return {
        name.replace("_", " "): Timing(tuple(ms * (1 + 0.01 * (i % 3)) for i in range(9)))
        for name, ms in milliseconds.items()
    }


@pytest.mark.parametrize(
    ("measured", "way"),
    [
        (timings(triton=0.2, cudnn=0.3), "triton"),
        (timings(triton=0.3, cudnn=0.2), "cudnn"),
        (timings(triton=0.25, cudnn=0.3, cudnn_split=0.2), "cudnn split"),
        (timings(triton=0.2, cudnn=0.3, cudnn_split=0.25), "triton"),
        (timings(triton=0.3, cudnn=0.3), "cudnn"),  # nothing between them: what torch does
        (timings(triton=0.3), "triton"),  # torch's way failed
    ],
)
def test_a_lead_has_to_be_certain(measured: dict[str, Timing], way: str) -> None:
    assert choose.decide(measured) == way


def test_choosing_resumes_and_keeps_its_budget(tmp_path: Path) -> None:
    now, rows_, saved = [0.0], {}, []

    def runner(facts):
        now[0] += 10.0
        if facts.run == "wgrad":
            raise RuntimeError("out of memory")
        return timings(triton=0.2, cudnn=0.3), {"cudnn split": "wrong: far off"}

    def once() -> list[str]:
        return choose.choose(rows_, 55.0, lambda: saved.append(len(rows_)), runner, lambda: now[0])

    left_out = once()
    assert saved == [1, 2, 3, 4]
    assert sum("out of memory" in line for line in left_out) == 2
    assert sum("out of time" in line for line in left_out) == len(list(choose.cases())) - 6
    once()
    assert len(rows_) > 4
    for name, row in rows_.items():
        key, read = _choice.parse(row)
        assert read.way == row["way"] == "triton"
        assert row["wrong"] == {"cudnn split": "wrong: far off"}
        assert choose.id_of(next(f for f in choose.cases() if (f.key, f.batch) == (key, read.batch))) == name

    path, stamp = tmp_path / "choose.json", {"digest": "d", "gpu": "card"}
    assert choose.load(path, stamp) == {}
    path.write_text(json.dumps({**stamp, "rows": rows_}))
    assert choose.load(path, stamp) == rows_
    assert choose.load(path, {**stamp, "digest": "other sources"}) == {}
    path.write_text("{")
    assert choose.load(path, stamp) == {}


@pytest.mark.parametrize("run", _choice.PASSES)
@pytest.mark.parametrize("way", ["cudnn", "cudnn split"])
def test_what_is_timed_is_right(run: str, way: str) -> None:
    """Torch's ways on a CPU, against the fp64 that they are held to."""
    facts = _choice.Facts(
        run, "tf32", True, (3, 4, 5, 6), (6, 2, 3, 3), (1, 1), (1, 1), (1, 1), 2, run == "forward"  # type: ignore[arg-type]
    )  # fmt: skip
    inputs = choose.tensors(facts, torch.device("cpu"))
    exact = choose.truth(facts, *inputs)
    got = choose.call(facts, way, *inputs)[: len(exact)].double()
    assert float((got - exact).norm() / exact.norm()) < 1e-6
    assert choose.tensors(facts, torch.device("cpu"))[0].is_contiguous(memory_format=torch.channels_last)
