"""What ``make tune`` chooses from, and what it times: each kernel's candidates, and its launches in the paper's network.

A kernel is ``family.name``: a file of ``kernels/`` and the name under which its tuned table is asked, a key of ``CONFIGS``
or, for convolutions, channels and taps. To tune another one, add a row to :data:`KERNELS` with a function that yields its
:class:`Case`\\ s; a new file goes into ``kernels/catalogue.py`` too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import geometry, reference
from alexnet_kernels.kernels import (
    _launch,
    activation,
    catalogue,
    conv,
    conv_backward,
    fused,
    fused_backward,
    lrn,
    optim,
    pool,
)
from alexnet_kernels.kernels._conv_backward_choice import TILES
from alexnet_kernels.kernels._conv_choice import CONFIGS as FORMS
from alexnet_kernels.kernels._conv_choice import choose, name_of, why_not
from alexnet_kernels.kernels._conv_geometry import Problem
from alexnet_kernels.kernels._launch import Launch

BATCH = 256
IMAGES = 2  # of the batch are compared with fp64
HALF = torch.bfloat16
DTYPES = (HALF, torch.float32)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
PLAIN = (3, 3, 2, 2, 0, 0, 1, 1)
DILATED = (3, 3, 2, 2, 1, 1, 2, 2)  # no network's, but what only the general gradient takes
TF32 = 2.0**-10  # the eps of a product in tf32
FAMILIES = {**catalogue.FAMILIES, "conv_backward_sum": conv_backward}
Shape = tuple[int, ...]
Norm = tuple[int, float, float, float, int]  # size, scale, beta, k, groups


@dataclass(frozen=True)
class Case:
    """One launch, or several in a row: how they are planned, what they write, and what should stand in the first IMAGES images
    (rows, channels) of that, in fp64; ``eps`` of an error where that is not the dtype's."""

    plan: Callable[[], Launch | tuple[Launch, ...]]
    written: tuple[Tensor, ...]
    truth: Callable[[], tuple[Tensor, ...]]
    dtype: torch.dtype
    eps: float = 0.0

    def launches(self) -> tuple[Launch, ...]:
        planned = self.plan()
        return planned if isinstance(planned, tuple) else (planned,)


@dataclass(frozen=True)
class Kernel:
    """What may be chosen, and ``cases(name, device)``: on ``"meta"`` they can be planned and compiled, not run. ``default`` is
    what is built in where that is no entry of the family's ``CONFIGS``."""

    configs: tuple[Any, ...]
    cases: Callable[[str, str], Iterator[Case]]
    default: Any = None


def _grid(*blocks: int, warps: tuple[int, ...] = (2, 4, 8)) -> tuple[_launch.Config, ...]:
    return tuple(_launch.Config(block, count) for block in blocks for count in warps)


def _tensor(shape: Shape, dtype: torch.dtype, layout: torch.memory_format, device: str, factor: float = 1.0) -> Tensor:
    """Normal numbers times ``factor``; on ``"meta"`` nothing but a shape."""
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device).contiguous(memory_format=layout)
    return torch.randn(shape, device=device).mul_(factor).to(dtype).contiguous(memory_format=layout)


def _places(like: Tensor) -> Tensor:
    """Any tap of each window: all of them are inside the map."""
    if like.is_meta:
        return torch.empty_like(like, dtype=torch.uint8)
    return torch.randint_like(like, 9, dtype=torch.uint8)


def _few(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t[:IMAGES].double() for t in tensors)


def _norms() -> Iterator[tuple[Shape, Norm]]:
    """The paper's normalisations: the shape of their input, and their numbers."""
    for facts in geometry.variant("paper").layers:
        if isinstance(op := facts.op, geometry.LRN):
            scale = op.alpha / (op.size if op.alpha_mode == "mean" else 1)
            yield (BATCH, *facts.input), (op.size, scale, op.beta, op.k, op.groups)


