"""The pictures that the notes have lost: the network on two devices, and each of its layers.

Maps are boxes seen from the front: the face is height by width of the map, the depth its channels (square-root scales).
One colour a tower; what crosses between the towers is an arrow in the colour of the tower that sends it.
matplotlib is imported when a picture is drawn, and draws into memory: no display, no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import require, write_atomically
from ..geometry import TOWERS, Variant
from .language import check, dimensions, say, size_of
from .table import Description, Row, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, FAINT, IMAGE = "#1f2933", "#66717d", "#c9d0d6", "#8a949e"
COLOURS = ("#2f6db0", "#d9822b")  # device 0, device 1
LANES = (2.58, 1.08)  # inches from the bottom of the overview
DPI, SMALL = 160, 7.5
Point = tuple[float, float]
FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei",
         "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC", "Hiragino Sans GB", "Noto Sans CJK JP",
         "Arial Unicode MS", "Droid Sans Fallback")  # fmt: skip


def draw_network(variant: str | Variant | Description, path: str | Path, *, batch: int = 128, lang: str = "en") -> str:
    """Draw the two lanes of the network, 1600 pixels wide; returns a note when the labels could not be in ``lang``.

    ``batch`` is for the exchanged bytes; a ``Description`` brings its own.
    """
    return _picture(variant, path, batch, lang, panels=False)


def draw(variant: str | Variant | Description, path: str | Path, *, batch: int = 128, lang: str = "en") -> str:
    """Draw the network and below it a panel for each weighted layer, in one PNG; returns as ``draw_network`` does."""
    return _picture(variant, path, batch, lang, panels=True)


def _picture(variant: str | Variant | Description, path: str | Path, batch: int, lang: str, *, panels: bool) -> str:
    check(lang)
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"plot={str(path)!r} must end in .png: pictures are written as PNG")
    what = variant if isinstance(variant, Description) else describe(variant, batch=batch)
    require("matplotlib", str(path))
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    chinese = [font for font in FONTS if font in installed][:1] if lang == "zh" else []
    note = say("no font", lang) if lang == "zh" and not chinese else ""
    lang = "en" if note else lang
    with rc_context({"font.family": ["DejaVu Sans", *chinese], "text.color": INK}):
        tall = 4.5 + 4.92 * panels
        figure = Figure(figsize=(10, tall), dpi=DPI, facecolor="white")
        _overview(_canvas(figure, (0, 1 - 4.5 / tall, 1, 4.5 / tall), 10, 4.5), what, lang)
        if panels:
            for at, row in enumerate(what.weighted):
                column, line = at % 4, at // 4
                place = (0.02 + 0.243 * column, (0.2 + 2.42 * (1 - line)) / tall, 0.231, 2.3 / tall)
                _panel(_canvas(figure, place, 2.31, 2.3), what, row, lang)
        write_atomically(path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
    return note


def _canvas(figure: Figure, place: tuple[float, float, float, float], width: float, height: float) -> Axes:
    """Axes without axes, measured in inches."""
    ax = figure.add_axes(place)
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    return ax


def _tint(colour: str, share: float) -> tuple[float, ...]:
    """The colour mixed with a share of white."""
    from matplotlib.colors import to_rgb

    return tuple(c + (1 - c) * share for c in to_rgb(colour))


def _box(ax: Axes, left: float, bottom: float, height: float, width: float, depth: float, colour: str) -> None:
    """A box by the lower left corner of its face, receding to the upper right by ``depth``; all in inches."""
    from matplotlib.patches import Polygon

    right, top = left + width, bottom + height
    back = ((left + depth, top + depth), (right + depth, top + depth), (right + depth, bottom + depth))
    faces = (
        ((left, bottom), (right, bottom), (right, top), (left, top)),
        ((left, top), (right, top), back[1], back[0]),
        ((right, bottom), back[2], back[1], (right, top)),
    )
    for corners, share in zip(faces, (0.62, 0.80, 0.30), strict=True):
        ax.add_patch(Polygon(corners, fc=_tint(colour, share), ec=colour, lw=0.8, joinstyle="round"))


def _arrow(ax: Axes, start: Point, end: Point, colour: str, weight: float = 0.9) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": weight, "mutation_scale": 7 * weight**0.5 / 0.9**0.5}
    ax.annotate("", end, start, arrowprops={**style, "shrinkA": 2, "shrinkB": 2})


def _label(ax: Axes, x: float, y: float, text: str, *, at: str = "center", size: float = SMALL, **style: Any) -> None:
    """Text whose left, centre or right (``at``) is at x; small type unless a heading asks for more."""
    ax.text(x, y, text, ha=at, va="center", fontsize=size, **style)


def _card(ax: Axes, x: float, y: float, width: float, height: float, **style: Any) -> None:
    from matplotlib.patches import FancyBboxPatch

    rounding = min(0.09, 0.42 * width)
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=f"round,pad=0,rounding_size={rounding}", **style))


class _Node:
    """A map in its place: a box whose face is height x width and whose depth is the channels, or a bar for a vector."""

    def __init__(self, shape: Sequence[int], x: float, y: float, largest: int, deepest: int, inches: float) -> None:
        self.x, self.y, self.shape = x, y, shape
        self.height, self.width, self.depth = inches * 0.95, 0.12, 0.0
        if len(shape) > 1:
            self.height, self.width = (inches * max(0.13, (side / largest) ** 0.5) for side in shape[:2])
            self.depth = 0.37 * inches * (shape[2] / deepest) ** 0.5
        self.left, self.right = x - (self.width + self.depth) / 2, x + (self.width + self.depth) / 2

    def draw(self, ax: Axes, colour: str) -> None:
        if len(self.shape) == 1:
            _card(
                ax,
                self.left,
                self.y - self.height / 2,
                self.width,
                self.height,
                fc=_tint(colour, 0.5),
                ec=colour,
                lw=0.8,
            )
        else:
            _box(ax, self.left, self.y - (self.height + self.depth) / 2, self.height, self.width, self.depth, colour)

    def window(self, ax: Axes, kernel: Sequence[int], colour: str) -> tuple[Point, Point]:
        """Mark the kernel on the face; returns the two corners from which its cone starts (all of a bar)."""
        from matplotlib.patches import Rectangle

        if len(self.shape) == 1:
            return (self.right, self.y + self.height / 2), (self.right, self.y - self.height / 2)
        sides = zip((self.height, self.width), kernel, self.shape, strict=False)
        height, width = (extent * min(1, k / side) for extent, k, side in sides)
        x, y = self.left + 0.62 * self.width - width / 2, self.y - (self.depth + height) / 2
        ax.add_patch(Rectangle((x, y), width, height, fc=colour, ec=INK, lw=0.7, zorder=5))
        return (x + width, y + height), (x + width, y)


def _half(shape: Sequence[int]) -> tuple[int, ...]:
    """The share of one tower in a map or a vector: half of its channels or features."""
    return (*shape[:-1], shape[-1] // TOWERS)


def _pool(what: Description, row: Row) -> Row | None:
    """The pool in the row's group, if it has one."""
    return next((r for r in what.rows if r.group == row.group and r.layer.startswith("pool")), None)


