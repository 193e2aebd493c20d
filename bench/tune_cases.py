"""What ``make tune`` chooses from, and what it times: each kernel's candidates, and its launches in the paper's network.

A kernel is ``family.name``: a file of ``kernels/`` with ``CONFIGS``, and a key of these. To tune another one, add a row to
:data:`KERNELS` with a function that yields its :class:`Case`\\ s; a file that is new here goes into :data:`FAMILIES` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import geometry, reference
from alexnet_kernels.kernels import _launch, fused, fused_backward, lrn, pool

BATCH = 256
IMAGES = 2  # of the batch are compared with fp64
DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
PLAIN = (3, 3, 2, 2, 0, 0, 1, 1)
DILATED = (3, 3, 2, 2, 1, 1, 2, 2)  # no network's, but what only the general gradient takes
FAMILIES = {"lrn": lrn, "pool": pool, "fused": fused, "fused_backward": fused_backward}
Shape = tuple[int, ...]
Norm = tuple[int, float, float, float, int]  # size, scale, beta, k, groups


@dataclass(frozen=True)
class Case:
    """One launch: how it is planned, what it writes, and what should stand in the first IMAGES images of that, in fp64."""

    plan: Callable[[], _launch.Launch]
    written: tuple[Tensor, ...]
    truth: Callable[[], tuple[Tensor, ...]]
    dtype: torch.dtype


@dataclass(frozen=True)
class Kernel:
    """What may be chosen, and ``cases(name, device)``: on ``"meta"`` they can be planned and compiled, not run."""

    configs: tuple[Any, ...]
    cases: Callable[[str, str], Iterator[Case]]


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


# In order of importance: the layout that training runs in first, the forms for unusual windows last.
KERNELS = {
    "lrn.vector_forward": Kernel(_grid(64, 128, 256, 512), _lrn),
    "lrn.vector_backward": Kernel(_grid(64, 128, 256), _lrn),
    "fused.strip_forward": Kernel(_grid(32, 64, 128, 256), _fused_forward),
    "fused_backward.vector_gradient": Kernel(_grid(32, 64, 128, 256), _fused_backward),
    "pool.pool_forward": Kernel(_grid(64, 128, 256), _pool_forward),
    "pool.cell_backward": Kernel(_grid(64, 128, 256), _pool_backward),
    "lrn.ring_forward": Kernel(_grid(64, 128, 256), _lrn),
    "lrn.ring_backward": Kernel(_grid(64, 128, 256), _lrn),
    "fused.ring_normalise": Kernel(_grid(64, 128, 256), _fused_forward),
    "fused_backward.ring_gradient": Kernel(_grid(64, 128, 256), _fused_backward),
    "lrn.general_forward": Kernel(_grid(256, 512, 1024), _lrn),
    "lrn.general_backward": Kernel(_grid(128, 256, 512), _lrn),
    "pool.general_backward": Kernel(_grid(64, 128, 256), _pool_backward),
}
