"""``alexnet_kernels::lrn_pool`` and its gradient ``alexnet_kernels::lrn_pool_backward``, [N, C, H, W] -> [N, C, OH, OW].

Bias and ReLU where asked for, then response normalisation and max pooling in either order, as one operation (see
``reference.lrn_pool``); one more for all of their gradients. Kept for backward are the input and a byte for each output,
the ``place`` of ``pool.py``, which has the rules on windows and layouts. Under autocast the input's dtype is kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import fallthrough_kernel, register_autograd, register_fake

from .. import dispatch, reference
from . import conv, lrn, pool
from ._library import (
    AUTOCAST_KEYS,
    LIBRARY,
    as_forward,
    compiled_why_not,
    dense,
    is_direct,
    layout_of,
    runs_compiled,
    triton_why_not,
    wants_gradient,
)
from .pool import Outputs, Window


class Arguments(NamedTuple):
    """What both operations take, in their order: normalisation, window, order."""

    size: int
    scale: float
    beta: float
    k: float
    groups: int
    window: Window
    ceil_mode: bool
    pool_first: bool

    @property
    def of_backward(self) -> tuple[Any, ...]:
        return (*self[:6], self.pool_first)


def _together(bias: Tensor | None) -> Tensor | None:
    """``bias`` as the kernels read it, element after element: itself, or a copy of a slice or an expanded one."""
    return None if bias is None else bias.contiguous()


def _forward(x: Tensor, bias: Tensor | None, relu: bool, *args: Any) -> Outputs:
    if x.numel() == 0:
        return _fake(x, bias, relu, *args)
    return dispatch.run("lrn_pool", dense(x), _together(bias), relu, *args)


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None, place: Tensor, *args: Any) -> Outputs:
    x = dense(x)
    if x.numel() == 0:
        return torch.zeros_like(x), x.new_zeros(x.shape[1] if args[-1] else 0)
    layout = layout_of(x)
    return dispatch.run("lrn_pool_backward", dense(grad, layout), x, _together(bias), dense(place, layout), *args)


_NORM = "bool relu, int size, float scale, float beta, float k, int groups, int[] window"
LIBRARY.define(
    f"lrn_pool(Tensor x, Tensor? bias, {_NORM}, bool ceil_mode, bool pool_first, bool with_place) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"lrn_pool_backward(Tensor grad, Tensor x, Tensor? bias, Tensor place, {_NORM}, bool pool_first, bool with_bias_grad)"
    " -> (Tensor, Tensor)"
)
LIBRARY.impl("lrn_pool", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("lrn_pool_backward", _backward, "CompositeExplicitAutograd")
for _key in AUTOCAST_KEYS:
    LIBRARY.impl("lrn_pool", fallthrough_kernel, _key)
    LIBRARY.impl("lrn_pool_backward", fallthrough_kernel, _key)

lrn_pool = torch.ops.alexnet_kernels.lrn_pool.default
lrn_pool_backward = torch.ops.alexnet_kernels.lrn_pool_backward.default


@register_fake("alexnet_kernels::lrn_pool", lib=LIBRARY)
def _fake(x: Tensor, bias: Tensor | None, relu: bool, *args: Any) -> Outputs:
    *_, window, ceil_mode, _, with_place = args
    return pool.empty_outputs(x, window, ceil_mode, with_place)


@register_fake("alexnet_kernels::lrn_pool_backward", lib=LIBRARY)
def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor | None, place: Tensor, *args: Any) -> Outputs:
    return torch.empty_like(x, memory_format=layout_of(x)), x.new_empty(x.shape[1] if args[-1] else 0)


def _keep(ctx: Any, x: Tensor, bias: Tensor | None, relu: bool, arguments: Arguments, place: Tensor) -> None:
    ctx.mark_non_differentiable(place)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bias, place)
    ctx.relu, ctx.arguments = relu, arguments
    ctx.backend = dispatch.requested()  # autograd's threads do not see the caller's context


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, bias, relu, *arguments, _ = inputs
    _keep(ctx, x, bias, relu, Arguments(*arguments), output[1])


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """By ``x`` and ``bias``: what both ways to autograd share."""
    if grad is None:
        return None, None
    x, bias, place = ctx.saved_tensors
    if place.dim() == 1:
        raise RuntimeError(pool.NOTHING_KEPT)
    with_bias_grad = ctx.needs_input_grad[1]
    run: Any = lrn_pool_backward
    if is_direct(grad, x, bias) and not wants_gradient(grad, x, bias):
        run = _backward
    with as_forward(ctx, grad):
        dx, dbias = run(grad, x, bias, place, ctx.relu, *ctx.arguments.of_backward, with_bias_grad)
    return dx, dbias if with_bias_grad else None


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad), *[None] * 10)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.arguments, ctx.backend = inputs[4:], dispatch.requested()


def _second_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference, which is differentiable to any order: double backward is rare and need not be fast."""
    with dispatch.use_backend(ctx.backend):
        dispatch.require_reference("the gradient of lrn_pool_backward", "double backward runs in plain torch")
    grad, x, bias, place = ctx.saved_tensors

    def first(grad: Tensor, x: Tensor, *bias: Tensor) -> Outputs:
        return reference.lrn_pool_backward(grad, x, bias[0] if bias else None, place, *ctx.arguments)

    tensors = (grad, x) if bias is None else (grad, x, bias)
    second = torch.func.vjp(first, *tensors)[1](grads)
    return (*second, *[None] * (13 - len(second)))