def _lrn(name: str, device: str) -> Iterator[Case]:
    form, direction = name.split("_")
    layout = torch.channels_last if form == "vector" else torch.contiguous_format
    for shape, norm in _norms():
        if form == "general":
            norm = (4, *norm[1:])  # an even window is what only this form takes
        for dtype in DTYPES:
            x = _tensor(shape, dtype, layout, device, 20).relu_()
            inputs = (x,) if direction == "forward" else (_tensor(shape, dtype, layout, device), x)
            right = reference.lrn if direction == "forward" else reference.lrn_backward
            out = torch.empty_like(x)

            def truth(inputs=inputs, norm=norm, right=right) -> tuple[Tensor, ...]:
                return (right(*_few(*inputs), *norm),)

            yield Case(partial(lrn.plan, (*inputs, out), *norm), (out,), truth, dtype)


def _pools() -> Iterator[Shape]:
    """The inputs of the paper's poolings."""
    for facts in geometry.variant("paper").layers:
        if isinstance(facts.op, geometry.MaxPool):
            yield (BATCH, *facts.input)


def _pooled(x: Tensor, window: pool.Window) -> Tensor:
    """An empty map for what ``window`` makes of ``x``, in its layout."""
    y = torch.empty(pool.output_shape(x, window, False), dtype=x.dtype, device=x.device)
    return y.contiguous(memory_format=pool.layout_of(x))


def _pool_forward(name: str, device: str) -> Iterator[Case]:
    for shape in _pools():
        for dtype in DTYPES:
            for layout in LAYOUTS:
                x = _tensor(shape, dtype, layout, device)
                y = _pooled(x, PLAIN)
                place = torch.empty_like(y, dtype=torch.uint8)

                def truth(x=x) -> tuple[Tensor, ...]:
                    maxima, places = reference.max_pool2d_with_place(*_few(x), PLAIN)
                    return maxima, places.double()

                yield Case(partial(pool.plan_forward, x, None, y, place, PLAIN), (y, place), truth, dtype)


def _pool_backward(name: str, device: str) -> Iterator[Case]:
    window = PLAIN if name == "cell_backward" else DILATED
    for shape in _pools():
        for dtype in DTYPES:
            for layout in LAYOUTS:
                dx = torch.empty_like(_tensor(shape, dtype, layout, device))
                grad = _tensor(tuple(_pooled(dx, window).shape), dtype, layout, device)
                place = _places(grad)
                if window is DILATED:
                    place.fill_(4)  # the tap in the middle: the others may lie in the padding

                def truth(grad=grad, place=place, shape=shape, window=window) -> tuple[Tensor, ...]:
                    return (reference.max_pool2d_backward(*_few(grad), place[:IMAGES], *shape[2:], window),)

                yield Case(partial(pool.plan_backward, grad, place, dx, window), (dx,), truth, dtype)


def _activated(layout: torch.memory_format, device: str) -> Iterator[tuple[Tensor, Tensor, Norm]]:
    """Input, bias and numbers of a normalisation behind a convolution, whose bias and ReLU it applies."""
    for shape, norm in _norms():
        for dtype in DTYPES:
            bias = _tensor((shape[1],), dtype, torch.preserve_format, device)
            yield _tensor(shape, dtype, layout, device, 20), bias, norm


def _fused_forward(name: str, device: str) -> Iterator[Case]:
    strip = name == "strip_forward"
    for x, bias, norm in _activated(LAYOUTS[not strip], device):
        y = _pooled(x, PLAIN) if strip else torch.empty_like(x)

        def truth(x=x, bias=bias, norm=norm, strip=strip) -> tuple[Tensor, ...]:
            normal = reference.lrn(*_few(reference.activation(x[:IMAGES], bias, True)), *norm)
            return (reference.max_pool2d_with_place(normal, PLAIN)[0] if strip else normal,)

        if strip:
            place = torch.empty_like(y, dtype=torch.uint8)  # which of two maxima one rounding apart, fp64 does not know
            yield Case(partial(fused.plan_strip, x, bias, y, place, True, *norm[1:]), (y,), truth, x.dtype)
        else:
            yield Case(partial(fused.plan_ring, x, bias, y, True, *norm[1:]), (y,), truth, x.dtype)


