"""Result files as Markdown tables and figures. Nothing is measured here: what has no file is "not measured"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import make_folder, require, write_atomically, write_text
from .results import Results, Row, read_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTHING = "not measured"
_GREEN, _RED, _GREY, _INK, _PALE = "#2f855a", "#c53030", "#a0aec0", "#2d3748", "#e2e8f0"
_COLOUR = {"faster": _GREEN, "slower": _RED, "tie": _GREY}
_SECTIONS = {
    "ceilings": "Ceilings",
    "layers": "Layers and fused groups",
    "model": "Whole networks",
    "launch": "One launch, on the host",
}


def write_report(folder: Path, out: Path) -> tuple[list[Path], list[str]]:
    """What was measured on each device below ``folder`` as ``out/report.md`` with figures; what was written, what skipped.

    Without matplotlib the tables are written, and the figures are among what was skipped.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        OSError: ``out`` is no folder that can be written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"results={str(folder)!r} is no folder; pytest bench --benchmark-only --result DIR makes one"
        )
    runs, skipped = read_all(folder)
    devices: dict[str, list[Results]] = {}
    for run in runs:
        devices.setdefault(run.device, []).append(run)
    make_folder(out)
    written, parts = (
        [],
        ["# Measured\n", "`baseline / ours`: over 1, ours is faster. A tie is a 95% interval that holds 1.\n"],
    )
    for device, of_device in devices.items():
        chosen = chosen_of(of_device)
        try:
            figures = {name: figure for name, figure in figures_of(chosen).items() if figure is not None}
        except ImportError as error:
            figures, skipped = {}, [*skipped, str(error)]
        for name, figure in figures.items():
            path = out / f"{device}-{name}.png"
            write_atomically(path, partial(figure.savefig, dpi=130))
            written.append(path)
        parts.append(markdown(device, chosen, [f"{device}-{name}.png" for name in figures]))
    if not devices:
        parts.append(f"{NOTHING}: no result file in {folder}\n")
    write_text(out / "report.md", "\n".join(parts))
    return [out / "report.md", *written], skipped


def chosen_of(runs: Sequence[Results]) -> dict[str, Results]:
    """For each section the latest complete run of a device that has it, or the latest that has it; the latest where none has."""
    found = {}
    for section in _SECTIONS:
        having = [run for run in runs if run.section(section)] or runs
        found[section] = ([run for run in having if run.complete] or having)[-1]
    return found


def markdown(device: str, chosen: Mapping[str, Results], figures: Sequence[str] = ()) -> str:
    """A device as text: what was measured when, what the device can do, then a table a section; losing rows stay."""
    used = {run.file: run for section, run in chosen.items() if run.section(section)}
    runs = sorted(used.values() or chosen.values(), key=lambda run: run.date)
    parts = [f"## {device}, {runs[-1].date}\n"]
    if len(used) > 1:
        parts += ["\n".join(f"- {run.file}: {_facts(run)}" for run in runs) + "\n"]
    else:
        parts += [f"{_facts(runs[-1])}\n"]
    parts += [f"![{name}]({name})\n" for name in figures]
    for section, title in _SECTIONS.items():
        rows = chosen[section].section(section)
        parts += [f"### {title}\n"]
        parts += [f"From {chosen[section].file}.\n"] if rows and len(used) > 1 else []
        parts += [_ceilings(rows) if section == "ceilings" else _rows(rows, images=section == "model")]
    return "\n".join(parts)


def _facts(run: Results) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in run.environment.items())
    return f"Sources {run.digest}; {facts}; {'all' if run.complete else 'a part'} of the benchmarks."


def _ceilings(rows: Sequence[Row]) -> str:
    if not rows:
        return f"{NOTHING}\n"
    lines = ["| ceiling | ms | per second |", "|---|--:|--:|"]
    lines += [f"| {r['case']} | {r['milliseconds']:.4g} | {_rate(r['per second'], r['unit'])} |" for r in rows]
    return "\n".join(lines) + "\n"


