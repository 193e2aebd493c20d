"""``alexnet_kernels::conv2d`` and its gradient ``alexnet_kernels::conv2d_backward``, [N, C, H, W] -> [N, O, OH, OW].

``y = conv2d(x, weight) + bias``, then ``max(0, .)`` where ``relu``. Kept for backward are ``x``, ``weight`` and, behind a
ReLU, ``y``, which the next layer keeps anyway: what is 0 there passes no gradient on. Backward is one pass for the mask and
the bias gradient, then dgrad and wgrad, each by the way that is quicker for it (``_choice.py``); ``mask`` names what is asked
for, the rest has no elements.

Results are channels_last where ``x`` or ``weight`` is, as torch's are; the weight's gradient has the weight's layout, so that
nothing is copied where gradients are added up. Another layout is copied once. Under autocast all three tensors are cast, as
torch casts them. On a CPU, where no kernel can run, torch's own operations are called and nothing of this is in between.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import fallthrough_kernel, register_autograd, register_fake

from .. import dispatch, reference
from . import _conv_ways as ways
from ._choice import Pass
from ._conv_arguments import Size, as_autocast, out_sides, prepared
from ._conv_ways import Arguments, Precision, layout_for
from ._library import (
    AUTOCAST_KEYS,
    LIBRARY,
    as_forward,
    dense,
    is_direct,
    layout_of,
    triton_why_not,
    wants_gradient,
)
from .composite import plain

Outputs = tuple[Tensor, Tensor, Tensor]

_BACKWARD: tuple[Pass, ...] = ("dgrad", "wgrad")
_WHY_NO_KERNEL = "no kernel can run it"


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *args: Any) -> Tensor:
    layout = layout_for(x, weight)
    inputs = (dense(x, layout), dense(weight), bias, relu, *_as_pairs(args))
    with dispatch.use_backend("reference" if x.numel() == 0 else dispatch.requested()):
        return dense(
            dispatch.run("conv2d", *inputs), layout
        )  # an x of one pixel is in both layouts, its result may not be


def _backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor | None, *args: Any) -> Outputs:
    stride, padding, dilation, groups, mask, *precision = args
    geometry = _as_pairs((stride, padding, dilation, groups, *precision))
    layout = layout_for(x, weight)
    with_dx, with_dw, with_db = mask
    with dispatch.use_backend("reference" if x.numel() == 0 else dispatch.requested()):
        dz, db = ways.epilogue_backward(grad, y, with_db)
        dx, dw = passes(dense(dz, layout), dense(x, layout), dense(weight), geometry, (with_dx, with_dw))
    return (  # an empty tensor for each that nobody wants: results must not be one another
        grad.new_empty(0) if dx is None else dense(dx, layout),
        grad.new_empty(0) if dw is None else dense(dw, layout_of(weight)),
        grad.new_empty(0) if db is None else db,
    )


def passes(
    dz: Tensor, x: Tensor, weight: Tensor, geometry: Arguments, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dgrad and wgrad; one call where torch is to make both in the same way."""
    args = (dz, x, weight, *geometry)
    dgrad, wgrad = (
        dispatch.choose(f"conv2d_{run}", *args) if m else None for run, m in zip(_BACKWARD, mask, strict=True)
    )
    if dgrad is not None and wgrad is not None and dgrad.backend == wgrad.backend != "triton":
        split = [dgrad.backend == "cudnn" and ways.is_split(run, x, weight, geometry) for run in _BACKWARD]
        if split[0] == split[1]:
            dispatch.note(dgrad.backend)
            return ways.gradients(dz, x, weight, geometry, mask, split[0])
    dx, dw = (None if chosen is None else dispatch.perform(chosen, *args) for chosen in (dgrad, wgrad))
    return dx, dw


def _as_pairs(args: Sequence[Any]) -> Arguments:
    """Torch's dispatcher hands lists over; the choice of a way is looked up by tuples."""
    stride, padding, dilation, groups, *precision = args
    return tuple(stride), tuple(padding), tuple(dilation), groups, precision[0] if precision else None


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
LIBRARY.define(f"conv2d(Tensor x, Tensor weight, Tensor? bias, bool relu, {_GEOMETRY}, str? precision=None) -> Tensor")
LIBRARY.define(
    f"conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? y, {_GEOMETRY}, bool[] mask, str? precision=None)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("conv2d", forward, "CompositeExplicitAutograd")
LIBRARY.impl("conv2d_backward", _backward, "CompositeExplicitAutograd")

conv2d = torch.ops.alexnet_kernels.conv2d.default
conv2d_backward = torch.ops.alexnet_kernels.conv2d_backward.default


def _under_autocast(key: str, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    cast = as_autocast(x, weight, bias)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
        return conv2d(*cast, *args)


for _key in AUTOCAST_KEYS:
    LIBRARY.impl("conv2d", functools.partial(_under_autocast, _key), _key)
    LIBRARY.impl("conv2d_backward", fallthrough_kernel, _key)


@register_fake("alexnet_kernels::conv2d", lib=LIBRARY)
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *args: Any) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *out_sides(x.shape[2:], weight.shape[2:], *args[:3]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_for(x, weight))


@register_fake("alexnet_kernels::conv2d_backward", lib=LIBRARY)
def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor | None, *args: Any) -> Outputs:
    with_dx, with_dw, with_db = args[4]
    return (
        torch.empty_like(x, memory_format=layout_for(x, weight)) if with_dx else grad.new_empty(0),
        torch.empty_like(weight, memory_format=layout_of(weight)) if with_dw else grad.new_empty(0),
        grad.new_empty(weight.shape[0] if with_db else 0),
    )


