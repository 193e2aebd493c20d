"""``alexnet_kernels::conv1``, ``alexnet_kernels::stem`` and their gradient ``alexnet_kernels::conv1_backward``: AlexNet's
first block, on images.

``conv1`` is the 11x11 convolution with stride 4, its bias, and ReLU where asked for; ``stem`` is response normalisation and
max pooling of that, in either order, in one. An image is floating point, or 8-bit pixels that become
``(x - mean[c]) · scale[c]`` on the way in (``reference.pixels``); ``padding`` is top, bottom, left, right, zeros around the
prepared image. Results have the weight's dtype, and are channels_last where image or weight are, or the image is uint8.

Kept for backward are the image as it came, the map after ReLU (``a``, channels_last) and pooling's ``place``. ``a`` is a
result of ``stem`` like any other, so the second gradient finds its way through it. Under autocast :func:`apply_conv1` and
:func:`apply_stem` cast as torch's convolution does, except that the kernel converts the image itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, channels_last, memory_format
from torch.library import fallthrough_kernel, register_autograd, register_fake

from .. import dispatch, reference
from . import fused, pool
from ._conv_ways import layout_for
from ._library import AUTOCAST_KEYS, LIBRARY, as_forward, dense, is_direct, layout_of, wants_gradient
from ._stem_arguments import Image, cast, out_size, why_plain
from ._stem_ways import STRIDE, Map, Padding, cuda_conv1_why_not, cuda_stem_why_not
from .fused import Norm, Pool
from .pool import Window


def _layout(x: Tensor, weight: Tensor) -> memory_format:
    """Of the results: decoders hand pixels over with the channels innermost, and a network goes on so; else torch's rule."""
    return channels_last if x.dtype == torch.uint8 else layout_for(x, weight)


def _conv1(chosen: dispatch.Implementation | None, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    if x.numel() == 0:
        return _fake_conv1(x, weight, *args)
    y = _perform("conv1", chosen, dense(x), dense(weight), *args)
    return y.contiguous(memory_format=_layout(x, weight))


def _stem(chosen: dispatch.Implementation | None, x: Tensor, weight: Tensor, *args: Any) -> Map:
    if x.numel() == 0:
        return _fake_stem(x, weight, *args)
    y, a, place = _perform("stem", chosen, dense(x), dense(weight), *args)
    return y.contiguous(memory_format=_layout(x, weight)), a, place


def _perform(op: str, chosen: dispatch.Implementation | None, x: Tensor, weight: Tensor, *args: Any) -> Any:
    bias, *rest = args
    arguments = (x, weight, None if bias is None else bias.contiguous(), *rest)
    return dispatch.run(op, *arguments) if chosen is None else dispatch.perform(chosen, *arguments)


def _backward(grad: Tensor, a: Tensor | None, x: Tensor, weight: Tensor, *args: Any) -> Map:
    mask = args[-1]
    if grad.numel() == 0:
        zeros = (torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(weight.shape[0]))
        dx, dw, db = (z if m else z.new_empty(0) for z, m in zip(zeros, mask, strict=True))
        return dx, dw, db
    kept = None if a is None else dense(a, channels_last)
    return dispatch.run("conv1_backward", dense(grad, channels_last), kept, dense(x), dense(weight), *args)


_IMAGE = "Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? scale, SymInt[] padding"
LIBRARY.define(f"conv1({_IMAGE}, bool relu) -> Tensor")
LIBRARY.define(
    f"stem({_IMAGE}, bool relu, int size, float lrn_scale, float beta, float k, int groups, int[] window, bool ceil_mode, "
    "bool pool_first, bool keep) -> (Tensor y, Tensor a, Tensor place)"
)
LIBRARY.define(
    "conv1_backward(Tensor grad, Tensor? a, Tensor x, Tensor weight, Tensor? mean, Tensor? scale, SymInt[] padding, "
    "bool[] mask) -> (Tensor dx, Tensor dw, Tensor db)"
)
LIBRARY.impl("conv1", functools.partial(_conv1, None), "CompositeExplicitAutograd")
LIBRARY.impl("stem", functools.partial(_stem, None), "CompositeExplicitAutograd")
LIBRARY.impl("conv1_backward", _backward, "CompositeExplicitAutograd")
for _key in AUTOCAST_KEYS:
    for _op in ("conv1", "stem", "conv1_backward"):
        LIBRARY.impl(_op, fallthrough_kernel, _key)

conv1 = torch.ops.alexnet_kernels.conv1.default
stem = torch.ops.alexnet_kernels.stem.default
conv1_backward = torch.ops.alexnet_kernels.conv1_backward.default


def _empty_map(x: Tensor, weight: Tensor, padding: Padding, layout: memory_format) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *out_size(x, weight, padding))
    return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=layout)