register_autograd("alexnet_kernels::lrn_pool", _gradient, setup_context=_save, lib=LIBRARY)
register_autograd("alexnet_kernels::lrn_pool_backward", _second_gradient, setup_context=_save_backward, lib=LIBRARY)


class LRNPool(torch.autograd.Function):
    """The same gradient without the dispatcher: see ``is_direct``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, relu: bool, chosen: dispatch.Implementation, arguments: Arguments
    ) -> Outputs:
        y, place = dispatch.perform(chosen, dense(x), bias, relu, *arguments, True)
        _keep(ctx, x, bias, relu, arguments, place)
        return y, place

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grad), None, None, None)


Norm = tuple[int, float, float, float, int]  # size, scale, beta, k, groups
Pool = tuple[Any, Any, Any, Any, bool]  # kernel_size, stride, padding, dilation, ceil_mode


def apply(
    x: Tensor, norm: Norm, pooling: Pool, pool_first: bool, relu: bool = False, bias: Tensor | None = None
) -> Tensor:
    """LRN and max pooling of any ``x``, in either order: a kernel for both, or the two operations.

    With ``relu`` or ``bias``, ``x`` and ``bias`` are what :func:`convolve` made, and ``x`` may be overwritten.
    """
    y = _on_kernel(x, bias, relu, norm, pooling, pool_first)
    if y is not None:
        return y
    return _by_two(activate(x, bias, relu), norm, pooling, pool_first)


# Where torch adds a convolution's bias in a pass of its own, the operation after it does so for nothing, and its backward has
# the ReLU's mask and the bias gradient for nothing; oneDNN adds a bias for nothing itself.
BIAS_APART = ("cuda",)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor | None]:
    """The convolution, and the bias that is still to be added to it."""
    if bias is None or x.device.type not in BIAS_APART:
        return conv.apply("conv2d", x, weight, bias, False, *args), None
    a = conv.apply("conv2d", x, weight, None, False, *args)
    return a, bias.to(a.dtype)


def activate(a: Tensor, bias: Tensor | None, relu: bool = True) -> Tensor:
    """``max(0, a + bias)``, as far as asked for; in place, for nobody else holds what :func:`convolve` made."""
    a = a if bias is None else a.add_(bias[:, None, None])
    return F.relu(a, inplace=True) if relu else a


def _by_two(x: Tensor, norm: Norm, pooling: Pool, pool_first: bool) -> Tensor:
    if pool_first:
        return lrn.apply(pool.apply(x, *pooling), *norm)
    return pool.apply(lrn.apply(x, *norm), *pooling)


def _on_kernel(
    x: Tensor, bias: Tensor | None, relu: bool, norm: Norm, pooling: Pool, pool_first: bool
) -> Tensor | None:
    """The result, or None where no kernel can run; an error where one was asked for by name."""
    window = pool.window_of(*pooling[:4])
    if window is None or pool.why_plain(x, window, pooling[4]) is not None:
        return None
    with_place = wants_gradient(x, bias)
    arguments = Arguments(*norm, window, pooling[4], pool_first)
    bias = _together(bias)
    if torch.compiler.is_compiling():
        placeholders = (
            None,
            relu,
            norm[0],
            1.0,
            1.0,
            1.0,
            norm[4],
            *arguments[5:],
            False,
        )  # floats may be symbols here
        if not runs_compiled("lrn_pool", x.device, x.dtype, *placeholders):
            return None
        return lrn_pool(x, bias, relu, *arguments, with_place)[0]
    chosen = dispatch.kernel("lrn_pool", x, bias, relu, *arguments, with_place)
    if chosen is None:
        return None
    if not is_direct(x, bias):
        return lrn_pool(x, bias, relu, *arguments, with_place)[0]
    if with_place:
        return LRNPool.apply(x, bias, relu, chosen, arguments)[0]
    return dispatch.perform(chosen, dense(x), bias, relu, *arguments, False)[0]


def explain(
    op: str, x: Tensor, norm: Norm, pooling: Pool, pool_first: bool, relu: bool = False
) -> dispatch.Explanation:
    """What :func:`apply` would run for ``op``; a reference without parts means the operations one by one."""
    window = pool.window_of(*pooling[:4])
    why = pool.why_plain(x, window, pooling[4])
    if why is not None or window is None:
        return dispatch.Explanation.of_one(op, "reference", str(why))
    said = dispatch.explain_call("lrn_pool", x, None, relu, *norm, window, pooling[4], pool_first, False)
    return replace(said, op=op)


def _triton_why_not(x: Tensor, *args: Any) -> str | None:
    return pool.why_large(args[7]) or triton_why_not(x)


def _triton_backward_why_not(grad: Tensor, *_: Any) -> str | None:
    return triton_why_not(grad)


def _triton_forward(*args: Any) -> Outputs:
    from ..kernels import fused as kernel

    return kernel.forward(*args)


def _triton_backward(*args: Any) -> Outputs:
    from ..kernels import fused as kernel

    return kernel.backward(*args)


def _cpu_why_not(x: Tensor, *args: Any) -> str | None:
    return pool.why_large(args[7]) or compiled_why_not("cpu", x)


def _cpu_backward_why_not(grad: Tensor, *_: Any) -> str | None:
    return compiled_why_not("cpu", grad)


def _cpu_forward(*args: Any) -> Outputs:
    return torch.ops.alexnet_kernels_cpu.lrn_pool.default(*args)


def _cpu_backward(*args: Any) -> Outputs:
    return torch.ops.alexnet_kernels_cpu.lrn_pool_backward.default(*args)


def _cuda_backward_why_not(grad: Tensor, x: Tensor, *args: Any) -> str | None:
    _, place, _, size, _, _, _, groups, window, pool_first, _ = args
    if layout_of(x) is not torch.channels_last:
        return "written for channels_last only"
    if pool_first or size != 5 or x.shape[1] % (8 * groups):
        return "written for LRN over 5 channels, then pooling, with a multiple of 8 channels a group"
    padding = tuple(window[4:6])
    if tuple(window) != (3, 3, 2, 2, *padding, 1, 1) or not set(padding) <= {0, 1}:
        return "written for 3x3 windows with stride 2, padded by at most 1"
    if any(t.data_ptr() % 16 for t in (grad, x, place)):
        return "reads 16 bytes at once, and a tensor begins between two of those"
    return compiled_why_not("cuda", x)


def _cuda_backward(*args: Any) -> Outputs:
    return torch.ops.alexnet_kernels_cuda.lrn_pool_backward.default(*args)


def _reference_forward(x: Tensor, *args: Any) -> Outputs:
    return pool.in_layout(reference.lrn_pool(x, *args), layout_of(x))


def _reference_backward(grad: Tensor, x: Tensor, *args: Any) -> Outputs:
    dx, dbias = reference.lrn_pool_backward(grad, x, *args)
    return dense(dx, layout_of(x)), dbias


dispatch.register("lrn_pool", "triton", _triton_forward, _triton_why_not)
dispatch.register("lrn_pool", "cpu", _cpu_forward, _cpu_why_not)
dispatch.register("lrn_pool", "reference", _reference_forward, dispatch.never)
# CUDA first: 35 instructions an element in the machine code, where Triton needs 50 and memory leaves time for 32.
# Counted, not timed: bench/results/PENDING.md.
dispatch.register("lrn_pool_backward", "cuda", _cuda_backward, _cuda_backward_why_not)
dispatch.register("lrn_pool_backward", "triton", _triton_backward, _triton_backward_why_not)
dispatch.register("lrn_pool_backward", "cpu", _cpu_backward, _cpu_backward_why_not)
dispatch.register("lrn_pool_backward", "reference", _reference_backward, dispatch.never)
