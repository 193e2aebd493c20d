"""A comparison for people: rich tables for the terminal, a figure of the ratios."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .._files import require, write_atomically
from ..distributed.exchange import Transfer
from .check import FORWARD, TRAINING
from .run import ONE, STOCK, TWO, Comparison, Row


def show(result: Comparison, console: Console) -> None:
    """Print everything the comparison found."""
    for run in (FORWARD, TRAINING):
        console.print(_times(result, run))
    console.print(_usage(result))
    console.print(_exchanges(result))
    for note in result.notes:
        console.print(f"note: {note}", highlight=False)


def _times(result: Comparison, run: str) -> Table:
    title = f"{run}: {result.variant}, batch {result.batch}, {result.dtype}, milliseconds a batch (median)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("group")
    for name in (STOCK, ONE, TWO):
        table.add_column(name, justify="right")
    table.add_column("backend")
    table.add_column("error < allowed", justify="right")
    for group in dict.fromkeys(row.group for row in result.rows):
        found = {row.contender: row for row in result.rows if (row.group, row.run) == (group, run)}
        ours = (found[ONE], found[TWO])
        worst = max(found.values(), key=lambda row: row.error / row.tolerance if row.agrees else float("inf"))
        backends = " / ".join(dict.fromkeys(_kernels(row.backend) for row in ours))
        cells = [f"{found[STOCK].milliseconds:.1f}", *(f"{row.milliseconds:.1f}  {row.ratio:.2f}x" for row in ours)]
        style = "bold" if group == "total" else None
        table.add_row(group, *cells, backends, _error(worst), style=style, end_section=group == "fc8")
    return table


def _kernels(backend: str) -> str:
    """What ran beside plain torch, if anything did: ``"cpu"`` of ``"cpu+reference"``."""
    return "+".join(name for name in backend.split("+") if name not in ("reference", "torch")) or backend


def _error(row: Row) -> str:
    """The error nearest its bound, beside the bound."""
    if row.agrees:
        return f"{row.error:.1e} < {row.tolerance:.0e}"
    return f"[red]WRONG {row.error:.1e} > {row.tolerance:.0e}[/red]"


def _usage(result: Comparison) -> Table:
    table = Table(title="utilisation during training steps", title_justify="left", box=SIMPLE_HEAD)
    for column in ("contender", "device", "from", "utilisation", "peak memory", "power", "SM clock"):
        table.add_column(column, justify="left" if column in ("contender", "device", "from") else "right")
    for name, rows in result.usage.items():
        for row in rows:
            cells = (
                _unit(row.utilisation, "%"),
                _unit(row.memory_mib, " MiB"),
                _unit(row.power_w, " W"),
                _unit(row.sm_clock_mhz, " MHz"),
            )
            table.add_row(name, row.device, row.source, *cells)
    return table


def _unit(value: float | None, unit: str) -> str:
    return "N/A" if value is None else f"{value:,.0f}{unit}"


def _exchanges(result: Comparison) -> Table:
    same = result.devices[0] == result.devices[1]
    title = "exchanged between the towers" + (" (one device: handed over, not copied)" if same else "")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("before", "direction", "forward", "backward"):
        table.add_column(column, justify="left" if column in ("before", "direction") else "right")
    for layer in dict.fromkeys(t.layer for t in result.transfers):
        for source in (0, 1):
            moved = [sum(t.bytes for t in _of(result, layer, source, back)) for back in (False, True)]
            if any(moved):
                table.add_row(layer, f"tower {source} → {1 - source}", *map(_mib, moved))
    sums = [sum(t.bytes for t in result.transfers if t.backward == back) for back in (False, True)]
    table.add_section()
    table.add_row("total", "both", *map(_mib, sums), style="bold")
    return table


def _of(result: Comparison, layer: str, source: int, backward: bool) -> list[Transfer]:
    return [t for t in result.transfers if (t.layer, t.source, t.backward) == (layer, source, backward)]


def _mib(size: int) -> str:
    return f"{size / 2**20:.3f} MiB" if size else "-"


def plot(result: Comparison, path: str | Path) -> None:
    """Bars of the ratio to stock for each fused group, forward and training, into ``path`` (its suffix names the format).

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    require("matplotlib", str(path))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    colours = {ONE: "#2b6cb0", TWO: "#c05621"}
    for axes, run in zip(figure.subplots(2, 1, sharex=True), (FORWARD, TRAINING), strict=True):
        groups = list(dict.fromkeys(row.group for row in result.rows))
        for offset, name in ((-0.2, ONE), (0.2, TWO)):
            ratios = [row.ratio for row in result.rows if (row.run, row.contender) == (run, name)]
            bars = axes.bar([i + offset for i in range(len(groups))], ratios, 0.38, label=name, color=colours[name])
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.axhline(1, color="#555555", linewidth=1)
        axes.set_ylabel(f"{run}\ntimes faster than {STOCK}")
        axes.set_xticks(range(len(groups)), groups)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    figure.axes[0].legend(frameon=False, ncols=2, loc="upper right")
    where = "two devices: " + ", ".join(result.devices)
    figure.suptitle(f"AlexNet ({result.variant}), batch {result.batch}, {result.dtype}; {where}", x=0.01, ha="left")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
