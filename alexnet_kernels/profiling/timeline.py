"""A recording as a picture: one row for each quantity, one colour for each GPU, phases shaded."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .nvml import NOT_HELD_BACK
from .recording import RATES, CpuSeries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .recording import Summary

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#97266d", "#b7791f", "#285e61", "#553c9a", "#9b2c2c")
_CPU_COLOUR = "#4a5568"
_SHADES = ("#a3bffa", "#fbd38d", "#9ae6b4", "#fbb6ce", "#d6bcfa", "#feb2b2", "#81e6d9", "#faf089")
_INK = "#2d3748"
# (heading, unit, solid quantity, dashed quantity, the axis begins at 0)
_ROWS = (
    ("utilisation", "%", "utilisation", None, True),
    ("memory", "GiB", "memory_mib", None, True),
    ("power", "W", "power_w", None, True),
    ("SM clock", "MHz", "sm_clock_mhz", None, False),
    ("memory clock", "MHz", "memory_clock_mhz", None, False),
    ("temperature", "°C", "temperature_c", None, False),
    ("PCIe", "GiB/s", "pcie_tx_mib_s", "pcie_rx_mib_s", True),
    ("NVLink", "GiB/s", "nvlink_tx_mib_s", "nvlink_rx_mib_s", True),
)
_NAMED = 12  # phases in the legend
_SCALE = {"GiB": 2**-10, "GiB/s": 2**-10}


def draw(summary: Summary) -> Figure:
    """The figure; rows that nothing filled are left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = [row for row in _ROWS if _filled(summary, row[2])] or [_ROWS[0]]
    gpus = [device.label for device in summary.devices if device.source == "NVML"]
    heights = [1.0] * len(rows) + ([0.15 + 0.17 * len(gpus)] if gpus else [])
    figure = Figure(figsize=(11, 1.4 + 1.25 * sum(heights)), layout="constrained")
    every = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, row in zip(every, rows, strict=False):
        _one(axes, summary, row)
    if gpus:
        _held_back(every[-1], summary, gpus)
    every[-1].set_xlabel("seconds")
    every[-1].set_xlim(0, max(summary.seconds, 1e-3))
    figure.align_ylabels(every)
    title = f"{summary.seconds:.2f} s, sampled at {summary.hz:g} Hz"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    _legend(figure, summary, two_ways=any(row[3] for row in rows))
    return figure


def _filled(summary: Summary, name: str) -> bool:
    return any(not all(map(math.isnan, series.columns[name])) for series in summary.series.values())


def _colours(summary: Summary) -> dict[str, str]:
    gpus = [device.label for device in summary.devices if device.source == "NVML"]
    found = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(gpus)}
    return {device.label: found.get(device.label, _CPU_COLOUR) for device in summary.devices}


def _one(axes: Axes, summary: Summary, row: tuple[str, str, str, str | None, bool]) -> None:
    heading, unit, solid, dashed, from_zero = row
    scale, colours = _SCALE.get(unit, 1.0), _colours(summary)
    _shade(axes, summary)
    for device in summary.devices:
        series, colour = summary.series[device.label], colours[device.label]
        for name, style in ((solid, "-"), (dashed, (0, (3, 1.5)))):
            if name is not None:
                values = [value * scale for value in series.columns[name]]
                # a rate tells of the time since the sample before
                steps = "steps-pre" if name in RATES or isinstance(series, CpuSeries) else "default"
                marker = "." if len(values) < 3 else None
                axes.plot(
                    series.times, values, color=colour, linewidth=1.3, linestyle=style, marker=marker, drawstyle=steps
                )
        if device.lost is not None:
            axes.axvline(device.lost, color=colour, linewidth=1, linestyle=":")
    _dress(axes, f"{heading}\n{unit}")
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    if unit == "%":
        axes.set_ylim(0, 105)
    elif from_zero:
        axes.set_ylim(bottom=0)


def _held_back(axes: Axes, summary: Summary, gpus: list[str]) -> None:
    """A bar for each GPU while anything but idleness held its clocks back."""
    _shade(axes, summary)
    for i, label in enumerate(gpus):
        series = summary.series[label]
        bits = [0 if math.isnan(b) else int(b) & ~NOT_HELD_BACK for b in series.columns["throttle"]]
        pairs = zip(pairwise(series.times), bits[1:], strict=False)
        bars = [(begin, end - begin) for (begin, end), held in pairs if held]
        axes.broken_barh(bars, (i - 0.3, 0.6), facecolor=_colours(summary)[label])
    _dress(axes, "held\nback")
    axes.set_yticks(range(len(gpus)), gpus)
    axes.set_ylim(len(gpus) - 0.4, -0.6)


def _shade(axes: Axes, summary: Summary) -> None:
    for i, phase in enumerate(summary.phases):
        spans = [(begin, end - begin) for begin, end in phase.spans]
        shade = _SHADES[i % len(_SHADES)]
        axes.broken_barh(spans, (0, 1), transform=axes.get_xaxis_transform(), facecolor=shade, alpha=0.35, zorder=0)


def _dress(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, summary: Summary, two_ways: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for label, colour in _colours(summary).items():
        device = next(device for device in summary.devices if device.label == label)
        text = label if device.lost is None else f"{label} (lost at {device.lost:.2f} s)"
        handles.append(Line2D([], [], color=colour, linewidth=2, label=text))
    for i, phase in enumerate(summary.phases[:_NAMED]):
        handles.append(Patch(facecolor=_SHADES[i % len(_SHADES)], alpha=0.5, label=phase.name))
    if len(summary.phases) > _NAMED:
        handles.append(Line2D([], [], linestyle="", label=f"and {len(summary.phases) - _NAMED} more phases"))
    if two_ways:
        handles.append(Line2D([], [], color=_INK, linewidth=1, label="out of the GPU"))
        handles.append(Line2D([], [], color=_INK, linewidth=1, linestyle=(0, (3, 1.5)), label="into it"))
    columns = min(len(handles), 6)
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8, labelcolor=_INK)