def _keep(ctx: Any, x: Tensor, weight: Tensor, y: Tensor | None, *args: Any) -> None:
    ctx.save_for_backward(x, weight, y)
    ctx.arguments = args  # stride, padding, dilation, groups, precision
    ctx.backend = dispatch.requested()  # autograd's threads do not see the caller's context


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, relu, *args = inputs
    _keep(ctx, x, weight, output if relu else None, *args)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By ``x``, ``weight`` and ``bias``: what both ways to autograd share."""
    x, weight, y = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    run: Any = conv2d_backward
    if is_direct(grad, x, weight, y) and not wants_gradient(grad, x, weight):
        run = _backward
    *geometry, precision = ctx.arguments
    with as_forward(ctx, grad):
        found = run(grad, x, weight, y, *geometry, mask, precision)
    return tuple(g if wanted else None for g, wanted in zip(found, mask, strict=True))


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad), *[None] * 6)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.arguments, ctx.backend = inputs[4:], dispatch.requested()


def _second_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference, which is differentiable to any order: double backward is rare and need not be fast."""
    with dispatch.use_backend(ctx.backend):
        dispatch.require_reference("the gradient of conv2d_backward", "double backward runs in plain torch")
    first = (*ctx.saved_tensors, *ctx.arguments[:5])  # geometry and mask; plain torch has one precision
    second = reference.conv2d_second_gradient(grads, *first)
    return (*second, *[None] * 7)


register_autograd("alexnet_kernels::conv2d", _gradient, setup_context=_save, lib=LIBRARY)
register_autograd("alexnet_kernels::conv2d_backward", _second_gradient, setup_context=_save_backward, lib=LIBRARY)


class Conv2d(torch.autograd.Function):
    """The same gradient without the dispatcher: see ``is_direct``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        relu: bool,
        chosen: dispatch.Implementation,
        args: Arguments,
    ) -> Tensor:
        y: Tensor = dispatch.perform(chosen, dense(x, layout_for(x, weight)), dense(weight), bias, relu, *args)
        _keep(ctx, x, weight, y if relu else None, *args)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grad), None, None, None)


# ------------------------------------------------------------------------------------------------ what the callers reach


def _some_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a graph under compilation should hold the operation, which asks for its way when it runs."""
    return triton_why_not(torch.empty(0, dtype=dtype, device=device)) is None


_some_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see _library.runs_compiled


def is_torchs(x: Tensor) -> bool:
    """Whether nothing but torch's own convolution comes into question: on a CPU where nobody asked for a backend."""
    return x.is_cpu and not torch.compiler.is_compiling() and dispatch.requested() in ("auto", "reference")


def apply(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    precision: Precision | None = None,
) -> Tensor:
    """Convolution, bias and ReLU of any ``x``, as the user's ``op``: by a kernel or cuDNN, torch's own everywhere else."""
    conv = (stride, padding, dilation, groups)
    if is_torchs(x):  # here and not where implementations are chosen: a call on a small tensor takes microseconds
        dispatch.note("reference")
        plainly: Any = reference.conv2d_relu if relu else torch.nn.functional.conv2d
        return plainly(x, weight, bias, *conv)
    why, inputs, geometry = prepared(x, weight, bias, *conv)
    if why is None:
        batch, cast, added = inputs
        y = _on_kernel(batch, cast, added, relu, (*geometry, precision))
        if y is not None:
            return y if x.dim() == 4 else y[0]
    return _plain(op, why or _WHY_NO_KERNEL, x, weight, bias, relu, *conv)


def _plain(op: str, why: str, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *conv: Any) -> Tensor:
    if relu:
        return plain(op, why, reference.conv2d_relu, x, weight, bias, *conv)
    return plain(op, why, torch.nn.functional.conv2d, x, weight, bias, *conv)


def _on_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, args: Any) -> Tensor | None:
    if torch.compiler.is_compiling():
        return conv2d(x, weight, bias, relu, *args) if _some_kernel(x.device, x.dtype) else None
    chosen = dispatch.kernel("conv2d", x, weight, bias, relu, *args)
    if chosen is None:
        return None
    if not is_direct(x, weight, bias):
        return conv2d(x, weight, bias, relu, *args)
    if wants_gradient(x, weight, bias):
        return Conv2d.apply(x, weight, bias, relu, chosen, args)
    return dispatch.perform(chosen, dense(x, layout_for(x, weight)), dense(weight), bias, relu, *args)


def explain(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *conv: Any, precision: Precision | None = None
) -> dispatch.Explanation:
    """What :func:`apply` would run; where a gradient is wanted, the passes of its backward too."""
    why, inputs, geometry = prepared(x, weight, bias, *conv)
    if why is not None:
        return dispatch.explain_reference(op, why)
    args = (*geometry, precision)
    forward = dispatch.explain_call("conv2d", *inputs, relu, *args)
    if forward.backend == "reference":
        return replace(forward, op=op)
    epilogue = dispatch.Explanation.of_one("bias_relu", *_EPILOGUE[ways.runs_ours(x)])
    parts = [forward]
    if forward.backend == "cudnn" and (relu or bias is not None):
        parts.append(epilogue)
    x, weight, bias = inputs
    if wants_gradient(x, weight, bias):
        if relu or (bias is not None and bias.requires_grad):
            parts.append(replace(epilogue, op="bias_relu_backward"))
        asked = {"conv2d_dgrad": x.requires_grad, "conv2d_wgrad": weight.requires_grad}
        parts += [dispatch.explain_call(name, x, x, weight, *args) for name, wanted in asked.items() if wanted]
    if len(parts) == 1:
        return replace(forward, op=op)
    return dispatch.Explanation.of_parts(op, forward.why_not, *parts)


_EPILOGUE = {
    True: ("triton", "one pass of this package stands around either convolution"),
    False: ("reference", "no kernel can run it"),
}