def _fused_backward(name: str, device: str) -> Iterator[Case]:
    vector = name == "vector_gradient"
    plan = fused_backward.plan_vector if vector else fused_backward.plan_ring
    for x, bias, norm in _activated(LAYOUTS[not vector], device):
        grad = _pooled(x, PLAIN)
        grad = _tensor(tuple(grad.shape), x.dtype, pool.layout_of(x), device)
        place, dx = _places(grad), torch.empty_like(x)

        def launch(tensors=(grad, place, x, bias, dx), norm=norm) -> _launch.Launch:
            return plan(*tensors, True, *norm[1:], PLAIN, True)[0]

        def truth(grad=grad, place=place, x=x, bias=bias, norm=norm) -> tuple[Tensor, ...]:
            a = reference.activation(x[:IMAGES], bias, True)
            return reference.lrn_pool_backward(
                *_few(grad, a), None, place[:IMAGES], True, *norm, PLAIN, with_bias_grad=False
            )[:1]

        yield Case(launch, (dx,), truth, x.dtype)


# ------------------------------------------------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class Layer:
    """A convolution with padding that keeps the map's size: channels, sides, outputs, taps, groups."""

    channels: int
    size: int
    outputs: int
    taps: int
    groups: int

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Stride, padding, dilation, groups."""
        return (1, 1), (self.taps // 2,) * 2, (1, 1), self.groups

    @property
    def weight(self) -> Shape:
        return self.outputs, self.channels // self.groups, self.taps, self.taps

    def problem(self, images: int, itemsize: int) -> Problem:
        return Problem.of((images, self.channels, self.size, self.size), self.weight, *self.numbers, itemsize)

    def tensors(self, images: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """``x``, the weight, and a map like the output, all channels_last."""
        last, spread = torch.channels_last, math.sqrt(2 / math.prod(self.weight[1:]))
        x = _tensor((images, self.channels, self.size, self.size), dtype, last, device)
        y = _tensor((images, self.outputs, self.size, self.size), dtype, last, device)
        return x, _tensor(self.weight, dtype, last, device, spread), y


def _layers(*networks: str) -> list[Layer]:
    """Those of ``kernels/conv.py`` whose label begins so, the most important first."""
    rows = [row for network in networks for label, row in conv.LAYERS.items() if label.startswith(network)]
    return [Layer(channels, size, outputs, taps, groups) for channels, size, outputs, taps, _, groups in rows]


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 else "ieee"


def _conv(layer: Layer, dtype: torch.dtype, batches: tuple[int, ...], name: str, device: str) -> Iterator[Case]:
    for images in batches:
        x, weight, y = layer.tensors(images, dtype, device)
        bias = _tensor((layer.outputs,), dtype, torch.preserve_format, device)
        problem = layer.problem(images, dtype.itemsize)

        def truth(x=x, weight=weight, bias=bias) -> tuple[Tensor, ...]:
            return (reference.conv2d(*_few(x), weight.double(), bias.double(), True, *layer.numbers),)

        plan = partial(conv.plan, x, conv.pack(weight), bias, y, problem, True, _precision(dtype))
        yield Case(plan, (y,), truth, dtype, TF32 if dtype == torch.float32 else 0.0)


def conv_row(layer: Layer, dtype: torch.dtype, batches: tuple[int, ...]) -> tuple[str, Kernel]:
    """Its key in the table, which large batches share, and the tiles that can compute all of them and waste little.

    Small batches are not tuned: their tile follows the number of programs, and one key of the table would overrule that for
    all. Group-major rows are no candidate, for a map with groups has no such layout but the same key.
    """
    problems = [layer.problem(images, dtype.itemsize) for images in batches]
    precision, default = _precision(dtype), choose(problems[0], _precision(dtype))
    tiles = [tile for form in ("batch_tile", "pixel_pair") for tile in FORMS[form]]
    tiles += [replace(tiles[0], num_stages=4), replace(tiles[0], num_warps=8), replace(tiles[1], num_stages=3)]
    tiles = [replace(tile, block_k=max(16, tile.block_k * 2 // dtype.itemsize)) for tile in tiles]
    able = [tile for tile in tiles if all(why_not(problem, tile, precision) is None for problem in problems)]
    most = 1.3 * min((problems[0].issued(tile) for tile in able), default=0.0)
    width = layer.outputs // layer.groups
    wide = min(width, 64 if width % 128 else 128)  # narrower ones read x more often
    able = [tile for tile in able if problems[0].issued(tile) <= most and tile.block_n >= wide]
    name = f"conv.{name_of(problems[0], default, precision)}"
    return name, Kernel(tuple(dict.fromkeys(able)), partial(_conv, layer, dtype, batches), default)


def _input_gradient(layer: Layer, batch: int, name: str, device: str) -> Iterator[Case]:
    """As it is, and through the ReLU below with the sums of its bias gradient."""
    x, weight, dy = layer.tensors(batch, HALF, device)
    for fused_ in (False, True):
        dx, mask = torch.empty_like(x), x if fused_ else None

        def plan(dx=dx, mask=mask, fused_=fused_) -> Launch:
            problem = layer.problem(batch, dx.element_size())
            return conv_backward.plan_input(dy, conv.pack(weight), mask, dx, problem, "ieee", fused_)[0]

        def truth(mask=mask) -> tuple[Tensor, ...]:
            right = (*_few(dy, x), weight.double(), None, *layer.numbers, (True, False, False))
            found = reference.conv2d_backward(*right)[0]
            return (found if mask is None else found.masked_fill(mask[:IMAGES] <= 0, 0),)

        yield Case(plan, (dx,), truth, dx.dtype)


def _weight_gradient(layer: Layer, batch: int, name: str, device: str) -> Iterator[Case]:
    """The shares and their sum: how many shares there are depends on the tile."""
    x, weight, dy = layer.tensors(batch, HALF, device)
    dw = torch.empty(layer.weight, dtype=x.dtype, device=device)

    def plan() -> tuple[Launch, ...]:
        return conv_backward.plan_weight(dy, x, dw, layer.problem(batch, x.element_size()), "ieee")

    def truth() -> tuple[Tensor, ...]:
        """Of the first IMAGES output channels, whose group is the first."""
        few, depth = (dy[:, :IMAGES].double(), x[:, : layer.weight[1]].double()), weight[:IMAGES].double()
        return (reference.conv2d_backward(*few, depth, None, *layer.numbers[:3], 1, (False, True, False))[1],)

    yield Case(plan, (dw,), truth, x.dtype)


def _sum(layer: Layer, batch: int, name: str, device: str) -> Iterator[Case]:
    """The second launch alone, of as many shares as the first one leaves."""
    x, _, dy = layer.tensors(batch, HALF, "meta")
    dw = torch.empty(layer.weight, dtype=x.dtype, device=device)
    problem = layer.problem(batch, x.element_size())
    shares, _ = conv_backward.plan_weight(dy, x, torch.empty_like(dw, device="meta"), problem, "ieee")
    made = next(a for a in shares.args if isinstance(a, Tensor) and a.dtype == torch.float32)
    partials = _tensor(tuple(made.shape), torch.float32, torch.contiguous_format, device)

    def truth() -> tuple[Tensor, ...]:
        total = partials[:, :IMAGES].double().sum(0)
        return (total.view(IMAGES, layer.taps, layer.taps, -1).permute(0, 3, 1, 2),)

    yield Case(lambda: conv_backward.plan_sum(partials, dw, problem), (dw,), truth, dw.dtype)


def gradient_rows(layer: Layer, batch: int = BATCH) -> Iterator[tuple[str, Kernel]]:
    """dgrad and wgrad of a layer in 16 bits, where the table is asked at all: what is built in, and its neighbours."""
    sizes = f"{layer.outputs // layer.groups}x{layer.channels // layer.groups}"
    problem = layer.problem(batch, 2)
    for kind, cases in (("input", _input_gradient), ("weight", _weight_gradient)):
        tile = TILES.get(f"{kind} {sizes}") or conv_backward.choose(kind, problem, True, True, True)
        others = [replace(tile, num_stages=n) for n in (2, 3, 4)] + [replace(tile, num_warps=12 - tile.num_warps)]
        if kind == "input":
            others += [replace(tile, block_m=64, num_warps=4), replace(tile, block_k=32)]
        else:
            others += [replace(tile, block_k=32), replace(tile, block_m=128), replace(tile, block_m=64, num_warps=4)]
        yield f"conv_backward.{kind} {sizes}", Kernel(tuple(dict.fromkeys(others)), partial(cases, layer, batch), tile)


def _first() -> Iterator[tuple[str, Kernel]]:
    """The paper's convolutions in 16 bits, which are most of its time."""
    for layer in _layers("paper"):
        yield conv_row(layer, HALF, (BATCH, 128))
    for layer in _layers("paper"):
        yield from gradient_rows(layer)


