"""AlexNet's first layer and first block from the images that a user has: 8-bit pixels, or fp32.

    pytest bench/test_stem.py --benchmark-only [-k "uint8 and bf16"] [--result DIR]

``test_layers.py`` times the same units on tensors that are in the right type and layout already. Here everybody begins with
pixels as a decoder hands them over (``[N, H, W, 3]`` in memory), or with fp32 images in NCHW, so that subtracting the mean, casts
and changes of layout count as they do for a user. Inference is the forward pass, training the gradients of weight and bias too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alexnet_kernels import functional as F
from alexnet_kernels import geometry, reference
from alexnet_kernels.geometry import LRN, Conv, MaxPool
from alexnet_kernels.profiling import timer

from .baselines import _FORCED, Call, Network, _scope, stock_network
from .cases import Problem, precision, tensors, units
from .rows import Row, measure_builders, row_of, tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOURCES = ("uint8", "fp32")
RUNS = ("inference", "training")
CASES = (("bf16", 256), ("tf32", 256), ("bf16", 128), ("bf16", 1), ("fp16", 256), ("bf16", 1024))
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Start:
    """A unit that begins with the image: how the image comes, and whether gradients are wanted."""

    problem: Problem  # its forward pass
    source: str
    run: str

    @property
    def id(self) -> str:
        unit, p = self.problem.unit, self.problem
        return f"{unit.variant}/{unit.name}/{self.run}/{p.track}/{p.batch}/from {self.source}"

    @property
    def numbers(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and scale of R, G and B."""
        return geometry.variant(self.problem.unit.variant).preprocess.rgb


def _starts() -> list[Start]:
    found = [u for u in units("paper") if u.first]  # conv1+relu1, then the whole group
    return [
        Start(Problem(unit, "forward", track, batch, DEVICE), source, run)
        for track, batch in CASES
        for source in SOURCES
        for run in RUNS
        for unit in reversed(found)
    ]


def images(start: Start) -> Tensor:
    """Pixels in ``[N, H, W, 3]``, or what they are prepared to, fp32 in NCHW."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = (start.problem.batch, *start.problem.unit.input)
    x = torch.randint(256, shape, generator=generator, dtype=torch.uint8, device=DEVICE)
    if start.source == "uint8":
        return x.contiguous(memory_format=torch.channels_last)
    return reference.pixels(x, *_numbers(start), torch.float32)


def _numbers(start: Start) -> tuple[Tensor, Tensor]:
    mean, scale = (torch.tensor(v, dtype=torch.float32, device=DEVICE) for v in start.numbers)
    return mean, scale


def stock(start: Start, layout: str, split: bool = False) -> Network:
    """torch's own: prepare, cast and lay the image out, then layer after layer."""
    network = _towers(start) if split else stock_network(start.problem.unit.facts)
    mean, scale = (v[:, None, None] for v in _numbers(start))
    pixels = start.source == "uint8"

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = (x.float() - mean) * scale if pixels else x
        return network(x.to(weight.dtype, memory_format=LAYOUTS[layout]), weight, bias)

    return run


def why_whole(start: Start) -> str | None:
    """Why the block cannot be two towers beside each other, or None."""
    crossing = any(isinstance(f.op, LRN) and f.op.groups % geometry.TOWERS for f in start.problem.unit.facts)
    return "its response normalisation sees both towers" if crossing else None


def _towers(start: Start) -> Network:
    """Each tower's maps by themselves, side by side at the end."""
    facts = [
        replace(f, op=replace(f.op, scope="global")) if isinstance(f.op, LRN) else f for f in start.problem.unit.facts
    ]
    tower = stock_network(facts)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parts = zip(weight.chunk(geometry.TOWERS), bias.chunk(geometry.TOWERS), strict=True)
        return torch.cat([tower(x, *part) for part in parts], 1)

    return run


def ours(start: Start) -> Network:
    """One call, which takes the image as it is."""
    unit, options = start.problem.unit, dict[str, Any]()
    if start.source == "uint8":
        options = dict(zip(("mean", "scale"), _numbers(start), strict=True))
    conv: Any = unit.op(Conv)
    if unit.kind == "conv+relu":
        return lambda x, weight, bias: F.conv1_relu(x, weight, bias, conv.stride, conv.padding, **options)
    norm, pool = unit.op(LRN), unit.op(MaxPool)
    assert isinstance(norm, LRN) and isinstance(pool, MaxPool)
    block = ((conv.stride, conv.padding, False), (norm.size, norm.alpha, norm.beta, norm.k))
    window = (pool.kernel, pool.stride, 0, 1, False)
    return lambda x, weight, bias: F.alexnet_stem(x, weight, bias, *block, window, **_scope(norm), **options)


