"""Which way a convolution goes: the table of a GPU, the model in its place, and what explain says of both. No GPU is needed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import alexnet_kernels as ak
from alexnet_kernels import dispatch, reference
from alexnet_kernels import functional as F
from alexnet_kernels.kernels import _launch
from alexnet_kernels.ops import _choice, _conv_ways, conv
from alexnet_kernels.ops._choice import PASSES, Choice, Facts, Row

SM90 = (9, 0)
CONV2 = Facts(
    "forward", "bfloat16", True, (256, 96, 27, 27), (256, 48, 5, 5), (1, 1), (2, 2), (1, 1), 2
)  # of the paper's network
CONV3 = CONV2._replace(shape=(256, 256, 13, 13), weight=(384, 256, 3, 3), padding=(1, 1), groups=1)
TIMES = {"triton": 0.2, "cudnn": 0.3, "cudnn split": 0.25}


# -------------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    "facts",
    [
        CONV2,
        CONV3._replace(run="wgrad", dtype="tf32", channels_last=False),
        CONV2._replace(stride=(2, 3), dilation=(3, 1)),
    ],
)
def test_a_row_is_read_as_it_was_written(facts: Facts) -> None:
    row = json.loads(json.dumps(_choice.row_of(facts, "triton", TIMES)))
    key, read = _choice.parse(row)
    assert key == facts.key
    assert read == Row(facts.batch, "triton", TIMES)


def test_what_a_table_looks_like() -> None:
    assert _choice.row_of(CONV2, "triton", TIMES) == {
        "pass": "forward",
        "dtype": "bfloat16",
        "layout": "channels_last",
        "geometry": "48x27x27 128x5x5 stride 1x1 padding 2x2 dilation 1x1 groups 2",
        "batch": 256,
        "way": "triton",
        "milliseconds": TIMES,
    }


def test_cases_that_are_one_and_cases_that_are_not() -> None:
    larger = CONV2._replace(shape=(64, 96, 28, 28), epilogue=True)
    assert larger.key == CONV2.key
    others = {
        "run": "dgrad", "dtype": "float16", "channels_last": False, "shape": (256, 96, 55, 55), "weight": (192, 48, 5, 5),
        "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 1,
    }  # fmt: skip
    keys = {CONV2._replace(**{name: value}).key for name, value in others.items()}
    assert len(keys | {CONV2.key}) == len(others) + 1


def test_larger_batches_follow_the_largest_that_was_measured() -> None:
    rows = tuple(Row(batch, "triton", {}) for batch in (1, 32, 64, 256))
    found = {batch: _choice.look_up(rows, batch) for batch in (1, 2, 32, 64, 128, 192, 256, 512, 200, 257)}
    assert {batch: row and row.batch for batch, row in found.items()} == {
        1: 1, 2: None, 32: 32, 64: 64, 128: 64, 192: 64, 256: 256, 512: 256, 200: None, 257: None,
    }  # fmt: skip
    assert _choice.look_up((), 64) is None


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the table of the GPU "card", an sm_90, is looked for."""
    monkeypatch.setattr(_launch, "table_of", lambda gpu: tmp_path / f"{gpu}.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: SM90)
    _choice.table.cache_clear()
    _choice.choose.cache_clear()
    yield tmp_path / "card.json"
    _choice.table.cache_clear()
    _choice.choose.cache_clear()


def write(path: Path, *rows: dict) -> None:
    path.write_text(json.dumps({"kernels": {}, "choices": {"conv2d": rows}}))


def test_what_was_measured_goes_before_the_model(path: Path) -> None:
    write(
        path, _choice.row_of(CONV3, "cudnn", TIMES), _choice.row_of(CONV2._replace(run="dgrad"), "cudnn split", TIMES)
    )
    device = torch.device("cuda", 0)
    assert _choice.choose(CONV3, device) == Choice(
        "cudnn",
        "measured on this GPU with 256 images, in ms: triton 0.200, cudnn split 0.250, cudnn 0.300",
        "cudnn split",
    )
    assert _choice.choose(CONV2._replace(run="dgrad"), device).way == "cudnn split"
    assert _choice.model(CONV3._replace(epilogue=True), SM90).way == "triton"
    assert "a model gives" in _choice.choose(CONV2, device).why


def test_no_table(path: Path) -> None:
    assert _choice.table("card") == {}
    path.write_text('{"kernels": {}}')  # tuned launches alone
    _choice.table.cache_clear()
    assert _choice.table("card") == {}


BROKEN = [
    "{",
    "[]",
    '{"choices": {"conv2d": [{}]}}',
    '{"choices": {"conv2d": 3}}',
    *(
        json.dumps({"choices": {"conv2d": [_choice.row_of(CONV2, "triton", TIMES) | wrong]}})
        for wrong in (
            {"way": "winograd"},
            {"pass": "sideways"},
            {"layout": "nchw"},
            {"geometry": "48x27 128x5x5 stride 1x1 padding 2x2 dilation 1x1 groups 2"},
            {"geometry": "48x27x27 128x5x5 padding 1x1 stride 2x2 dilation 1x1 groups 2"},
            {"batch": "many"},
            {"milliseconds": {"triton": None}},
        )
    ),
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_table_is_a_warning_and_the_model(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"card\.json has no table of convolutions .*; a model chooses instead"):
        assert _choice.choose(CONV2, torch.device("cuda", 0)) == _choice.model(CONV2, SM90)


# -------------------------------------------------------------------------------------------------------------- the model


def test_the_model_of_the_papers_network() -> None:
    """Forward passes of many images go to Triton; a gradient only where there are groups; the rest waits for a measurement."""
    assert _choice.model(CONV2, SM90).way == "triton"
    assert _choice.model(CONV3._replace(epilogue=True), SM90).way == "triton"
    for run in ("dgrad", "wgrad"):
        assert _choice.model(CONV3._replace(run=run), SM90).way == "cudnn"
        conv4 = CONV3._replace(run=run, shape=(256, 384, 13, 13), weight=(384, 192, 3, 3), groups=2)
        assert _choice.model(conv4, SM90).way == "triton"


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({"dtype": "ieee"}, SM90, "fp32 as ieee"),
        ({"dtype": "tf32x3"}, SM90, "fp32 as tf32x3"),
        ({"dtype": "tf32", "run": "dgrad"}, SM90, "dgrad in tf32"),
        ({"groups": 1, "weight": (256, 96, 5, 5), "run": "wgrad"}, SM90, "wgrad without groups"),
        ({"channels_last": False}, SM90, "contiguous maps"),
        ({"shape": (1, 96, 27, 27)}, SM90, "1 images of these sizes do not fill"),
        ({"shape": (200, 96, 27, 27)}, SM90, "a model gives cuDNN 0.9"),
        ({"shape": (256, 6, 27, 27), "weight": (256, 3, 5, 5)}, SM90, "do not fill"),
        ({}, (8, 0), "compute capability 8.0"),
        ({}, (12, 0), "compute capability 12.0"),
    ],
)
def test_what_the_model_leaves_to_cudnn(change: dict, capability: tuple[int, int], reason: str) -> None:
    choice = _choice.model(CONV2._replace(**change), capability)
    assert choice.way == choice.torchs == "cudnn"
    assert reason in choice.why


