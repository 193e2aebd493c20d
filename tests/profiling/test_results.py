"""Result files and the report made from them: written once, checked when read, losing rows kept, nothing invented."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alexnet_kernels.cli.main import app
from alexnet_kernels.profiling import report, results

DATE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
CEILING = {"section": "ceilings", "case": "copy 1 MiB", "ceiling": "copy", "per second": 1e9, "milliseconds": 2.0,
           "unit": "B"}  # fmt: skip
MATMUL = CEILING | {"case": "matmul", "ceiling": "fp32", "per second": 1e12, "unit": "FLOP"}


def row(section: str = "layers", ours: float = 1.0, theirs: float = 2.0, batch: int = 16) -> dict:
    verdict = "faster" if theirs > ours else "slower"
    return {
        "section": section, "case": f"paper/norm1/forward/fp32/{batch}", "variant": "paper", "pass": "forward",
        "unit": "network" if section == "model" else "norm1", "track": "fp32", "batch": batch, "flops": 100, "bytes": 50,
        "contenders": {
            "ours nchw": {"status": "ok", "milliseconds": ours},
            "eager nchw": {"status": "ok", "milliseconds": theirs},
            "compile nchw": {"status": "wrong", "error": 0.5},
        },
        "ours": "ours nchw", "baseline": "eager nchw", "shares": {"% of copy": 12.5},
        "ratio": {"value": theirs / ours, "low": theirs / ours * 0.9, "high": theirs / ours * 1.1, "verdict": verdict},
    }  # fmt: skip


def write(folder: Path, rows: list[dict], device: str = "NVIDIA H200", complete: bool = False, hours: int = 0) -> Path:
    return results.write(folder, device, DATE + timedelta(hours=hours), "abc", {"torch": "2"}, rows, complete)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, [CEILING, row()])
    assert path == tmp_path / "nvidia-h200" / "2026-01-02-030405-abc.json"
    found = results.read(path)
    assert (found.device, found.environment, found.rows) == ("nvidia-h200", {"torch": "2"}, (CEILING, row()))
    assert found.section("layers") == (row(),)
    with pytest.raises(FileExistsError, match="result files are not written twice"):
        write(tmp_path, [CEILING])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["contenders"]["ours nchw"].update(status="fine"), "has status 'fine'"),
        (lambda r: r["contenders"]["ours nchw"].update(milliseconds=0), "is named as ours and has no time"),
        (lambda r: r.update(baseline="compile nchw"), "lacks 'milliseconds'"),
        (lambda r: r.pop("case"), "lacks 'case'"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, change, message: str) -> None:
    path = write(tmp_path, [row()])
    content = json.loads(path.read_text())
    change(content["rows"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{path.name} is no result file.*{message}"):
        results.read(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 7}', "{}"])
def test_foreign_files_are_named_and_skipped(tmp_path: Path, text: str) -> None:
    write(tmp_path, [CEILING])
    (tmp_path / "nvidia-h200" / "foreign.json").write_text(text)
    found, skipped = results.read_all(tmp_path)
    assert len(found) == 1
    assert len(skipped) == 1 and "foreign.json is no result file" in skipped[0]
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "skipped: " in done.output


def test_report_keeps_what_the_baseline_wins_and_shows_no_time_of_a_wrong_one(tmp_path: Path) -> None:
    model = [row("model", batch=b) for b in (1, 16)]
    write(tmp_path, [CEILING, MATMUL, row(ours=4.0), *model])
    written, skipped = report.write_report(tmp_path, tmp_path / "out")
    assert not skipped
    names = ["report.md", *(f"nvidia-h200-{n}.png" for n in ("speedup", "roofline", "throughput"))]
    assert [path.name for path in written] == names
    assert all(path.stat().st_size > 0 for path in written)
    text = written[0].read_text()
    assert "| 4 (ours nchw) | 2 (eager nchw) | 0.50 | 0.45 to 0.55 | slower |" in text
    assert "compile nchw: wrong" in text
    assert "| 16,000 |" in text


def test_report_says_what_was_not_measured(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (path,), _ = report.write_report(tmp_path / "empty", tmp_path / "out")
    assert "not measured: no result file" in path.read_text()
    write(tmp_path, [CEILING])
    (path,), _ = report.write_report(tmp_path, tmp_path / "out")
    assert path.read_text().count("not measured") == 3


def test_a_part_is_marked_and_a_file_without_a_mark_is_read(tmp_path: Path) -> None:
    part, whole = write(tmp_path, [CEILING]), write(tmp_path, [CEILING], complete=True, hours=1)
    assert (results.read(part).complete, results.read(whole).complete) == (False, True)
    assert results.read(whole).file == whole.name
    content = json.loads(whole.read_text())
    assert "file" not in content
    del content["complete"]
    whole.write_text(json.dumps(content))
    unmarked = results.Results(content["date"], "abc", {"torch": "2"}, (CEILING,), "nvidia-h200", file=whole.name)
    assert results.read(whole) == unmarked
    assert not unmarked.complete


def test_a_part_replaces_no_whole(tmp_path: Path) -> None:
    """Each section is that of the latest complete file, or of the latest that has it; the report says of which."""
    write(tmp_path, [CEILING, MATMUL, row(ours=3.0)], complete=True)
    whole = write(tmp_path, [CEILING, MATMUL, row(ours=4.0)], complete=True, hours=1)
    older = write(tmp_path, [row("model", ours=5.0)], hours=2)
    part = write(tmp_path, [row(ours=6.0), row("model", ours=7.0)], hours=3)
    written, _ = report.write_report(tmp_path, tmp_path / "out")
    text = written[0].read_text()
    assert "| 4 (ours nchw) |" in text and "| 7 (ours nchw) |" in text
    assert not any(f"| {ms} (ours nchw) |" in text for ms in (3, 5, 6))
    assert f"- {whole.name}: Sources abc; torch 2; all of the benchmarks." in text
    assert f"- {part.name}: Sources abc; torch 2; a part of the benchmarks." in text
    layers, model = text.index("### Layers"), text.index("### Whole networks")
    assert layers < text.index(f"From {whole.name}.", layers) < model < text.index(f"From {part.name}.")
    assert older.name not in text
    assert text.splitlines()[4] == "## nvidia-h200, 2026-01-02T06:04:05+00:00"
    assert [path.name for path in written[1:]] == [
        f"nvidia-h200-{n}.png" for n in ("speedup", "roofline", "throughput")
    ]


def test_one_file_is_not_named_at_each_section(tmp_path: Path) -> None:
    write(tmp_path, [CEILING, MATMUL, row()])
    write(tmp_path, [CEILING, MATMUL, row()], complete=True, hours=1)
    (path, *_), _ = report.write_report(tmp_path, tmp_path / "out")
    assert "\nSources abc; torch 2; all of the benchmarks.\n" in path.read_text()
    assert "From " not in path.read_text()


def test_without_matplotlib_the_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path, [CEILING, MATMUL, row()])
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "skipped: matplotlib is needed for the figures of nvidia-h200: pip install" in done.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 (ours nchw) | 2 (eager nchw) |" in text and ".png" not in text


def test_report_needs_a_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match=r"^cannot make the folder .*out: File exists; choose another one"):
        report.write_report(tmp_path, tmp_path / "out")


def test_report_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder; pytest bench"):
        report.write_report(tmp_path / "none", tmp_path)