def call(start: Start, network: Network, x: Tensor, weights: Sequence[Tensor], grad: Tensor) -> Call:
    if start.run == "inference":

        def forward() -> Tensor:
            with torch.no_grad():
                return network(x, *weights)

        return forward
    wanted = [w.detach().requires_grad_() for w in weights]

    def train() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = network(x, *wanted)
        return torch.autograd.grad(y, wanted, grad.to(y.dtype))

    return train


def builders(start: Start, compiled: bool, copies: int = 1) -> dict[str, Callable[[], list[Call]]]:
    """Everybody, ours first, by name; each of ``copies`` sets of buffers is another image."""
    data = tensors(start.problem)

    def build(network: Network, layout: str) -> list[Call]:
        laid = [w.contiguous(memory_format=LAYOUTS[layout]) if w.dim() == 4 else w for w in data.weights]
        return [call(start, network, x.clone(), laid, data.grad.clone()) for _ in range(copies)]

    x = images(start)
    found: dict[str, Callable[[], list[Call]]] = {}
    for layout in LAYOUTS:
        if layout == "channels_last" or start.source != "uint8":  # ours leaves pixels where they are
            found[f"ours {layout}"] = lambda at=layout: build(ours(start), at)
    for layout in LAYOUTS:
        found[f"eager {layout}"] = lambda at=layout: build(stock(start, at), at)
        if why_whole(start) is None:
            found[f"eager split towers {layout}"] = lambda at=layout: build(stock(start, at, split=True), at)
    for layout, options in (("nchw", {}), ("channels_last", _FORCED)) if compiled else ():
        found[f"compile {layout}"] = lambda at=layout, o=options: build(
            torch.compile(stock(start, at), dynamic=False, options=o or None), at
        )
    return found


def truth(start: Start) -> tuple[Tensor, ...]:
    """In fp64, from the very pixels and weights."""
    data, x = tensors(start.problem), images(start)
    exact = reference.pixels(x, *(v.double() for v in _numbers(start)), torch.float64) if x.dtype == torch.uint8 else x
    network = stock_network(start.problem.unit.facts)
    found = call(start, network, exact.double(), [w.double() for w in data.weights], data.grad.double())()
    return found if isinstance(found, tuple) else (found,)


def limit(start: Start) -> float:
    """As for the unit by itself; an image rounded to the track's type is one rounding more, which the tolerance has room for."""
    return tolerance(replace(start.problem, run="forward" if start.run == "inference" else "backward"))


def counted(start: Start) -> Row:
    """Operations, and bytes: those of the unit, with the image in the type that it comes in."""
    passes = [replace(start.problem, run=run) for run in ("forward", "backward")[: 1 + (start.run == "training")]]
    more = (1 if start.source == "uint8" else 4) - start.problem.dtype.itemsize
    image = start.problem.batch * torch.Size(start.problem.unit.input).numel()
    return {"flops": sum(p.flops for p in passes), "bytes": sum(p.bytes + more * image for p in passes)}


def bytes_read(start: Start) -> int:
    """Of one set of buffers: the image as it comes, and in training the gradient. The few weights are the same for all sets."""
    unit, p = start.problem.unit, start.problem
    image = torch.Size(unit.input).numel() * (1 if start.source == "uint8" else 4)
    gradient = torch.Size(unit.output).numel() * p.dtype.itemsize if start.run == "training" else 0
    return p.batch * (image + gradient)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: on a CPU the first block is torch's own and a pass before it")
@pytest.mark.parametrize("start", _starts(), ids=lambda start: start.id)
def test_start(start: Start, collect, budget) -> None:
    block = len(start.problem.unit.facts) > 2 and start.source == "uint8"
    first = block and (start.problem.track, start.problem.batch) == CASES[0]
    compiled = budget.compiled == "all" or (budget.compiled == "first" and first)

    def measure() -> Row:
        row = row_of(start.problem) | counted(start) | {"case": start.id, "pass": start.run, "from": start.source}
        with precision(start.problem.track):
            copies = row["buffer sets"] = timer.rotation(bytes_read(start), torch.device(DEVICE))
            limits = {"seconds": budget.seconds, "samples": budget.samples, "sample_ms": budget.sample_ms}
            made = builders(start, compiled, copies)
            measure_builders(row, made, truth(start), limit(start), torch.device(DEVICE), **limits)
        return row

    row = collect(measure)
    entries = {name: entry for name, entry in row["contenders"].items() if name.startswith("ours")}
    assert all(entry["status"] == "ok" for entry in entries.values()), entries