def _others() -> Iterator[tuple[str, Kernel]]:
    """The sum behind wgrad, the same layers in tf32, and torchvision's."""
    _, largest, *_ = _layers("paper")
    yield "conv_backward_sum.sum_shares", Kernel(_grid(128, 256, 512), partial(_sum, largest, BATCH), conv_backward.SUM)
    for layer in _layers("paper"):
        yield conv_row(layer, torch.float32, (BATCH, 128))
    for layer in _layers("torchvision"):
        yield conv_row(layer, HALF, (BATCH, 128))
        yield from gradient_rows(layer)


# ----------------------------------------------------------------------------------- bias, ReLU, dropout, the optimiser


def _maps() -> Iterator[Shape]:
    """What a ReLU follows: conv3's maps, and fc6's rows."""
    facts = {f.name: f for f in geometry.variant("paper").layers}
    yield (BATCH, *facts["conv3"].output)
    yield BATCH, facts["fc6"].output[0]


def _activation(name: str, device: str) -> Iterator[Case]:
    form, _, direction = name.partition("_")
    for shape in _maps():
        if form == "planes" and len(shape) == 2:
            continue
        for dtype in DTYPES:
            layout = LAYOUTS[form == "planes" or len(shape) == 2]
            x, grad = (_tensor(shape, dtype, layout, device) for _ in range(2))
            bias, out = _tensor(shape[1:2], dtype, torch.preserve_format, device), torch.empty_like(x)

            def truth(x=x, grad=grad, bias=bias) -> tuple[Tensor, ...]:
                if direction == "backward":
                    return (grad[:IMAGES].double().masked_fill(x[:IMAGES] <= 0, 0),)
                added = bias.double().view(-1, *[1] * (x.dim() - 2))
                return ((x[:IMAGES].double() + added).relu(),)

            def plan(x=x, grad=grad, bias=bias, out=out) -> Launch:
                if direction == "backward":
                    return activation.plan_backward(grad, x, out, 1.0, True)[0]
                return activation.plan_forward(x, bias, out, True)

            yield Case(plan, (out,), truth, dtype)


