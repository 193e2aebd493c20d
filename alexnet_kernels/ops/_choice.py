"""Which way is quicker for one pass of a convolution on this GPU: what was measured on it, else a model of both ways.

A pass is ``forward``, ``dgrad`` or ``wgrad``; a way is ``triton`` (this package's kernels), ``cudnn`` (torch's convolution),
or ``cudnn split`` (torch's convolution for each group by itself: cuDNN has been slow at grouped ones). ``make tune`` measures
them for AlexNet's convolutions and writes the table, ``kernels/tuned/<gpu>.json``, beside the tuned launches:

    "choices": {"conv2d": [{"pass": "forward", "dtype": "bfloat16", "layout": "channels_last",
                            "geometry": "48x27x27 128x5x5 stride 1x1 padding 2x2 dilation 1x1 groups 2", "batch": 256,
                            "way": "triton", "milliseconds": {"triton": 0.21, "cudnn": 0.26, "cudnn split": 0.31}}]}

``geometry`` holds channels of one group. A row stands for all maps that have the same number of binary digits in their
output's area (224 and 227 pixels are one case), and for larger batches that fill the kernel's tiles as well as its own does.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ._conv_arguments import out_sides

Pass = Literal["forward", "dgrad", "wgrad"]
PASSES: tuple[Pass, ...] = ("forward", "dgrad", "wgrad")
WAYS = ("triton", "cudnn", "cudnn split")
WHOLE_TILE = 64  # images: batches that are multiples of it leave no row of a tile idle


class Facts(NamedTuple):
    """All that the choice for one pass depends on, besides the GPU."""

    run: Pass
    dtype: str  # "bfloat16", "float16", or for fp32 its precision: "tf32", "tf32x3", "ieee"
    channels_last: bool
    shape: tuple[int, ...]  # of the input
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    epilogue: bool = False  # whether bias or ReLU follows

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def outputs(self) -> tuple[int, int]:
        """Height and width of the output's maps."""
        h, w = out_sides(self.shape[2:], self.weight[2:], self.stride, self.padding, self.dilation)
        return h, w

    @property
    def geometry(self) -> str:
        """As a table has it."""
        sizes = (self.weight[1], *self.shape[2:]), (self.weight[0] // self.groups, *self.weight[2:])
        maps, kernel, *rest = ("x".join(map(str, s)) for s in (*sizes, self.stride, self.padding, self.dilation))
        names = zip(("stride", "padding", "dilation", "groups"), (*rest, self.groups), strict=True)
        return " ".join((maps, kernel, *(f"{name} {value}" for name, value in names)))

    @property
    def key(self) -> Key:
        """Cases with one key are one case, except for their batches."""
        h, w = self.outputs
        kernel = (self.weight[1], self.weight[0] // self.groups, *self.weight[2:], *self.stride, *self.padding)
        return self.run, self.dtype, self.channels_last, (*kernel, *self.dilation, self.groups, (h * w).bit_length())


Key = tuple[str, str, bool, tuple[int, ...]]


@dataclass(frozen=True)
class Choice:
    """The way to go, in one line why, and which of torch's two ways is the quicker one where only they can be had."""

    way: str
    why: str
    torchs: str = "cudnn"


@dataclass(frozen=True)
class Row:
    """One measured case."""

    batch: int
    way: str
    milliseconds: Mapping[str, float]

    @property
    def choice(self) -> Choice:
        times = ", ".join(f"{way} {ms:.3f}" for way, ms in sorted(self.milliseconds.items(), key=lambda item: item[1]))
        torchs = {way: ms for way, ms in self.milliseconds.items() if way.startswith("cudnn")}
        quickest = min(torchs, key=lambda way: torchs[way]) if torchs else "cudnn"
        return Choice(self.way, f"measured on this GPU with {self.batch} images, in ms: {times}", quickest)


# ----------------------------------------------------------------------------------------------------------- the table

_GEOMETRY = ("", "", "stride", "padding", "dilation", "groups")


def parse(row: Mapping[str, Any]) -> tuple[Key, Row]:
    """A row of the table as a key and what was measured; ``ValueError``, ``KeyError`` or ``TypeError`` for anything else."""
    words = row["geometry"].split(" ")
    numbers = [tuple(map(int, word.split("x"))) for word in (*words[:2], *words[3::2])]
    if tuple(words[2::2]) != _GEOMETRY[2:] or [len(n) for n in numbers] != [3, 3, 2, 2, 2, 1]:
        raise ValueError(f"geometry {row['geometry']!r}")
    (c, h, w), (o, kh, kw), stride, padding, dilation, (groups,) = numbers
    if row["pass"] not in PASSES or row["way"] not in WAYS or row["layout"] not in ("channels_last", "contiguous"):
        raise ValueError(f"pass {row['pass']!r}, way {row['way']!r}, layout {row['layout']!r}")
    shape, weight = (int(row["batch"]), c * groups, h, w), (o * groups, c, kh, kw)
    last = row["layout"] == "channels_last"
    facts = Facts(row["pass"], str(row["dtype"]), last, shape, weight, stride, padding, dilation, groups)
    times = {str(way): float(ms) for way, ms in row["milliseconds"].items()}
    return facts.key, Row(facts.batch, row["way"], times)


def row_of(facts: Facts, way: str, milliseconds: Mapping[str, float]) -> dict[str, Any]:
    """What :func:`parse` reads."""
    return {
        "pass": facts.run,
        "dtype": facts.dtype,
        "layout": "channels_last" if facts.channels_last else "contiguous",
        "geometry": facts.geometry,
        "batch": facts.batch,
        "way": way,
        "milliseconds": dict(milliseconds),
    }


@functools.cache
def table(gpu: str) -> dict[Key, tuple[Row, ...]]:
    """What was measured on a GPU of that name, rows of a case by batch; empty where nothing was."""
    from ..kernels import _launch

    path = _launch.table_of(gpu)
    if not path.exists():
        return {}
    found: dict[Key, list[Row]] = {}
    try:
        for entry in json.loads(path.read_text()).get("choices", {}).get("conv2d", []):
            key, row = parse(entry)
            found.setdefault(key, []).append(row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        warnings.warn(f"{path} has no table of convolutions ({why}); a model chooses instead", stacklevel=2)
        return {}
    return {key: tuple(sorted(rows, key=lambda row: row.batch)) for key, rows in found.items()}


def look_up(rows: tuple[Row, ...], batch: int) -> Row | None:
    """The row for ``batch``: its own, else the nearest smaller one where both fill their tiles."""
    own = [row for row in rows if row.batch == batch]
    if own:
        return own[-1]
    if batch % WHOLE_TILE:
        return None
    smaller = [row for row in rows if row.batch < batch and row.batch % WHOLE_TILE == 0]
    return smaller[-1] if smaller else None


# ----------------------------------------------------------------------------------------------------------- the model

# Estimates, none of them measured by this package: a measured table replaces them. They hold for one compute capability;
# elsewhere nothing is assumed.
_MODELLED = (9, 0)
_FLOPS_PER_BYTE = {"float16": 184.0, "bfloat16": 184.0, "tf32": 91.0}  # 790 and 390 TFLOP/s against 4.3 TB/s
_RATES = ((384, 0.75), (192, 0.68), (128, 0.65), (0, 0.5))  # of issued products, by outputs of a group at least
_RATE_OF_NARROW_DEPTH = 0.62  # a group's channels are no multiple of 64, the depth of a step
_RATE_OF_BACKWARD = 0.9  # is left where operands have to be turned
_CUDNN, _CUDNN_GROUPED = 0.75, 0.55  # the second is the first by Inductor's factor for grouped convolutions, 1.358
_MARGIN = 1.10  # a model must promise this much before cuDNN is left


def planned(facts: Facts) -> tuple[bool, float]:
    """Whether the kernel's tiles would be images at one pixel, and the products it would issue for one of the usual count."""
    from ..kernels import _conv_backward_choice as backward
    from ..kernels import _conv_choice as forward
    from ..kernels._conv_geometry import Problem

    size = 4 if facts.dtype.startswith("tf32") else 2
    problem = Problem.of(facts.shape, facts.weight, facts.stride, facts.padding, facts.dilation, facts.groups, size)
    if facts.run == "forward":
        tile = forward.choose(problem, "tf32", described=facts.channels_last)
        return tile.form != "pointer_rows", problem.issued(tile) / problem.nominal
    kind, described = "input" if facts.run == "dgrad" else "weight", facts.channels_last and size == 2
    tile = backward.choose(kind, problem, described, facts.channels_last, True)
    return tile.form != "rows", backward.issued(kind, problem, tile) / problem.nominal


def model(facts: Facts, capability: tuple[int, int]) -> Choice:
    """By issued products and rates; whatever it cannot promise goes to cuDNN."""
    why = _why_cudnn(facts, capability)
    if why is not None:
        return Choice("cudnn", f"{why}: cuDNN until this is measured on the GPU (make tune)")
    outputs, depth, (h, w) = facts.weight[0] // facts.groups, facts.weight[1], facts.outputs
    nominal = 2.0 * facts.batch * h * w * facts.weight[0] * depth * facts.weight[2] * facts.weight[3]
    rate = next(rate for least, rate in _RATES if outputs >= least)
    rate = rate if depth % 64 == 0 else min(rate, _RATE_OF_NARROW_DEPTH)
    ours = nominal * planned(facts)[1] / (rate if facts.run == "forward" else rate * _RATE_OF_BACKWARD)
    theirs = nominal / (_CUDNN if facts.groups == 1 else _CUDNN_GROUPED)
    if facts.epilogue:  # cuDNN's result is read and written once more, by a kernel of its own
        size = 4 if facts.dtype == "tf32" else 2
        theirs += _FLOPS_PER_BYTE[facts.dtype] * 2 * size * facts.batch * facts.weight[0] * h * w
    way = "triton" if theirs > _MARGIN * ours else "cudnn"
    return Choice(way, f"not measured on this GPU; a model gives cuDNN {theirs / ours:.2f} times the time of Triton")


def _why_cudnn(facts: Facts, capability: tuple[int, int]) -> str | None:
    """What the model leaves to cuDNN without a calculation."""
    if facts.dtype not in _FLOPS_PER_BYTE:
        return f"fp32 as {facts.dtype}"
    if capability != _MODELLED:
        return f"compute capability {capability[0]}.{capability[1]}"
    if not facts.channels_last:
        return "contiguous maps"
    if facts.run != "forward" and (facts.dtype == "tf32" or facts.groups == 1):
        return f"{facts.run} {'in tf32' if facts.dtype == 'tf32' else 'without groups'}"
    return None if planned(facts)[0] else f"{facts.batch} images of these sizes do not fill tiles of images"


@functools.lru_cache(4096)
def choose(facts: Facts, device: torch.device) -> Choice:
    """The quicker way for ``facts`` on a CUDA device."""
    row = look_up(table(torch.cuda.get_device_name(device)).get(facts.key, ()), facts.batch)
    return row.choice if row is not None else model(facts, torch.cuda.get_device_capability(device))