@register_fake("alexnet_kernels::conv1", lib=LIBRARY)
def _fake_conv1(x: Tensor, weight: Tensor, bias: Any, mean: Any, scale: Any, padding: Padding, relu: bool) -> Tensor:
    return _empty_map(x, weight, padding, _layout(x, weight))


@register_fake("alexnet_kernels::stem", lib=LIBRARY)
def _fake_stem(
    x: Tensor, weight: Tensor, bias: Any, mean: Any, scale: Any, padding: Padding, relu: bool, *args: Any
) -> Map:
    *_, window, ceil_mode, _, keep = args
    a = _empty_map(x, weight, padding, channels_last)
    y, place = pool.empty_outputs(a, window, ceil_mode, keep)
    return torch.empty_like(y, memory_format=_layout(x, weight)), a if keep else a.new_empty(0), place


@register_fake("alexnet_kernels::conv1_backward", lib=LIBRARY)
def _fake_backward(grad: Tensor, a: Tensor | None, x: Tensor, weight: Tensor, *args: Any) -> Map:
    dx, dw, db = args[-1]
    return (
        torch.empty_like(x, memory_format=layout_of(x)) if dx else x.new_empty(0),
        torch.empty_like(weight, memory_format=layout_of(weight)) if dw else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if db else 0),
    )


def _keep_image(ctx: Any, inputs: tuple[Any, ...], *results: Tensor | None) -> None:
    x, weight, _, mean, scale, ctx.padding, ctx.relu = inputs[:7]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, scale, *results)
    ctx.backend = dispatch.requested()  # autograd's threads do not see the caller's context