def _sums(name: str, device: str) -> Iterator[Case]:
    for channels in sorted({shape[1] for shape in _maps()}):
        partials = _tensor((4 * BATCH, channels), torch.float32, torch.contiguous_format, device)
        out = torch.empty(channels, dtype=torch.bfloat16, device=device)

        def truth(partials=partials) -> tuple[Tensor, ...]:
            return (partials[:, :IMAGES].double().sum(0),)

        yield Case(partial(activation.plan_sums, partials, out), (out,), truth, out.dtype)


def _dropout(name: str, device: str) -> Iterator[Case]:
    *_, shape = _maps()
    seed = torch.tensor([11], device=device)
    for dtype in DTYPES:
        x = _tensor(shape, dtype, torch.contiguous_format, device)
        y = torch.empty_like(x)

        def truth(x=x) -> tuple[Tensor, ...]:
            return (reference.dropout(x[:IMAGES].double(), seed, 0.5),)

        yield Case(partial(activation.plan_dropout, x, seed, y, 0.5), (y,), truth, dtype)


def _sizes() -> Iterator[int]:
    """Elements of each parameter of the paper's network."""
    for facts in geometry.variant("paper").layers:
        if facts.parameters:
            yield from (facts.parameters - facts.output[0], facts.output[0])


def _optim(name: str, device: str) -> Iterator[Case]:
    """A step of training in half types; the rate is 0, so that it can be repeated. Chunks are as long as a block."""
    masters = [_tensor((size,), torch.float32, torch.preserve_format, device) for size in _sizes()]
    weights, grads = ([torch.zeros_like(m, dtype=HALF) for m in masters] for _ in range(2))
    columns = (weights, grads, [torch.zeros_like(m) for m in masters], masters)

    def plan() -> Launch:
        block = optim.tuned("optim", masters[0].device).get("sgd", optim.CONFIGS["sgd"]).block
        tables = _addresses(columns, block)
        return optim.plan(*tables, (HALF, HALF), 0.0, 0.9, 5e-4, False, False, None, True)

    yield Case(plan, tuple(weights), lambda: tuple(m[:IMAGES].double() for m in masters), HALF)


