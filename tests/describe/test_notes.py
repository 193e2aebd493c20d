"""The audit of the notes: all of them, each verdict earned, each mistake explained in both languages."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from alexnet_kernels.describe import describe, report
from alexnet_kernels.describe.notes import NOTES, audit, records, sheet
from alexnet_kernels.geometry import variant

RIGHT = ["1", "2", "8", "9", "14", "15", "19", "20", "23", "25", "26", "30", "32", "36", "38", "40", "42"]
INCOMPLETE = ["0", "11", "29b"]
ROWS = [*map(str, range(30)), "29b", *map(str, range(30, 45))]


def test_every_row_of_the_notes_once() -> None:
    assert [note.row for note in NOTES] == ROWS
    assert len(ROWS) == 46


def test_verdicts() -> None:
    verdicts = {item.note.row: item.verdict for item in audit()}
    assert [row for row in ROWS if verdicts[row] == "right"] == RIGHT
    assert [row for row in ROWS if verdicts[row] == "incomplete"] == INCOMPLETE
    assert [row for row in ROWS if verdicts[row] == "wrong"] == [
        r for r in ROWS if r not in RIGHT and r not in INCOMPLETE
    ]


@pytest.mark.parametrize("item", audit(), ids=lambda item: item.note.row)
def test_a_verdict_is_earned(item) -> None:
    claimed = tuple(claim.value for claim in item.note.claims)
    assert item.verdict == "incomplete" or (claimed == item.truths) == (item.verdict == "right")
    if item.verdict != "right":
        english, chinese = item.note.why
        assert english.isascii() or "α" in english or "·" in english or "×" in english
        assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese)


@pytest.mark.parametrize("item", audit(), ids=lambda item: item.note.row)
def test_truths_are_geometrys(item) -> None:
    paper, merged = variant("paper"), variant("paper", conv_groups=1)
    for claim, truth, ungrouped in zip(item.note.claims, item.truths, item.merged, strict=True):
        for net, value in ((paper, truth), (merged, ungrouped)):
            facts = {f.name: f for f in net.layers}
            if claim.quantity in ("neurons", "parameters", "connections"):
                assert value == getattr(facts[claim.layer], claim.quantity)
            elif claim.quantity in ("input", "output"):
                channels, height, width = getattr(facts[claim.layer], claim.quantity)
                assert value == (height, width, channels)
            elif claim.quantity == "side":
                assert value == facts[claim.layer].output[1]


def test_quotes_compute_to_what_they_claim() -> None:
    for note in NOTES:
        for claim in note.claims:
            if claim.quote:
                assert eval(claim.quote.replace("·", "*")) == claim.value  # only the notes' arithmetic, written above


def test_the_corrections_everyone_looks_for() -> None:
    truths = {item.note.row: item.truths for item in audit()}
    assert truths["3"] == (96,)
    assert truths["6"] == (34_944,)
    assert truths["17"] == (307_456,)
    assert truths["33"] == (64_896, 663_936, 112_205_184)
    assert truths["39"] == (0, None)
    assert truths["41"] == (37_752_832,)
    assert truths["44"] == (4_097_000,)


@pytest.mark.parametrize(
    ("lang", "words"), [("en", "17 rows right, 26 wrong, 3 incomplete"), ("zh", "17 行正确，26 行错误，3 行不全")]
)
def test_the_table_counts_up(lang: str, words: str) -> None:
    table = sheet(lang=lang)
    assert len(table.rows) == 46
    assert words in table.captions[0]
    assert "22,021,120" in table.captions[0]
    assert "60,965,224" in table.captions[0]
    page = StringIO()
    Console(file=page, width=90).print(table)
    assert "37,752,832" in page.getvalue()


def test_as_data() -> None:
    data = json.loads(report(describe("paper"), notes=True, as_json=True))
    assert len(data) == 46
    assert data == json.loads(json.dumps(records()))
    row = next(entry for entry in data if entry["row"] == "5")
    assert row["verdict"] == "wrong"
    assert (row["claims"][0]["notes"], row["claims"][0]["truth"]) == (34_848, 290_400)


@pytest.mark.parametrize("options", [{"variant": "torchvision"}, {"num_classes": 10}, {"input_size": 300}])
def test_the_notes_describe_one_network(options: dict) -> None:
    with pytest.raises(ValueError, match="--notes sets the notes beside variant 'paper' as published"):
        audit(describe(**options))