def test_cudnn_pays_for_the_pass_after_it() -> None:
    """Bias and ReLU are free behind a kernel of ours, and one more pass over the result behind cuDNN's."""
    conv4 = CONV3._replace(shape=(256, 384, 13, 13), weight=(256, 384, 3, 3))
    whys = [_choice.model(conv4._replace(epilogue=after), SM90).why for after in (False, True)]
    ratios = [float(re.findall(r"cuDNN (\S+) times", why)[0]) for why in whys]
    assert ratios[0] < ratios[1]


def test_a_batch_that_fills_its_tiles_issues_no_more_than_the_usual_count() -> None:
    for facts, run in itertools.product((CONV2, CONV3), PASSES):
        in_tiles, share = _choice.planned(facts._replace(run=run))
        assert in_tiles
        assert 0.7 < share <= 1.18, (run, share)


# --------------------------------------------------------------------------------------------- what the dispatcher makes of it


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """CPU tensors in the place of a GPU's: both backends can run, and go the ways that this says, by pass."""
    ways = dict.fromkeys(PASSES, "triton")
    for op in ("conv2d", "conv2d_dgrad", "conv2d_wgrad"):
        runs = {row.backend: row.run for row in dispatch._table[op]}
        rows = [
            dispatch.Implementation(row.backend, row.why_not, runs["reference"] if row.backend == "triton" else row.run)
            for row in dispatch._table[op]
        ]
        monkeypatch.setitem(dispatch._table, op, rows)
    monkeypatch.setattr(_conv_ways, "triton_why_not", lambda x: None)
    monkeypatch.setattr(_conv_ways, "_cudnn_cannot", lambda x: None)
    monkeypatch.setattr(_conv_ways, "runs_ours", lambda y: False)

    def choose(facts: Facts, device: torch.device) -> Choice:
        way = ways[facts.run]
        return Choice(way, f"{facts.run} by {way}", way if way.startswith("cudnn") else "cudnn")

    monkeypatch.setattr(_choice, "choose", choose)
    return ways