def _addresses(columns: Sequence[Sequence[Tensor]], block: int) -> tuple[Tensor, Tensor]:
    """The optimiser's tables; of tensors without memory only as long as they would be."""
    if not columns[0][0].is_meta:
        return optim.Table().of(columns, block)
    chunks = sum(_launch.cdiv(t.numel(), block) for t in columns[0])
    table = torch.empty(len(columns[0]), 5, dtype=torch.int64, device="meta")
    return table, torch.empty(chunks, 2, dtype=torch.int32, device="meta")


# In order of importance: the layout that training runs in first, the forms for unusual windows last.
KERNELS = {
    **dict(_first()),
    "lrn.vector_forward": Kernel(_grid(64, 128, 256, 512), _lrn),
    "lrn.vector_backward": Kernel(_grid(64, 128, 256), _lrn),
    "fused.strip_forward": Kernel(_grid(32, 64, 128, 256), _fused_forward),
    "fused_backward.vector_gradient": Kernel(_grid(32, 64, 128, 256), _fused_backward),
    "pool.pool_forward": Kernel(_grid(64, 128, 256), _pool_forward),
    "pool.cell_backward": Kernel(_grid(64, 128, 256), _pool_backward),
    "optim.sgd": Kernel(_grid(1024, 2048, 4096, 8192, warps=(4, 8)), _optim),
    "activation.rows_forward": Kernel(_grid(1024, 2048, 4096, 8192, warps=(4, 8)), _activation),
    "activation.rows_backward": Kernel(_grid(1024, 2048, 4096, 8192, warps=(4, 8)), _activation),
    "activation.dropout": Kernel(_grid(512, 1024, 2048, warps=(4, 8)), _dropout),
    "lrn.ring_forward": Kernel(_grid(64, 128, 256), _lrn),
    "lrn.ring_backward": Kernel(_grid(64, 128, 256), _lrn),
    "fused.ring_normalise": Kernel(_grid(64, 128, 256), _fused_forward),
    "fused_backward.ring_gradient": Kernel(_grid(64, 128, 256), _fused_backward),
    **dict(_others()),
    "activation.planes_forward": Kernel(_grid(1024, 2048, 4096, warps=(4, 8)), _activation),
    "activation.planes_backward": Kernel(_grid(1024, 2048, 4096, warps=(4, 8)), _activation),
    "activation.sums": Kernel(_grid(1024, 2048, 4096, warps=(2, 4, 8)), _sums),
    "lrn.general_forward": Kernel(_grid(256, 512, 1024), _lrn),
    "lrn.general_backward": Kernel(_grid(128, 256, 512), _lrn),
    "pool.general_backward": Kernel(_grid(64, 128, 256), _pool_backward),
}