def _save_conv1(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep_image(ctx, inputs, output if inputs[6] else None)


def _save_stem(ctx: Any, inputs: tuple[Any, ...], output: Map) -> None:
    _, a, place = output
    *arguments, keep = inputs[7:]
    ctx.mark_non_differentiable(place, *(() if keep else (a,)))
    _keep_image(ctx, inputs, a, place)
    ctx.arguments = fused.Arguments(*arguments)


def _of_image(ctx: Any, grad: Tensor, a: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients by x, weight and bias of one by the convolution's map; ``a``: the mask of ReLU is still to be applied."""
    x, weight, mean, scale = ctx.saved_tensors[:4]
    mask = list(ctx.needs_input_grad[:3])
    run: Any = conv1_backward
    if is_direct(grad, a, x, weight) and not wants_gradient(grad, x, weight):
        run = _backward
    found = run(grad, a, x, weight, mean, scale, ctx.padding, mask)
    return tuple(part if wanted else None for part, wanted in zip(found, mask, strict=True))


def _gradient_conv1(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    with as_forward(ctx, grad):
        return (*_of_image(ctx, grad, ctx.saved_tensors[4]), *[None] * 4)


def _gradient_stem(ctx: Any, grad: Tensor | None, grad_a: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Pooling's, LRN's and ReLU's gradient in one, then the convolution's. ``grad_a`` is there in a second gradient alone."""
    *_, a, place = ctx.saved_tensors
    if place.dim() == 1:
        raise RuntimeError(_NOTHING_KEPT)
    dz = None
    with as_forward(ctx, grad, grad_a):
        if grad is not None:
            masked = ctx.relu and grad_a is None
            run: Any = fused.lrn_pool_backward
            if is_direct(grad, a) and not wants_gradient(grad, a):
                run = fused._backward
            dz = run(grad, a, None, place, masked, *ctx.arguments.of_backward, False)[0]
        if grad_a is not None:
            dz = grad_a if dz is None else dz + grad_a
        if dz is None:
            return (None,) * 16
        return (*_of_image(ctx, dz, a if ctx.relu and grad_a is not None else None), *[None] * 13)


_NOTHING_KEPT = "keep=False keeps nothing for backward; call the operation with keep=True"


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Map) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.padding, ctx.mask = inputs[6:]
    ctx.backend = dispatch.requested()


def _second_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference, which is differentiable to any order: double backward is rare and need not be fast."""
    with dispatch.use_backend(ctx.backend):
        dispatch.require_reference("the gradient of conv1_backward", "double backward runs in plain torch")
    grad, a, x, weight, mean, scale = ctx.saved_tensors
    wanted = [i for i, asked in enumerate(ctx.mask) if asked]

    def first(grad: Tensor, weight: Tensor, *image: Tensor) -> tuple[Tensor, ...]:
        of = (*(image or (x,)), weight, mean, scale, (STRIDE, STRIDE), ctx.padding, ctx.mask)
        found = reference.conv1_backward(grad, a, *of)
        return tuple(found[i] for i in wanted)

    image = (x,) if x.is_floating_point() else ()  # pixels are integers
    by_grad, by_weight, *by_image = torch.func.vjp(first, grad, weight, *image)[1](tuple(grads[i] for i in wanted))
    return by_grad, None, by_image[0] if by_image else None, by_weight, None, None, None, None


register_autograd("alexnet_kernels::conv1", _gradient_conv1, setup_context=_save_conv1, lib=LIBRARY)
register_autograd("alexnet_kernels::stem", _gradient_stem, setup_context=_save_stem, lib=LIBRARY)
register_autograd("alexnet_kernels::conv1_backward", _second_gradient, setup_context=_save_backward, lib=LIBRARY)


class Conv1(torch.autograd.Function):
    """The same gradient without the dispatcher: see ``is_direct``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, chosen = args
        y = _conv1(chosen, *inputs)
        _save_conv1(ctx, tuple(inputs), y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradient_conv1(ctx, grad), None)


class Stem(torch.autograd.Function):
    """The same gradient without the dispatcher: see ``is_direct``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Map:
        *inputs, chosen = args
        found = _stem(chosen, *inputs)
        _save_stem(ctx, tuple(inputs), found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradient_stem(ctx, *grads), None)


def apply_conv1(image: Image, relu: bool) -> Tensor | None:
    """The convolution by the kernel; None where none can run it, an error where it was asked for by name."""
    image = cast(image)
    x, weight, bias, *_ = image
    if torch.compiler.is_compiling():
        return conv1(*image, relu) if _runs_compiled("conv1", image, relu) else None
    if dispatch.requested() not in ("auto", "cuda"):
        return None
    chosen = dispatch.kernel("conv1", *image, relu)
    if chosen is None:
        return None
    if not is_direct(x, weight, bias):
        return conv1(*image, relu)
    if wants_gradient(x, weight, bias):
        return Conv1.apply(*image, relu, chosen)
    return _conv1(chosen, *image, relu)


def apply_stem(image: Image, norm: Norm, pooling: Pool, pool_first: bool, relu: bool = True) -> Tensor | None:
    """Convolution, ReLU, LRN and pooling by the kernel; None where none can run them, an error where it was asked for."""
    window = pool.window_of(*pooling[:4])
    if window is None or _why_no_map(image, window) is not None:
        return None
    image = cast(image)
    x, weight, bias, *_ = image
    rest = (relu, *norm, window, pooling[4], pool_first, wants_gradient(x, weight, bias))
    if torch.compiler.is_compiling():
        constants = (relu, norm[0], 1.0, 1.0, 1.0, norm[4], *rest[6:])  # floats may be symbols here
        return stem(*image, *rest)[0] if _runs_compiled("stem", image, *constants) else None
    if dispatch.requested() not in ("auto", "cuda"):
        return None
    chosen = dispatch.kernel("stem", *image, *rest)
    if chosen is None:
        return None
    if not is_direct(x, weight, bias):
        return stem(*image, *rest)[0]
    if rest[-1]:
        return Stem.apply(*image, *rest, chosen)[0]
    return _stem(chosen, *image, *rest)[0]


Block = tuple[Norm, Pool, bool]  # what follows the convolution and its ReLU: norm, pooling, pool_first


def explain(op: str, image: Image, conv: Sequence[Any], relu: bool, block: Block | None) -> dispatch.Explanation | str:
    """What runs ``op``: the kernel, or in one line why it does not. ``conv`` is stride, dilation and groups."""
    why, name = why_plain(image, *conv), "conv1"
    rest: tuple[Any, ...] = (relu,)
    if block is not None:
        norm, pooling, pool_first = block
        window = pool.window_of(*pooling[:4])
        why, name = why or _why_no_map(image, window), "stem"
        rest = (relu, *norm, window, pooling[4], pool_first, False)
    image = cast(image)
    why = why or (cuda_conv1_why_not if block is None else cuda_stem_why_not)(*image, *rest)
    wanted = dispatch.requested()
    if why is None and wanted in ("auto", "cuda"):
        return replace(dispatch.explain_call(name, *image, *rest), op=op)
    if wanted == "cuda":
        raise RuntimeError(f"backend 'cuda' cannot run {name}: {why}; use backend 'auto' or mend the cause")
    return why or f"can run; {wanted} was asked for by name"


def _why_no_map(image: Image, window: Window | None) -> str | None:
    if window is None or min(out_size(image.x, image.weight, image.padding)) < window[0]:
        return "written for windows inside the map"
    return None


def _runs_compiled(op: str, image: Image, *args: Any) -> bool:
    """``runs_compiled`` for two tensors; ``args`` are constants, those that the reasons look at as they are."""
    x, weight = image[:2]
    return _has_kernel(op, x.device, x.dtype, int(weight.shape[0]), weight.dtype, *args)


def _has_kernel(
    op: str, device: torch.device, dtype: torch.dtype, channels: int, weights: torch.dtype, *args: Any
) -> bool:
    x = torch.empty(0, dtype=dtype, device=device)
    weight = torch.empty(channels, 0, dtype=weights, device=device)
    return dispatch.has_kernel(op, x, weight, None, None, None, (0, 0, 0, 0), *args)


_has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as runs_compiled is