def run(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    y = conv._on_kernel(x, w, b, True, ((1, 1), (1, 1), (1, 1), 2, None))
    assert y is not None
    return y, *torch.autograd.grad(y, (x, w, b), torch.ones_like(y))


@pytest.mark.parametrize("forward", ["triton", "cudnn", "cudnn split"])
@pytest.mark.parametrize(("dgrad", "wgrad"), list(itertools.product(["triton", "cudnn", "cudnn split"], repeat=2)))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_pass_goes_its_own_way(gpu: dict[str, str], forward: str, dgrad: str, wgrad: str, layout) -> None:
    gpu.update(forward=forward, dgrad=dgrad, wgrad=wgrad)
    inputs = [torch.randn(shape, dtype=torch.double) for shape in ((2, 4, 5, 6), (6, 2, 3, 3), (6,))]
    x, w, b = (t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in inputs)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    with dispatch.recording() as used:
        found = run(*leaves)
    assert used == {way.split()[0] for way in (forward, dgrad, wgrad)}
    expected = torch.nn.functional.conv2d(*leaves, 1, 1, 1, 2).relu()
    wanted = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
    for got, want in zip(found, (expected, *wanted), strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


def test_torch_makes_both_gradients_in_one_call(gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[tuple[bool, bool]] = []
    original = _conv_ways.gradients
    monkeypatch.setattr(_conv_ways, "gradients", lambda *a: masks.append(a[4]) or original(*a))
    inputs = [torch.randn(s, requires_grad=True) for s in ((2, 4, 5, 6), (6, 2, 3, 3), (6,))]
    for dgrad, wgrad in (("cudnn", "cudnn"), ("cudnn split", "cudnn")):
        gpu.update(dgrad=dgrad, wgrad=wgrad)
        run(*inputs)
    assert masks == [(True, True), (True, False), (False, True)]


def test_explain_says_which_pass_runs_where_and_why(gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.update(forward="cudnn", wgrad="cudnn split")
    x, w, b = torch.randn(2, 4, 5, 6), torch.randn(6, 2, 3, 3), torch.randn(6)
    said = ak.explain(F.conv2d_relu, x, w, b, padding=1, groups=2)
    assert (said.op, said.backend) == ("conv2d_relu", "cudnn + reference")
    assert [(part.op, part.backend) for part in said.parts] == [("conv2d", "cudnn"), ("bias_relu", "reference")]
    assert said.why_not["triton"] == said.parts[0].why_not["triton"] == "forward by cudnn"

    for t in (x, w, b):
        t.requires_grad_()
    said = ak.explain(F.conv2d_relu, x, w, b, padding=1, groups=2)
    assert [(part.op, part.backend) for part in said.parts[2:]] == [
        ("bias_relu_backward", "reference"),
        ("conv2d_dgrad", "triton"),
        ("conv2d_wgrad", "cudnn"),
    ]
    assert said.parts[3].why_not["cudnn"] == "dgrad by triton"
    assert said.parts[4].why_not["triton"] == "wgrad by cudnn split"
    assert "\n  conv2d_wgrad runs on cudnn\n    not triton: wgrad by cudnn split" in str(said)

    gpu.update(forward="triton")
    with torch.no_grad():
        said = ak.explain(F.conv2d_relu, x, w, b, padding=1, groups=2)
    assert (said.op, said.backend, said.parts) == ("conv2d_relu", "triton", ())
    assert said.why_not["cudnn"] == "forward by triton"


def test_a_backend_that_is_asked_for_by_name_is_not_chosen_again(gpu: dict[str, str]) -> None:
    gpu.update(dict.fromkeys(PASSES, "cudnn"))
    inputs = [torch.randn(s, requires_grad=True) for s in ((2, 4, 5, 6), (6, 2, 3, 3), (6,))]
    for backend in ("triton", "cudnn", "reference"):
        with ak.use_backend(backend), dispatch.recording() as used:
            if backend == "reference":
                F.conv2d_relu(*inputs, 1, 1, 1, 2).sum().backward()
            else:
                run(*inputs)
        assert used == {backend}


def test_a_start_between_two_vectors_is_no_batch_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(_choice, "choose", lambda facts, device: seen.append(facts.channels_last))
    whole = torch.zeros(3 * 4 * 5 * 6 + 1, dtype=torch.bfloat16)
    w = torch.zeros(6, 4, 3, 3, dtype=torch.bfloat16)
    for start in (0, 1):
        x = whole[start:][: 3 * 4 * 5 * 6].view(3, 5, 6, 4).permute(0, 3, 1, 2)
        _conv_ways._choice_for("forward", x, w, ((1, 1), (1, 1), (1, 1), 1, None))
    assert seen == [True, False]


def test_an_image_of_too_many_elements() -> None:
    x = torch.empty(1, device="meta").expand(1, 2**10, 2**11, 2**11)
    assert "an image has 4294967296 elements" in (_conv_ways._triton_cannot(x) or "")


def test_without_triton_cudnn_runs_whatever_a_table_says(gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Choice:
        raise ImportError("the table is read with Triton's modules")

    monkeypatch.setattr(_conv_ways, "triton_why_not", lambda x: "Triton is not installed")
    monkeypatch.setattr(_choice, "choose", missing)
    inputs = [torch.randn(s, requires_grad=True) for s in ((2, 4, 5, 6), (6, 2, 3, 3), (6,))]
    with dispatch.recording() as used:
        run(*inputs)
    assert used == {"cudnn"}
    assert ak.explain(F.conv2d_relu, *inputs, groups=2).why_not["triton"] == "Triton is not installed"


def test_the_reference_is_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(2, 4, 5, 6), torch.randn(6, 2, 3, 3)
    args = (x, w, None, False, (1, 1), (0, 0), (1, 1), 2, None)
    assert dispatch.choose("conv2d", *args).backend == "reference"
    assert torch.equal(dispatch.run("conv2d", *args), reference.conv2d(*args[:-1]))


def test_the_page_says_what_the_model_says() -> None:
    page = (Path(__file__).parents[1] / "docs" / "kernels" / "conv_choice.md").read_text(encoding="utf-8")
    conv4 = CONV3._replace(shape=(256, 384, 13, 13), weight=(384, 192, 3, 3), groups=2)
    layers = {"conv2": CONV2, "conv3": CONV3, "conv4": conv4, "conv5": conv4._replace(weight=(256, 192, 3, 3))}
    for name, facts in layers.items():
        (row,) = re.findall(rf"^\| {name}[ ,].*", page, re.MULTILINE)
        _, _, share, *ratios, _ = (cell.strip() for cell in row.split("|"))
        assert share == f"{_choice.planned(facts)[1]:.3f}"
        for run, said in zip(PASSES, ratios, strict=True):
            choice = _choice.model(facts._replace(run=run, epilogue=run == "forward" and name != "conv2"), SM90)
            factor = re.findall(r"cuDNN (\S+) times", choice.why)
            assert said == ": ".join([*factor, *["cuDNN"] * (choice.way == "cudnn")])
