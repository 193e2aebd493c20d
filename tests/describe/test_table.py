"""``describe`` as tables, JSON and Markdown, and as a command."""

from __future__ import annotations

import json
import re
from io import StringIO

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from alexnet_kernels.cli.describe import describe as command
from alexnet_kernels.describe import describe, report
from alexnet_kernels.describe.language import _SUMMARIES, _WORDS, size_of
from alexnet_kernels.describe.table import devices, layers
from alexnet_kernels.geometry import VARIANTS, variant

app = typer.Typer()
app.command()(command)


def printed(renderable: object, width: int) -> str:
    page = StringIO()
    Console(file=page, width=width, color_system=None).print(renderable)
    return page.getvalue()


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_add_up(name: str) -> None:
    what, net = describe(name), variant(name)
    for count in ("parameters", "neurons", "connections", "macs"):
        assert sum(getattr(row, count) for row in what.rows) == getattr(what, count) == getattr(net, count)
    assert sum(what.devices) == what.parameters
    assert [row.layer for row in what.rows] == [f.name for f in net.layers]
    for row in what.weighted:
        assert what.kernels_on(row, 0) + what.kernels_on(row, 1) == row.kernels


def test_a_row_of_the_paper() -> None:
    conv2 = next(row for row in describe("paper").rows if row.layer == "conv2")
    assert conv2.input == (27, 27, 96)
    assert conv2.kernel == (5, 5, 48)
    assert (conv2.stride, conv2.padding, conv2.kernels, conv2.side) == (1, 2, 256, 27)
    assert conv2.output == (27, 27, 256)
    assert conv2.formula == "(27+2·2-5)/1+1"


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(list(VARIANTS)), height=st.integers(67, 400), width=st.integers(67, 400))
def test_a_formula_gives_the_side_it_stands_beside(name: str, height: int, width: int) -> None:
    for row in describe(name, input_size=(height, width)).rows:
        if row.formula:
            sides = [eval(part.replace("·", "*").replace("/", "//")) for part in row.formula.split(" × ")]
            assert (sides * 2)[:2] == list(row.output[:2])


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(list(VARIANTS)), batch=st.integers(1, 1024))
def test_exchanged_bytes_scale_with_the_batch(name: str, batch: int) -> None:
    one, many = describe(name, batch=1), describe(name, batch=batch)
    assert [e.bytes for e in many.exchanges] == [batch * e.bytes for e in one.exchanges]


@pytest.mark.parametrize("width", [82, 100, 140])
@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_figure_is_cut(name: str, lang: str, width: int) -> None:
    what = describe(name)
    page = printed(layers(what, lang), width)
    for row in what.rows:
        assert row.formula in page
    figures = [count for row in what.weighted for count in (row.parameters, row.connections, row.neurons)]
    for count in (*figures, what.parameters, what.neurons, what.connections, what.macs):
        assert f"{count:,}" in page
    assert all(len(line) <= width for line in page.splitlines())


def test_who_owns_and_sends_what() -> None:
    page = printed(devices(describe("paper")), 100)
    for words in (
        "10.56 MiB each way",
        "2.25 MiB each way",
        "1.00 MiB from device 1 to device 0",
        "32,531,112",
        "28,434,112",
        "48 of 96",
    ):
        assert words in page
    assert "2.95 MiB each way" in printed(devices(describe("caffe")), 100)


def test_bytes_as_people_read_them() -> None:
    assert [size_of(n) for n in (512, 2048, 11_075_584, 746_496, 3 << 30)] == [
        "512 B",
        "2.00 KiB",
        "10.56 MiB",
        "729 KiB",
        "3.00 GiB",
    ]


def test_markdown_is_a_table() -> None:
    text = report(describe("paper"), as_markdown=True)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:20]}) == 1
    assert set(lines[1]) <= set("|-")
    assert any("| total" in line and "60,965,224" in line and "724,406,816" in line for line in lines)


def test_json_holds_everything() -> None:
    data = json.loads(report(describe("paper", batch=2), as_json=True))
    assert (data["parameters"], data["macs"]) == (60_965_224, 724_406_816)
    assert data["devices"] == [32_531_112, 28_434_112]
    assert data["exchanges"][0] == {"layer": "conv3", "values": 21_632, "bytes": 21_632 * 8, "directions": 2}
    assert len(data["rows"]) == len(variant("paper").layers)


