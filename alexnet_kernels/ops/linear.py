"""``alexnet_kernels::linear_relu`` and its gradient ``alexnet_kernels::linear_relu_backward``, [..., K] -> [..., O].

``y = max(0, x weightᵀ + bias)``, then dropout where there is a ``seed``: 0 for a share ``p`` of the elements, ``y / (1 - p)`` for
the others. Which ones, the seed alone decides (``reference.random_words``), so that the operation is a function of its arguments
and a compiled or captured graph draws anew each time it runs. Kept for backward are ``x``, the weight and the result, in which
whatever ReLU or dropout put to 0 is 0: there is no mask. Mask and bias gradient are one pass, the two products are cuBLAS's.
Under autocast the tensors are cast as torch casts those of ``linear``. Results are contiguous.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import fallthrough_kernel, register_autograd, register_fake

from .. import dispatch, reference
from ._library import (
    AUTOCAST_KEYS,
    LIBRARY,
    as_forward,
    is_direct,
    runs_compiled,
    triton_why_not,
    wants_gradient,
    why_transformed,
)
from .composite import plain

Gradients = tuple[Tensor, Tensor, Tensor]


def _forward(x: Tensor, weight: Tensor, bias: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return dispatch.run("linear_relu", x, weight, bias, p, seed)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, mask: list[bool]) -> Gradients:
    return dispatch.run("linear_relu_backward", grad, x, weight, y, p, mask)


LIBRARY.define("linear_relu(Tensor x, Tensor weight, Tensor bias, float p, Tensor? seed) -> Tensor")
LIBRARY.define(
    "linear_relu_backward(Tensor grad, Tensor x, Tensor weight, Tensor y, float p, bool[] mask) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("linear_relu", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_relu_backward", _backward, "CompositeExplicitAutograd")
for _key in AUTOCAST_KEYS:  # `apply` has cast the tensors
    LIBRARY.impl("linear_relu", fallthrough_kernel, _key)
    LIBRARY.impl("linear_relu_backward", fallthrough_kernel, _key)

linear_relu = torch.ops.alexnet_kernels.linear_relu.default
linear_relu_backward = torch.ops.alexnet_kernels.linear_relu_backward.default


@register_fake("alexnet_kernels::linear_relu", lib=LIBRARY)
def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_fake("alexnet_kernels::linear_relu_backward", lib=LIBRARY)
def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, mask: list[bool]) -> Gradients:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = (grad.new_empty(shape if asked else (0,)) for shape, asked in zip(shapes, mask, strict=True))
    return dx, dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.p, _ = inputs
    ctx.save_for_backward(x, weight, output)
    ctx.backend = dispatch.requested()  # autograd's threads do not see the caller's context


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    run = _backward if is_direct(grad, x, weight) and not wants_gradient(grad, x, weight) else linear_relu_backward
    with as_forward(ctx, grad):
        grads = run(grad, x, weight, y, ctx.p, mask)
    return (*(g if asked else None for g, asked in zip(grads, mask, strict=True)), None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.arguments, ctx.backend = inputs[4:], dispatch.requested()


def _second_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference, which is differentiable to any order: double backward is rare and need not be fast."""
    with dispatch.use_backend(ctx.backend):
        dispatch.require_reference("the gradient of linear_relu_backward", "double backward runs in plain torch")
    *tensors, y = ctx.saved_tensors

    def first(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
        return reference.linear_relu_backward(grad, x, weight, y, *ctx.arguments)

    return (*torch.func.vjp(first, *tensors)[1](grads), None, None, None)


register_autograd("alexnet_kernels::linear_relu", _gradient, setup_context=_save, lib=LIBRARY)
register_autograd("alexnet_kernels::linear_relu_backward", _second_gradient, setup_context=_save_backward, lib=LIBRARY)


class LinearReLU(torch.autograd.Function):
    """The same gradient without the dispatcher: see ``is_direct``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward(*inputs)
        _save(ctx, inputs, y)
        return y

    backward = staticmethod(_gradient)


def apply(x: Tensor, weight: Tensor, bias: Tensor | None, p: float = 0.0) -> Tensor:
    """The layer for whatever ``torch.nn.functional.linear`` takes; where no kernel runs, torch's own three operations.

    Those draw torch's own random numbers, so that on a CPU a seed gives what it gives in torch.
    """
    why = _why_plain(x, weight, bias)
    if why is None and bias is not None and p < 1:
        y = _on_kernel(_as_autocast(x, weight, bias), p)
        if y is not None:
            return y
    y = plain("linear_relu", why or "dropout of everything", reference.linear_relu, x, weight, bias)
    return F.dropout(y, p) if p else y


def _on_kernel(tensors: tuple[Tensor, ...], p: float) -> Tensor | None:
    """The result, or None where no kernel can run; an error where one was asked for by name."""
    x, weight, bias = tensors
    compiling = torch.compiler.is_compiling()
    if compiling and not runs_compiled("linear_relu", x.device, x.dtype):
        return None
    if not compiling and dispatch.kernel("linear_relu", x) is None:
        return None
    # The seed comes from torch's generator of the device: it follows torch.manual_seed, and in a CUDA graph it is drawn anew.
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device) if p else None
    if compiling or not is_direct(x, weight, bias):
        return linear_relu(x, weight, bias, p, seed)
    return (LinearReLU.apply if wants_gradient(x, weight, bias) else _forward)(x, weight, bias, p, seed)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch's autocast makes of the arguments of ``linear``; doubles stay doubles."""
    dtype = _autocast_dtype(tensors[0])
    return tensors if dtype is None else tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _why_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if bias is None:
        return "written for a layer with a bias"
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return "input, weight and bias are not [..., K], [O, K] and [O]"
    if x.numel() == 0 or weight.numel() == 0:
        return "an empty tensor"
    if any(t.layout is not torch.strided or t.device != x.device for t in (x, weight, bias)):
        return "a tensor is sparse, or they are not all on one device"
    if _autocast_dtype(x) is None and not x.dtype == weight.dtype == bias.dtype:
        return "the dtypes differ"
    return why_transformed()


def explain(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, p: float = 0.0) -> dispatch.Explanation:
    """What :func:`apply` would run."""
    why = _why_plain(x, weight, bias) if p < 1 else "dropout of everything"
    if why is not None or bias is None:
        return dispatch.explain_reference(op, str(why))
    return replace(dispatch.explain_call("linear_relu", *_as_autocast(x, weight, bias)), op=op)


def _triton_why_not(x: Tensor, *_: Any) -> str | None:
    return triton_why_not(x)


def _triton_forward(x: Tensor, weight: Tensor, bias: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """One product, with bias and ReLU in its epilogue: cuBLASLt's where torch finds that it applies."""
    from ..kernels import activation

    y = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t())
    if seed is not None:
        activation.dropout(y, seed, p, inplace=True)
    return y.view(*x.shape[:-1], -1)


def _triton_backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, mask: list[bool]) -> Gradients:
    from ..kernels import activation

    wide = weight.shape[0]
    dz, dbias = activation.backward(grad.reshape(-1, wide), y.reshape(-1, wide), mask[2], 1 / (1 - p))
    dx, dweight = reference.linear_gradients(dz, x, weight, mask)
    return dx, dweight, grad.new_empty(0) if dbias is None else dbias


def _reference_forward(x: Tensor, weight: Tensor, bias: Tensor, p: float, seed: Tensor | None) -> Tensor:
    y = reference.linear_relu(x, weight, bias)
    return (y if seed is None else reference.dropout(y, seed, p)).contiguous()


# "triton" is cuBLASLt's product with its epilogue, and one Triton kernel for mask and bias gradient where torch takes a pass for
# each. Counted, not timed: bench/results/PENDING.md.
dispatch.register("linear_relu", "triton", _triton_forward, _triton_why_not)
dispatch.register("linear_relu", "reference", _reference_forward, dispatch.never)
dispatch.register("linear_relu_backward", "triton", _triton_backward, _triton_why_not)
dispatch.register("linear_relu_backward", "reference", reference.linear_relu_backward, dispatch.never)