def _overview(ax: Axes, what: Description, lang: str) -> None:
    """Two lanes of maps from left to right, and between them what crosses."""
    counts = {"parameters": f"{what.parameters:,}", "neurons": f"{what.neurons:,}", "macs": f"{what.macs:,}"}
    _label(ax, 0.2, 4.25, say("title", lang), at="left", size=14, fontweight="bold")
    _label(ax, 0.2, 3.98, say("picture", lang, variant=what.variant, **counts), at="left", size=8.5, color=GREY)
    _label(ax, 0.2, 0.17, say("picture foot", lang, what.batch), at="left", color=GREY)

    weighted = what.weighted
    steps = [0.88 if len(row.output) == 1 else 1.1 for row in weighted[1:]]
    xs = list(accumulate(steps, initial=2.14))
    for x, row in zip(xs, weighted, strict=True):
        _label(ax, x, 3.62, row.layer, size=10.5, fontweight="bold")
        step = f", {say('with stride', lang, row.stride)}" if row.stride > 1 else ""
        reads = dimensions(row.kernel[:2]) + step if row.stride else f"{row.kernel[0]:,} → {row.kernels:,}"
        _label(ax, x, 3.43, reads, color=GREY)

    nodes = [_lane(ax, what, device, xs, lang) for device in range(TOWERS)]
    middle = sum(LANES) / 2
    side, deepest = max(weighted[0].input[:2]), max(row.output[-1] for row in weighted if len(row.output) > 1)
    image = _Node(weighted[0].input, 0.78, middle, side, deepest // TOWERS, 0.86)
    image.draw(ax, IMAGE)
    _label(ax, image.x, middle - 0.62, dimensions(image.shape), size=8, color=GREY)
    for lane in nodes:
        _arrow(ax, (image.right, middle), (lane[0].left, lane[0].y), IMAGE)
    _crossings(ax, what, nodes, middle)


def _lane(ax: Axes, what: Description, device: int, xs: Sequence[float], lang: str) -> list[_Node]:
    """One device: its name and parameters, the maps it makes, and the way through them."""
    colour, y, up = COLOURS[device], LANES[device], device == 0
    _card(ax, 0.2, y - (0.68 if up else 0.71), 9.6, 1.42, fc=colour, ec="none", alpha=0.07, zorder=0)
    top = y + 0.56 if up else y - 0.39
    _label(ax, 0.32, top, say("device", lang, device), at="left", size=9.5, fontweight="bold", color=colour)
    _label(ax, 0.32, top - 0.17, say("owns", lang, f"{what.devices[device]:,}"), at="left", color=GREY)

    weighted = what.weighted
    largest = max(weighted[0].output[:2])
    deepest = max(row.output[-1] for row in weighted if len(row.output) > 1) // TOWERS
    nodes: list[_Node] = []
    for x, row in zip(xs, weighted, strict=True):
        kernels = what.kernels_on(row, device)
        if not kernels:
            break
        node = _Node((*row.output[:-1], kernels), x, y, largest, deepest, 0.62)
        node.draw(ax, colour)
        if nodes:
            _arrow(ax, (nodes[-1].right, y), (node.left, y), colour)
        nodes.append(node)
        first = y + 0.62 if up else y - 0.475
        _label(ax, x, first, dimensions(node.shape))
        if pool := _pool(what, row):
            _label(ax, x, first - 0.15, say("pooled", lang, dimensions(pool.output[:2])), color=GREY)
    return nodes


def _crossings(ax: Axes, what: Description, nodes: list[list[_Node]], middle: float) -> None:
    """The exchanges: an arrow from lane to lane in the sender's colour, and between them what crosses in each direction."""
    places = {row.layer: at for at, row in enumerate(what.weighted)}
    groups = {row.group: at for at, row in enumerate(what.weighted)}
    for row in what.rows:  # a normalisation's halo is drawn after its group, everything else before its layer
        places.setdefault(row.layer, groups[row.group] + 1)
    weighted = {row.layer for row in what.weighted}

    for at, found in groupby(what.exchanges, key=lambda crossing: places[crossing.layer]):
        crossings = list(found)
        for sender in (0, 1) if any(c.directions > 1 for c in crossings) else (1,):
            start, end = nodes[sender][at - 1], nodes[1 - sender][at]
            _arrow(ax, (start.right, start.y), (end.left, end.y), COLOURS[sender], 1.3)
        named = len(crossings) > 1 or crossings[0].layer not in weighted
        text = "\n".join(f"{c.layer} {size_of(c.bytes)}" if named else size_of(c.bytes) for c in crossings)
        pill = {"boxstyle": "round,pad=0.35", "fc": "white", "ec": FAINT, "lw": 0.8}
        x, size = (nodes[0][at - 1].right + nodes[0][at].left) / 2, 6.8 if named else 8
        _label(ax, x, middle, text, size=size, fontweight="bold", bbox=pill, zorder=6, linespacing=1.35)


def _panel(ax: Axes, what: Description, row: Row, lang: str) -> None:
    """One layer: what each tower reads, the kernel on it, and the map it makes."""
    from matplotlib.patches import Polygon

    facts = next(f for f in what.network.layers if f.name == row.layer)
    shape = dimensions(row.kernel)
    kernels = say("kernels of" if row.stride else "weights", lang, f"{row.kernels:,}", shape)
    moves = [say("with stride", lang, row.stride)] if row.stride > 1 else []
    moves += [say("with padding", lang, row.padding)] if row.padding else []
    order = " → ".join(f.op.prefix for f in what.network.facts(row.group) if f.op.prefix != "flatten")
    _card(ax, 0.02, 0.02, 2.27, 2.26, fc="white", ec=FAINT, lw=0.8)
    _label(ax, 0.12, 2.1, row.layer, at="left", size=10.5, fontweight="bold")
    _label(ax, 2.19, 2.1, say("owns", lang, f"{row.parameters:,}"), at="right", color=GREY)
    _label(ax, 0.12, 1.92, ", ".join([kernels, *moves]), at="left")
    _label(ax, 0.58, 0.58, dimensions(row.input))
    _label(ax, 1.7, 0.58, dimensions(row.output))
    _label(ax, 2.19, 0.38, _formula(what, row, lang), at="right", color=GREY)
    _label(ax, 0.12, 0.17, order, at="left", color=GREY)

    first, whole = row is what.weighted[0], not what.kernels_on(row, 1)
    largest = max(*row.input[:2], *row.output[:2])
    deepest = max(row.input[-1], row.output[-1], 128)

    def towers(shape: tuple[int, ...], x: float, undivided: bool) -> list[_Node]:
        if undivided:
            return [_Node(shape, x, 1.23, largest, deepest, 0.74)]
        return [_Node(_half(shape), x, y, largest, deepest // TOWERS, 0.34) for y in (1.5, 0.96)]

    sources, sinks = towers(row.input, 0.58, first), towers(row.output, 1.7, whole)
    for source, colour in zip(sources, COLOURS, strict=False):
        source.draw(ax, IMAGE if first else colour)
    for target, sink in enumerate(sinks):
        sink.draw(ax, COLOURS[target])
        for at, source in enumerate(sources):
            if first or whole or facts.exchanged or at == target:
                colour = COLOURS[target if first else at]
                cone = (*source.window(ax, row.kernel, colour), (sink.left, sink.y))
                ax.add_patch(Polygon(cone, fc=colour, ec=colour, alpha=0.25, lw=0.6, zorder=4))


def _formula(what: Description, row: Row, lang: str) -> str:
    """How the map's side comes about, and what pooling makes of it; a map that is not square has no room for more."""
    if not row.formula or row.output[0] != row.output[1]:
        return row.formula
    pool = _pool(what, row)
    return f"{row.formula} = {row.side}" + (f", {say('pooled', lang, pool.side)}" if pool else "")
