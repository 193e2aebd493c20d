"""``alexnet_kernels::lrn`` and its gradient ``alexnet_kernels::lrn_backward``, [N, C, ...] -> [N, C, ...].

``y = x · s^-beta``, ``s = k + scale · Σ x²`` over a window of channels (see ``reference.lrn``). Nothing but the input is
saved for backward: ``s`` is recomputed there, which costs less than reading it back. The results keep the input's dtype
and its layout; a layout that is neither contiguous nor channels_last is copied once and comes back contiguous.
Under autocast both keep the input's dtype, with fp32 arithmetic inside (torch's own promotes to fp32 instead).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import fallthrough_kernel, register_autograd, register_fake

from .. import dispatch, reference
from ._library import (
    AUTOCAST_KEYS,
    LIBRARY,
    as_forward,
    compiled_why_not,
    dense,
    is_direct,
    layout_of,
    triton_why_not,
    wants_gradient,
    why_transformed,
)
from .composite import plain


def _forward(x: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Tensor:
    return dispatch.run("lrn", dense(x), size, scale, beta, k, groups)


def _backward(grad: Tensor, x: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Tensor:
    x = dense(x)
    return dispatch.run("lrn_backward", dense(grad, layout_of(x)), x, size, scale, beta, k, groups)


LIBRARY.define("lrn(Tensor x, int size, float scale, float beta, float k, int groups) -> Tensor")
LIBRARY.define("lrn_backward(Tensor grad, Tensor x, int size, float scale, float beta, float k, int groups) -> Tensor")
LIBRARY.impl("lrn", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("lrn_backward", _backward, "CompositeExplicitAutograd")
for _key in AUTOCAST_KEYS:
    LIBRARY.impl("lrn", fallthrough_kernel, _key)
    LIBRARY.impl("lrn_backward", fallthrough_kernel, _key)

lrn = torch.ops.alexnet_kernels.lrn.default
lrn_backward = torch.ops.alexnet_kernels.lrn_backward.default


@register_fake("alexnet_kernels::lrn", lib=LIBRARY)
def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=layout_of(x))


@register_fake("alexnet_kernels::lrn_backward", lib=LIBRARY)
def _fake_backward(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=layout_of(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.size, ctx.scale, ctx.beta, ctx.k, ctx.groups = inputs
    ctx.save_for_backward(*tensors)
    ctx.backend = dispatch.requested()  # autograd's threads do not see the caller's context


def _arguments(ctx: Any) -> tuple[int, float, float, float, int]:
    return ctx.size, ctx.scale, ctx.beta, ctx.k, ctx.groups


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    run = _backward if is_direct(grad, x) and not wants_gradient(grad, x) else lrn_backward
    with as_forward(ctx, grad):
        return run(grad, x, *_arguments(ctx)), None, None, None, None, None


def _second_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference, which is differentiable to any order: double backward is rare and need not be fast."""
    with dispatch.use_backend(ctx.backend):
        dispatch.require_reference("the gradient of lrn_backward", "double backward runs in plain torch")
    arguments = _arguments(ctx)
    grads = torch.func.vjp(lambda g, x: reference.lrn_backward(g, x, *arguments), *ctx.saved_tensors)[1](grad)
    return (*grads, None, None, None, None, None)


register_autograd("alexnet_kernels::lrn", _gradient, setup_context=_save, lib=LIBRARY)
register_autograd("alexnet_kernels::lrn_backward", _second_gradient, setup_context=_save, lib=LIBRARY)


class LRN(torch.autograd.Function):
    """The same gradient without the dispatcher: see ``is_direct``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, inputs[0])
        return _forward(*inputs)

    backward = staticmethod(_gradient)


def apply(x: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Tensor:
    """LRN of any real ``x``: the operation, or plain torch for what it does not cover."""
    why = _why_plain(x)
    if why is not None:
        return plain("lrn", why, reference.lrn, x, size, scale, beta, k, groups)
    if not is_direct(x):
        return lrn(x, size, scale, beta, k, groups)
    return (LRN.apply if wants_gradient(x) else _forward)(x, size, scale, beta, k, groups)


def explain(x: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> dispatch.Explanation:
    """What :func:`apply` would run."""
    why = _why_plain(x)
    if why is not None:
        return dispatch.explain_reference("lrn", why)
    return dispatch.explain_call("lrn", x, size, scale, beta, k, groups)


def _why_plain(x: Tensor) -> str | None:
    if not x.is_floating_point():
        return f"torch's own LRN runs for {x.dtype}"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's own operations, so that what it saves needs torch alone"
    return why_transformed()


def _triton_why_not(*args: Any) -> str | None:
    return triton_why_not(args[-6])


def _triton_forward(*args: Any) -> Tensor:
    from ..kernels import lrn as kernel

    return kernel.forward(*args)


def _triton_backward(*args: Any) -> Tensor:
    from ..kernels import lrn as kernel

    return kernel.backward(*args)


def _reference_forward(x: Tensor, *args: Any) -> Tensor:
    return dense(reference.by_blocks(reference.lrn, (x,), *args), layout_of(x))


def _reference_backward(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    return dense(reference.by_blocks(reference.lrn_backward, (grad, x), *args), layout_of(x))


def _cpu_why_not(*args: Any) -> str | None:
    return compiled_why_not("cpu", args[-6])


def _cpu_forward(*args: Any) -> Tensor:
    return torch.ops.alexnet_kernels_cpu.lrn.default(*args)


def _cpu_backward(*args: Any) -> Tensor:
    return torch.ops.alexnet_kernels_cpu.lrn_backward.default(*args)


# "cpu" before "reference": 3.1 to 4.7 times as fast at [16, 96, 55, 55] and [16, 256, 27, 27], forward and backward, fp32,
# both layouts (AMD EPYC Milan, 2 cores, AVX2, torch 2.11, 2026-11-24; bench/test_cpu.py).
dispatch.register("lrn", "triton", _triton_forward, _triton_why_not)
dispatch.register("lrn", "cpu", _cpu_forward, _cpu_why_not)
dispatch.register("lrn", "reference", _reference_forward, dispatch.never)
dispatch.register("lrn_backward", "triton", _triton_backward, _triton_why_not)
dispatch.register("lrn_backward", "cpu", _cpu_backward, _cpu_why_not)
dispatch.register("lrn_backward", "reference", _reference_backward, dispatch.never)