def test_chinese_has_every_word() -> None:
    assert set(_SUMMARIES) == set(VARIANTS)
    assert all(len(words) == 2 and all(words) for words in _WORDS.values())
    assert "可训练参数" in printed(layers(describe("tiny"), "zh"), 100)


def test_the_size_may_be_a_pair() -> None:
    assert (
        describe("paper", input_size="224x320").input_size
        == describe("paper", input_size=(224, 320)).input_size
        == (224, 320)
    )
    assert describe("paper", input_size="300").input_size == (300, 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "vgg"}, "variant='vgg' is unknown; the variants are paper, "),
        ({"input_size": "big"}, "input_size='big' is not a size: use a side such as 227"),
        ({"input_size": "1x2x3"}, "input_size='1x2x3' is not a size"),
        ({"input_size": "-5"}, "is too small for variant 'paper': conv1"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1 must be at least 1"),
        ({"lrn_scope": "x"}, "lrn_scope='x' is not a scope"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        describe(**options)


def test_errors_of_a_report() -> None:
    with pytest.raises(ValueError, match="lang='fr' is not spoken here: use 'en' or 'zh'"):
        report(describe("tiny"), lang="fr")
    with pytest.raises(ValueError, match=r"--json and --markdown .* choose one"):
        report(describe("tiny"), as_json=True, as_markdown=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "60,965,224"),
        (["torchvision"], "61,100,840"),
        (["--num-classes", "10", "--input-size", "224x256", "--batch", "1", "--lrn-scope", "global"], "norm1"),
        (["--lang", "zh"], "两个设备"),
        (["--notes"], "17 rows right"),
        (["--notes", "--lang", "zh", "--markdown"], "17 行正确"),
        (["tiny", "--markdown"], "### tiny"),
    ],
)
def test_command(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert expected in result.stdout


def test_command_prints_only_json_on_stdout(tmp_path) -> None:
    result = CliRunner().invoke(app, ["--json", "--plot", str(tmp_path / "net.png")])
    assert json.loads(result.stdout)["variant"] == "paper"
    assert "net.png" in result.stderr


def a_launch(label: str, tile: str = "(128+64)x(128+64)x64", **numbers: int) -> dict[str, object]:
    names = ("programs", "warps", "stages", "registers", "spill_bytes", "shared_bytes", "blocks_per_sm")
    return {"label": label, "tile": tile, **dict.fromkeys(names, 1), **numbers}


@pytest.mark.parametrize("width", [40, 68, 80, 100, 140, 200])
def test_no_number_of_a_kernel_is_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    label = "conv_backward weight_gradient bfloat16 nhwc conv2 batch 256 mask bias"
    numbers = {"programs": 1_048_576, "registers": 255, "spill_bytes": 12_345, "shared_bytes": 163_904}
    rows = [a_launch(label, **numbers, blocks_per_sm=16), a_launch("lrn", "", programs=2)]
    monkeypatch.setattr("alexnet_kernels.cli.describe.doctor.shipped_kernels", lambda *_: rows)
    result = CliRunner().invoke(app, ["--kernels"], env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    (row,) = [line for line in lines if "163,904" in line]
    assert row.split()[-7:] == ["1,048,576", "1", "1", "255", "12,345", "163,904", "16"]
    assert "…" not in result.stdout and "(128+64)x(128+64)x64" in result.stdout
    assert any(line.endswith("CTAs") for line in map(str.rstrip, lines))
    words = result.stdout.split()
    assert all(word in words for word in label.split())
    assert all(len(line.rstrip()) <= max(width, 80) for line in lines)
    assert (label in result.stdout) == (width >= 140)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["caffe", "--kernels", "--markdown", "--plot", "none.png", "--lang", "zh", "--notes"],
            "--kernels lists launches, not a network: leave out variant, --notes, --markdown, --lang, --plot",
        ),
        (["paper", "--kernels"], "leave out variant"),
        (["--kernels", "--batch", "128"], "leave out --batch"),
        (["--only", "lrn"], "without --kernels no launches are listed: leave out --only, or add --kernels"),
        (["--arch", "90", "tiny"], "leave out --arch, or add --kernels"),
        (["--kernels", "--only", "("], "--only '(' is no regular expression"),
        (["--kernels", "--only", "conv9"], "--only 'conv9' finds none of the launches of lrn, "),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments: list[str], message: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert result.stdout == ""


def test_command_raises_what_main_turns_into_one_line() -> None:
    result = CliRunner().invoke(app, ["vgg"])
    assert isinstance(result.exception, ValueError)
    assert result.stdout == ""
