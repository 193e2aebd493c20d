"""The network as a table: every operation of a variant with its input, kernel, map and counts, and who owns it.

All figures come from ``geometry``. Shapes here are written as people read them, ``(height, width, channels)`` of one
image, and ``(features,)`` once the map is flattened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from itertools import pairwise
from typing import NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .. import geometry
from ..geometry import LRN, AdaptiveAvgPool, Conv, Dropout, Flatten, LayerFacts, Linear, MaxPool, SpatialNorm, Variant
from .language import dimensions, say, size_of, summary

SOFT = "\v"


@dataclass(frozen=True)
class Row:
    """One operation. ``kernel`` is (height, width, depth) of a convolution, (height, width) of a pool, (inputs,) of a fully
    connected layer, (channels,) of a normalisation; ``formula`` says how the side of the map comes about."""

    layer: str
    group: str
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int
    padding: int
    kernels: int
    output: tuple[int, ...]
    formula: str
    setting: str
    neurons: int
    parameters: int
    connections: int
    macs: int

    @property
    def side(self) -> int:
        """Height of the output map."""
        return self.output[0]


@dataclass(frozen=True)
class Crossing:
    """What crosses between the devices before ``layer``: ``bytes`` in each of ``directions`` (1: device 1 to device 0)."""

    layer: str
    values: int
    bytes: int
    directions: int


@dataclass(frozen=True)
class Description:
    """A variant with everything that is shown of it; ``devices`` are the parameters of device 0 and device 1."""

    variant: str
    summary: str
    input_size: tuple[int, int]
    num_classes: int
    batch: int
    parameters: int
    neurons: int
    connections: int
    macs: int
    rows: tuple[Row, ...]
    devices: tuple[int, ...]
    exchanges: tuple[Crossing, ...]
    network: Variant = field(repr=False)

    @property
    def weighted(self) -> tuple[Row, ...]:
        """The rows that have parameters: the convolutions and the fully connected layers."""
        return tuple(r for r in self.rows if r.parameters)

    def kernels_on(self, row: Row, device: int) -> int:
        """How many of a layer's kernels a device owns: half of them; the classifier's are all on device 0."""
        if row is not self.weighted[-1]:
            return row.kernels // geometry.TOWERS
        return row.kernels if device == 0 else 0

    def as_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {k: v for k, v in asdict(self).items() if k != "network"}


def describe(
    variant: str | Variant = "paper",
    *,
    num_classes: int | None = None,
    input_size: int | tuple[int, int] | str | None = None,
    batch: int = 128,
    lrn_scope: str | None = None,
) -> Description:
    """Describe a variant; ``input_size`` is a side, ``(height, width)`` or ``"HEIGHTxWIDTH"``, ``batch`` images cross."""
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    size = _size(input_size) if isinstance(input_size, str) else input_size
    net = geometry.variant(variant, num_classes=num_classes, input_size=size, lrn_scope=lrn_scope)
    return Description(
        net.name,
        net.summary,
        net.input_size,
        net.num_classes,
        batch,
        net.parameters,
        net.neurons,
        net.connections,
        net.macs,
        tuple(_rows(net)),
        tuple(net.device_parameters(d) for d in range(geometry.TOWERS)),
        tuple(Crossing(e.layer, e.values, e.bytes(batch), e.directions) for e in net.exchanges()),
        net,
    )


def _size(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(side) for side in text.lower().replace("×", "x").split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise ValueError(f"input_size={text!r} is not a size: use a side such as 227, or HEIGHTxWIDTH such as 224x320")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _rows(net: Variant) -> Iterator[Row]:
    flat = False
    for f in net.layers:
        before, flat = flat, flat or isinstance(f.op, Flatten)
        op, h, w = f.op, *f.input[1:]
        yield Row(
            f.name,
            f.group,
            _shape(f.input, before),
            _kernel(f),
            op.stride if isinstance(op, Conv | MaxPool) else 0,
            op.padding if isinstance(op, Conv) else 0,
            f.output[0] if isinstance(op, Conv | Linear) else 0,
            _shape(f.output, flat),
            " × ".join(dict.fromkeys(map(op.formula, (h, w)))) if isinstance(op, Conv | MaxPool) else "",
            _setting(f),
            f.neurons,
            f.parameters,
            f.connections,
            f.macs,
        )


def _shape(shape: geometry.Shape, flat: bool) -> tuple[int, ...]:
    return shape[:1] if flat else (*shape[1:], shape[0])


def _kernel(f: LayerFacts) -> tuple[int, ...]:
    match f.op:
        case Conv(kernel=k, groups=groups):
            return k, k, f.input[0] // groups
        case MaxPool(kernel=k):
            return k, k
        case Linear():
            return (f.op.macs_per_neuron(f.input),)
        case LRN(size=n):
            return (n,)
        case SpatialNorm(size=n) | AdaptiveAvgPool(size=n):
            return n, n
    return ()


def _setting(f: LayerFacts) -> str:
    match f.op:
        case LRN() as op:
            mean = "/n" if op.alpha_mode == "mean" else ""
            return f"n={op.size}, k={op.k:g}, α={op.alpha:g}, β={op.beta:g}, a/(k+α{mean}·Σa²)^β"
        case SpatialNorm() as op:
            return f"n={op.size}, k={op.k:g}, α={op.alpha:g}, β={op.beta:g}, a/(k+α/n²·Σa²)^β"
        case Dropout(p=p):
            return f"p={p:g}"
    return ""


class Column(NamedTuple):
    """A heading; ``figures`` stand on the right and never wrap."""

    name: str
    figures: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table that prints itself with rich, or as Markdown. A cell may break at ``SOFT`` when the terminal is narrow; then
    the last column goes too if it is ``spare``. ``breaks`` are the rows after which a section ends."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    captions: tuple[str, ...] = ()
    breaks: frozenset[int] = frozenset()
    spare: bool = False
    styles: Mapping[str, str] = field(default_factory=dict)

    def _table(self, style: box.Box, soft: str, hard: str = "\n", drop: int = 0) -> Table:
        markdown = style is box.MARKDOWN
        table = Table(box=style, pad_edge=markdown, padding=(0, int(markdown)), show_edge=markdown)
        for column in self.columns[: len(self.columns) - drop]:
            table.add_column(
                column.name, justify="right" if column.figures else "left", no_wrap=column.figures, overflow="fold"
            )
        for at, row in enumerate(self.rows):
            cells = (cell.replace(SOFT, soft).replace("\n", hard) for cell in row[: len(row) - drop])
            table.add_row(
                *(Text(cell, self.styles.get(cell, "")) for cell in cells),
                end_section=at in self.breaks and not markdown,
            )
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=1000)
        for soft, drop in ((" ", 0), ("\n", 0), ("\n", int(self.spare))):
            table = self._table(box.SIMPLE_HEAD, soft, drop=drop)
            if console.measure(table, options=wide).maximum <= options.max_width:
                break
        yield Text(self.title, "bold")
        yield table
        for caption in self.captions:
            yield Text(caption, "dim")

    def markdown(self) -> str:
        """The same table as Markdown."""
        page = StringIO()
        Console(file=page, width=100_000, color_system=None).print(self._table(box.MARKDOWN, " ", "<br>"))
        table = "\n".join(line.rstrip() for line in page.getvalue().splitlines() if line.strip())
        return "\n\n".join((f"### {self.title}", table, *self.captions))


def layers(what: Description, lang: str = "en") -> Sheet:
    """The table of the notes for any variant: one row an operation, then the totals."""

    def kernel(row: Row) -> str:
        text = (
            say("channels", lang, row.kernel[0])
            if row.layer.startswith("norm")
            else dimensions(row.kernel)
            if row.kernel
            else ""
        )
        moves = [say("with stride", lang, row.stride)] if row.stride > 1 else []
        moves += [say("with padding", lang, row.padding)] if row.padding else []
        return SOFT.join([text, *moves])

    shown = [row for row in what.rows if not row.layer.startswith("flatten")]
    rows = [
        (
            row.layer,
            dimensions(row.input),
            kernel(row),
            f"{row.kernels:,}" if row.kernels else "",
            dimensions(row.output) + (SOFT + row.formula if row.formula else ""),
            *(
                f"{count:,}" if row.parameters else ""
                for count in (row.neurons, row.parameters, row.connections, row.macs)
            ),
        )
        for row in shown
    ]
    last = [i for i, (row, after) in enumerate(pairwise(shown)) if row.group != after.group]
    totals = (f"{count:,}" for count in (what.neurons, what.parameters, what.connections, what.macs))
    scopes = {f.name: say(f.op.scope, lang) for f in what.network.layers if isinstance(f.op, LRN)}
    settings: dict[str, list[str]] = {}
    for row in what.rows:
        if row.setting:
            settings.setdefault(", ".join(filter(None, (row.setting, scopes.get(row.layer)))), []).append(row.layer)
    return Sheet(
        f"{what.variant}: {summary(what.variant, what.summary, lang)}",
        (
            *(Column(say(name, lang)) for name in ("layer", "input", "kernel")),
            Column(say("number", lang), figures=True),
            Column(say("map", lang)),
            *(Column(say(name, lang), figures=True) for name in ("neurons", "parameters", "connections", "macs")),
        ),
        (*rows, (say("total", lang), "", "", "", "", *totals)),
        (
            *(f"{', '.join(who)}: {setting}" for setting, who in settings.items()),
            say("counting", lang, f"{what.macs:,}"),
        ),
        frozenset((*last, len(rows) - 1)),
        spare=True,
    )


def devices(what: Description, lang: str = "en") -> Sheet:
    """Who owns what on two devices, and what each receives from the other before a layer."""
    crossings = {c.layer: c for c in what.exchanges}

    def arrives(row: Row) -> str:
        found = crossings.get(row.layer)
        return say("each way" if found.directions > 1 else "one way", lang, size_of(found.bytes)) if found else ""

    def share(row: Row, device: int) -> str:
        return say("of", lang, f"{what.kernels_on(row, device):,}", f"{row.kernels:,}") if row.parameters else ""

    rows = [(r.layer, share(r, 0), share(r, 1), arrives(r)) for r in what.rows if r.parameters or r.layer in crossings]
    total = (say("parameters", lang), *(f"{count:,}" for count in what.devices), "")
    return Sheet(
        say("devices", lang, what.batch),
        (
            Column(say("layer", lang)),
            *(Column(say("device", lang, d), figures=True) for d in range(geometry.TOWERS)),
            Column(say("before", lang)),
        ),
        (*rows, total),
        (say("mirror", lang),),
        frozenset({len(rows) - 1}),
    )
