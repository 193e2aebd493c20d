"""Convolutions in a row, a ReLU after each, as one node of autograd, so that a gradient crosses a ReLU in dgrad's own epilogue.

``y_i = max(0, conv2d(y_{i-1}, w_i) + b_i)`` for i = 1 ... n, ``y_0 = x``. Backward is one pass for ``dz_n`` and ``db_n``, then
from the last layer down ``dw_i = wgrad(dz_i, y_{i-1})`` and, in one kernel, ``dz_{i-1} = dgrad(dz_i)`` where not
``y_{i-1} <= 0`` and ``db_{i-1} = Σ dz_{i-1}``: two passes over each map between two layers are saved. Where dgrad is cuDNN's,
the pass for mask and bias gradient follows it, as it would by single layers. Kept are the maps that single layers keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import _conv_ways as ways
from . import conv
from ._conv_arguments import prepared_chain
from ._conv_ways import Arguments
from ._library import as_forward, dense, is_direct, layout_of, wants_gradient

Layer = tuple[Tensor, Tensor | None, Sequence[Any]]  # weight, bias, (stride, padding, dilation, groups)
Plan = Sequence[Arguments]
Gradients = list["Tensor | None"]


class ConvChain(torch.autograd.Function):
    """``parameters`` are weight and bias of each layer in turn; ``plan`` has the layers' geometries."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, *parameters: Any) -> Tensor:
        maps = [x]
        for args, weight, bias in zip(plan, parameters[::2], parameters[1::2], strict=True):
            maps.append(conv.forward(maps[-1], weight, bias, True, *args))
        ctx.save_for_backward(*maps, *parameters)
        ctx.plan, ctx.backend = plan, dispatch.requested()  # autograd's threads do not see the caller's context
        return maps[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.plan) + 1
        maps, parameters = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        run = _differentiable if torch.is_grad_enabled() else _gradients
        with as_forward(ctx, grad):
            return None, *run(ctx.plan, grad, maps, parameters, ctx.needs_input_grad[1:])


def _gradients(plan: Plan, grad: Tensor, maps: Sequence[Tensor], parameters: Any, wanted: Sequence[bool]) -> Gradients:
    """By ``x`` and each parameter, those that are ``wanted``; nothing is computed below the last of them."""
    found: Gradients = [None] * len(wanted)
    dz, found[-1] = ways.epilogue_backward(grad, maps[-1], wanted[-1])
    for i in reversed(range(len(plan))):
        weight, layout = dense(parameters[2 * i]), ways.layout_for(maps[i], parameters[2 * i])
        x, dz = dense(maps[i], layout), dense(dz, layout)
        dx, dw = conv.passes(dz, x, weight, plan[i], (i == 0 and wanted[0], wanted[2 * i + 1]))
        found[2 * i + 1] = None if dw is None else dense(dw, layout_of(weight))
        if i == 0:
            found[0] = None if dx is None else dense(dx, layout)
        elif any(wanted[: 2 * i + 1]):
            dz, found[2 * i] = ways.dgrad_through_relu(dz, x, weight, plan[i], wanted[2 * i])
        else:
            break
    return found


def _differentiable(
    plan: Plan, grad: Tensor, maps: Sequence[Tensor], parameters: Any, wanted: Sequence[bool]
) -> Gradients:
    """For a gradient of the gradient: by single layers once more, whose maps are functions of ``x``."""
    y = maps[0]
    for args, weight, bias in zip(plan, parameters[::2], parameters[1::2], strict=True):
        y = conv.conv2d(y, weight, bias, True, *args)
    inputs = [t for t, asked in zip((maps[0], *parameters), wanted, strict=True) if asked]
    found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    return [next(found) if asked else None for asked in wanted]


def apply(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """The layers one after the other, of any ``x``: as one node where a kernel or cuDNN runs them and a gradient is wanted."""
    tensors = (x, *(t for weight, bias, _ in layers for t in (weight, bias)))
    if is_direct(*tensors) and wants_gradient(*tensors) and not conv.is_torchs(x):
        chain = prepared_chain(x, layers)
        if chain is not None and dispatch.kernel("conv2d", *chain[0][:3], True, *chain[1][0]) is not None:
            return ConvChain.apply(chain[1], *chain[0])
    for weight, bias, geometry in layers:
        x = conv.apply("conv2d_relu", x, weight, bias, True, *geometry)
    return x


def explain(x: Tensor, layers: Sequence[Layer]) -> dispatch.Explanation:
    """What :func:`apply` would run: each layer for itself, whether or not they are one node of autograd."""
    parts = []
    for weight, bias, geometry in layers:
        parts.append(conv.explain("conv2d_relu", x, weight, bias, True, *geometry))
        stride, padding, dilation, groups = geometry
        y = torch.nn.functional.conv2d(x.to("meta"), weight.to("meta"), None, stride, padding, dilation, groups)
        x = torch.empty_like(y, device=x.device, requires_grad=wants_gradient(x, weight, bias))
    why_not = {name: why for part in parts for name, why in part.why_not.items()}
    return dispatch.Explanation.of_parts("conv2d_relu_chain", why_not, *parts)