def _rate(value: float, unit: str) -> str:
    """``2.3e11``, ``"FLOP"`` as ``"230 GFLOP/s"``."""
    power = max(0, min(4, (len(str(int(value))) - 1) // 3))
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T')[power]}{unit}/s"


def _rows(rows: Sequence[Row], images: bool) -> str:
    if not rows:
        return f"{NOTHING}\n"
    head = ["case", "ours, ms", "best baseline, ms", "baseline / ours", "95%", "", "% floor", "% copy", "% matmul"]
    head += ["images/s, ours"] if images else []
    lines = ["| " + " | ".join([*head, "note"]) + " |", "|---" + "|--:" * 4 + "|---" + "|--:" * (3 + images) + "|---|"]
    return "\n".join(lines + ["| " + " | ".join(_cells(row, images)) + " |" for row in rows]) + "\n"


def _cells(row: Row, images: bool) -> list[str]:
    shares = [_percent(row.get("shares", {}).get(name)) for name in ("% of floor", "% of copy", "% of matmul")]
    sides = [f"{_time(row, side):.4g} ({row[side]})" if side in row else NOTHING for side in ("ours", "baseline")]
    ratio = row.get("ratio")
    middle = ["", "", ""]
    if ratio:
        middle = [f"{ratio['value']:.2f}", f"{ratio['low']:.2f} to {ratio['high']:.2f}", str(ratio["verdict"])]
    cells = [str(row["case"]), *sides, *middle, *shares]
    if images:
        cells.append(f"{row['batch'] / _time(row, 'ours') * 1e3:,.0f}" if "ours" in row else "")
    return [*cells, _note(row)]


def _time(row: Row, side: str) -> float:
    return float(row["contenders"][row[side]]["milliseconds"])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _note(row: Row) -> str:
    bad = [f"{name}: {entry['status']}" for name, entry in row["contenders"].items() if entry["status"] != "ok"]
    if row.get("watched", {}).get("clock varied"):
        bad.append("clock varied by over 3%")
    return "; ".join(bad)


def figures_of(chosen: Mapping[str, Results]) -> dict[str, Figure | None]:
    """``"speedup"``, ``"roofline"`` (under the ceilings of the layers' own run), ``"throughput"``; None where one has no rows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers, model = chosen["layers"], chosen["model"]
    require("matplotlib", f"the figures of {layers.device}")
    return {"speedup": _speedup(layers), "roofline": _roofline(layers), "throughput": _throughput(model)}


def _new(title: str, run: Results, width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(f"{title}; {run.device}, {run.date[:10]}", x=0.01, ha="left", fontsize=11, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_INK)
    return figure, axes


def _speedup(run: Results) -> Figure | None:
    """A bar for each case of the largest batch, its 95% interval on it; left of the line the baseline is faster."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in run.section("layers") if "ratio" in row]
    if not rows:
        return None
    batch = max(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    rows.sort(key=lambda row: (row["track"], row["pass"] != "forward"))
    kinds = [(row["track"], row["pass"]) for row in rows]
    rows = rows[::-1]
    figure, axes = _new(f"Times faster than the best baseline, batch {batch}", run, 9, 1.2 + 0.2 * len(rows))
    ratios = [row["ratio"] for row in rows]
    values = [ratio["value"] for ratio in ratios]
    spread = [
        [r["value"] - min(r["low"], r["value"]) for r in ratios],
        [max(r["high"], r["value"]) - r["value"] for r in ratios],
    ]
    axes.barh(range(len(rows)), [value - 1 for value in values], left=1, xerr=spread, ecolor=_INK,
              color=[_COLOUR[r["verdict"]] for r in ratios])  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color=_PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.1)
    axes.set_yticks(range(len(rows)), [f"{row['unit']}, {row['pass']}, {row['track']}" for row in rows])
    for i in range(1, len(kinds)):
        if kinds[i] != kinds[i - 1]:
            axes.axhline(len(kinds) - i - 0.5, color=_GREY, linewidth=0.6)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.axvline(1, color=_INK, linewidth=1)
    for i, ratio in enumerate(ratios):
        axes.annotate(f"{ratio['value']:.2f}", (max(ratio["high"], ratio["value"], 1), i), (4, 0), fontsize=8,
                      textcoords="offset points", va="center", color=_INK)  # fmt: skip
    axes.set_xlabel("baseline / ours (green: faster, red: slower, grey: tie)", fontsize=9, color=_INK)
    return figure


def _roofline(run: Results) -> Figure | None:
    """FLOP/s over FLOP/byte of ours and of the best baseline, under the measured copy and matmul of the row's track."""
    rows = [row for row in run.section("layers") if row.get("flops") and row.get("bytes") and "ratio" in row]
    peaks = {row["ceiling"]: row["per second"] for row in run.section("ceilings")}
    if not rows or "copy" not in peaks:
        return None
    figure, axes = _new("Roofline: operations counted, bytes of each tensor once", run, 8, 5.5)
    intensity = sorted(row["flops"] / row["bytes"] for row in rows)
    ends = [intensity[0] / 2, intensity[-1] * 2]
    steps = [ends[0] * (ends[1] / ends[0]) ** (i / 200) for i in range(201)]
    for i, (track, peak) in enumerate(_matmuls(peaks, rows)):  # a track has one colour; ours is filled, as everywhere
        colour, mine = f"C{i}", [row for row in rows if _ceiling_of(row) == track]
        axes.plot(
            steps, [min(peak, x * peaks["copy"]) for x in steps], color=colour, linewidth=1, label=f"ceiling, {track}"
        )
        x = [row["flops"] / row["bytes"] for row in mine]
        for side, fill in (("baseline", "none"), ("ours", colour)):
            y = [row["flops"] / _time(row, side) * 1e3 for row in mine]
            axes.scatter(
                x, y, s=16 if side == "ours" else 34, facecolor=fill, edgecolor=colour, linewidth=0.8,
                alpha=0.8, marker="D", label=f"{side}, {track}", zorder=3,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte (layers with matrix products)", fontsize=9, color=_INK)
    axes.set_ylabel("FLOP/s", fontsize=9, color=_INK)
    axes.grid(color=_PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _ceiling_of(row: Row) -> str:
    """The track whose matrix products bound the row's: autocast multiplies in bf16."""
    return "bf16" if row["track"] == "amp" else str(row["track"])


def _matmuls(peaks: dict[str, Any], rows: Sequence[Row]) -> list[tuple[str, float]]:
    tracks = {_ceiling_of(row) for row in rows}
    return sorted((track, peaks[track]) for track in tracks if track in peaks)


def _throughput(run: Results) -> Figure | None:
    """Images a second against the batch: ours solid, the best baseline dashed."""
    rows = [row for row in run.section("model") if "ratio" in row and row["unit"] == "network"]
    if not rows:
        return None
    figure, axes = _new("Images a second", run, 8, 5)
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        lines.setdefault((row["variant"], row["pass"], row["track"]), []).append(row)
    for i, (key, points) in enumerate(lines.items()):
        batches = [row["batch"] for row in points]
        for side, style, fill, size in (("ours", "-", f"C{i}", 7), ("baseline", (0, (4, 2)), "white", 4)):
            rate = [row["batch"] / _time(row, side) * 1e3 for row in points]
            label = ", ".join(key) if side == "ours" else None
            axes.plot(
                batches,
                rate,
                color=f"C{i}",
                linestyle=style,
                marker="o",
                markersize=size,
                markerfacecolor=fill,
                label=label,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["batch"] for row in rows}), labels=[str(b) for b in sorted({r["batch"] for r in rows})])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch (large, solid: ours; small and hollow, dashed: the best baseline)", fontsize=9, color=_INK)
    axes.grid(axis="y", color=_PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
