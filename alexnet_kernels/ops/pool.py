"""``alexnet_kernels::max_pool2d`` and its gradient ``alexnet_kernels::max_pool2d_backward``, [N, C, H, W] -> [N, C, OH, OW].

Beside the maxima stands their ``place``, one byte each: the tap ``row · KW + column`` of the window that holds the maximum,
the first of equal ones; NaN wins. It is all that backward needs: there each input element collects from the windows that
hold it, in a fixed order. Results keep the input's dtype and layout; a layout that is neither contiguous nor channels_last
is copied once.

``window`` is ``kernel, stride, padding, dilation``, rows before columns: eight integers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, memory_format
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
    runs_compiled,
    triton_why_not,
    wants_gradient,
    why_transformed,
)
from .composite import plain

Window = Sequence[int]
Outputs = tuple[Tensor, Tensor]
Size = int | Sequence[int]

NOTHING_KEPT = "with_place=False keeps nothing for backward; call the operation with with_place=True"
_WHY_NO_KERNEL = "no kernel can run it"
_WHY_TORCHS_IS_QUICKER = (
    "torch's own pooling is quicker on a CPU for channels_last and for few elements; this runs when asked for by name"
)
_CPU_PAYS = {False: 1 << 14, True: 1 << 16}  # elements, by whether a gradient is wanted; measured on 2 cores, AVX2
_LARGEST_AREA = 256  # taps that one byte tells apart


def out_size(size: int, ceil_mode: bool, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Windows along one axis: torch's rule. With ``ceil_mode`` the last may hang over the edge, but not begin behind it."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    count = (room + stride - 1) // stride + 1
    return count - 1 if (count - 1) * stride >= size + padding else count


def out_shape(x: Tensor, window: Window, ceil_mode: bool) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, c, out_size(h, ceil_mode, *window[0::2]), out_size(w, ceil_mode, *window[1::2])


def empty_outputs(x: Tensor, window: Window, ceil_mode: bool, with_place: bool) -> Outputs:
    """``y`` and ``place`` of a pooling of ``x``, not written yet."""
    shape, layout = out_shape(x, window, ceil_mode), layout_of(x)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    if not with_place:
        return y, x.new_empty(0, dtype=torch.uint8)
    return y, torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=layout)


def _forward(x: Tensor, window: Window, ceil_mode: bool, with_place: bool) -> Outputs:
    if x.numel() == 0:
        return empty_outputs(x, window, ceil_mode, with_place)
    return dispatch.run("max_pool2d", dense(x), window, ceil_mode, with_place)


def _backward(grad: Tensor, place: Tensor, height: int, width: int, window: Window) -> Tensor:
    place = dense(place)
    if grad.numel() == 0:
        return grad.new_zeros(*grad.shape[:2], height, width)
    return dispatch.run("max_pool2d_backward", dense(grad, layout_of(place)), place, height, width, window)


LIBRARY.define("max_pool2d(Tensor x, int[] window, bool ceil_mode, bool with_place) -> (Tensor, Tensor)")
LIBRARY.define(
    "max_pool2d_backward(Tensor grad, Tensor place, SymInt height, SymInt width, int[] window) -> Tensor",
)
LIBRARY.impl("max_pool2d", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("max_pool2d_backward", _backward, "CompositeExplicitAutograd")
for _key in AUTOCAST_KEYS:
    LIBRARY.impl("max_pool2d", fallthrough_kernel, _key)
    LIBRARY.impl("max_pool2d_backward", fallthrough_kernel, _key)

max_pool2d = torch.ops.alexnet_kernels.max_pool2d.default
max_pool2d_backward = torch.ops.alexnet_kernels.max_pool2d_backward.default

register_fake("alexnet_kernels::max_pool2d", empty_outputs, lib=LIBRARY)


@register_fake("alexnet_kernels::max_pool2d_backward", lib=LIBRARY)
def _fake_backward(grad: Tensor, place: Tensor, height: int, width: int, window: Window) -> Tensor:
    shape = (*place.shape[:2], height, width)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout_of(place))


def _keep(ctx: Any, x: Tensor, window: Window, place: Tensor) -> None:
    ctx.mark_non_differentiable(place)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(place)
    ctx.height, ctx.width, ctx.window = *x.shape[2:], window
    ctx.backend = dispatch.requested()  # autograd's threads do not see the caller's context


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, window, _, _ = inputs
    _keep(ctx, x, window, output[1])


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    (place,) = ctx.saved_tensors
    if place.dim() == 1:
        raise RuntimeError(NOTHING_KEPT)
    run: Any = _backward if is_direct(grad) and not wants_gradient(grad) else max_pool2d_backward
    with as_forward(ctx, grad):
        return run(grad, place, ctx.height, ctx.width, ctx.window), None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, place, _, width, ctx.window = inputs
    ctx.save_for_backward(place)
    ctx.width, ctx.backend = width, dispatch.requested()


def _second_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of a sum that collects is a gather: torch's, differentiable to any order."""
    (place,) = ctx.saved_tensors
    with dispatch.use_backend(ctx.backend):
        dispatch.require_reference("the gradient of max_pool2d_backward", "double backward runs in plain torch")
    return reference.pick(grad, reference.indices(place, ctx.window, ctx.width)), None, None, None, None


register_autograd("alexnet_kernels::max_pool2d", _gradient, setup_context=_save, lib=LIBRARY)
register_autograd("alexnet_kernels::max_pool2d_backward", _second_gradient, setup_context=_save_backward, lib=LIBRARY)


class MaxPool2d(torch.autograd.Function):
    """The same gradient without the dispatcher: see :func:`is_direct`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: dispatch.Implementation, window: Window, ceil_mode: bool) -> Outputs:
        y, place = dispatch.perform(chosen, dense(x), window, ceil_mode, True)
        _keep(ctx, x, window, place)
        return y, place

    backward = staticmethod(_gradient)


def window_of(kernel_size: Size, stride: Size | None, padding: Size, dilation: Size) -> tuple[int, ...] | None:
    """The eight integers; None where a kernel would not be given what it needs, and torch says what is wrong."""
    window: tuple[int, ...] = ()
    for value in (kernel_size, kernel_size if stride is None or stride == () else stride, padding, dilation):
        if type(value) is int:
            window += (value, value)
        elif isinstance(value, (tuple, list)) and 1 <= len(value) <= 2 and all(type(v) is int for v in value):
            window += (value[0], value[-1])
        else:
            return None
    return window


def why_plain(x: Tensor, window: tuple[int, ...] | None, ceil_mode: bool) -> str | None:
    """What a window kernel is never asked: torch answers that, or says what is wrong with it."""
    if not x.is_floating_point():
        return f"torch's own pooling runs for {x.dtype}"
    if x.layout is not torch.strided:
        return f"torch's own pooling runs for {x.layout}"
    if x.dim() != 4 or x.numel() == 0:
        return f"torch's own pooling runs for the shape {tuple(x.shape)}"
    if (
        torch._C._get_tracing_state() is not None
    ):  # whose check traces again without gradients, which would need no places
        return "torch.jit.trace records torch's own pooling"
    _, _, height, width = x.shape
    usual = _is_usual if torch.compiler.is_compiling() or type(height) is not int else _is_usual_cached
    if window is None or not usual(height, width, window, ceil_mode):
        return f"torch's own pooling runs for, or refuses, a window {window} over {tuple(x.shape)}"
    return why_transformed()


def _is_usual(height: int, width: int, window: tuple[int, ...], ceil_mode: bool) -> bool:
    """Whether torch would not refuse the window, and none can lie in the padding alone."""
    for size, (kernel, stride, padding, dilation) in ((height, window[0::2]), (width, window[1::2])):
        if kernel < 1 or stride < 1 or dilation < 1 or not 0 <= padding <= kernel // 2:
            return False
        if (padding > 0 and dilation > size) or out_size(size, ceil_mode, kernel, stride, padding, dilation) < 1:
            return False
    return True


_is_usual_cached = functools.lru_cache(1024)(_is_usual)  # a call on a small tensor takes microseconds, this 3 of them


def apply(x: Tensor, kernel_size: Size, stride: Size | None, padding: Size, dilation: Size, ceil_mode: bool) -> Tensor:
    """Max pooling of any ``x``: a kernel where one can run, torch's own operation everywhere else."""
    if (  # here and not only where implementations are chosen: a call on a small tensor takes microseconds
        x.is_cpu
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and dispatch.requested() == "auto"
        and _torchs_is_quicker(x, wants_gradient(x))
    ):
        return _plain(_WHY_TORCHS_IS_QUICKER, x, kernel_size, stride, padding, dilation, ceil_mode)
    window = window_of(kernel_size, stride, padding, dilation)
    why, batch = _why(x, window, ceil_mode)
    if why is None and window is not None:
        y = _on_kernel(batch, window, ceil_mode)
        if y is not None:
            return y if batch is x else y[0]
    return _plain(why or _WHY_NO_KERNEL, x, kernel_size, stride, padding, dilation, ceil_mode)


def _plain(why: str, *args: Any) -> Tensor:
    return plain("max_pool2d", why, reference.max_pool2d, *args)


def _why(x: Tensor, window: tuple[int, ...] | None, ceil_mode: bool) -> tuple[str | None, Tensor]:
    batch = x[None] if x.dim() == 3 else x
    return why_plain(batch, window, ceil_mode), batch


def _on_kernel(x: Tensor, window: tuple[int, ...], ceil_mode: bool) -> Tensor | None:
    with_place = wants_gradient(x)
    if torch.compiler.is_compiling():
        if not runs_compiled("max_pool2d", x.device, x.dtype, window, False, with_place):
            return None
        return max_pool2d(x, window, ceil_mode, with_place)[0]
    chosen = dispatch.kernel("max_pool2d", x, window, ceil_mode, with_place)
    if chosen is None:
        return None
    if not is_direct(x):
        return max_pool2d(x, window, ceil_mode, with_place)[0]
    if with_place:
        return MaxPool2d.apply(x, chosen, window, ceil_mode)[0]
    return dispatch.perform(chosen, dense(x), window, ceil_mode, False)[0]


def explain(
    x: Tensor, kernel_size: Size, stride: Size | None, padding: Size, dilation: Size, ceil_mode: bool
) -> dispatch.Explanation:
    """What :func:`apply` would run."""
    window = window_of(kernel_size, stride, padding, dilation)
    why, batch = _why(x, window, ceil_mode)
    if why is not None:
        return dispatch.explain_reference("max_pool2d", why)
    return dispatch.explain_call("max_pool2d", batch, window, ceil_mode, wants_gradient(batch))


def why_large(window: Window) -> str | None:
    """Why no kernel can tell where in ``window`` a maximum is."""
    area = window[0] * window[1]
    return f"place is one byte: kernel area {area} > {_LARGEST_AREA}" if area > _LARGEST_AREA else None


def _triton_why_not(x: Tensor, window: Window, *_: Any) -> str | None:
    return why_large(window) or triton_why_not(x)


def _triton_backward_why_not(grad: Tensor, *_: Any) -> str | None:
    return triton_why_not(grad)


def _triton_forward(*args: Any) -> Outputs:
    from ..kernels import pool as kernel

    return kernel.forward(*args)


def _triton_backward(*args: Any) -> Tensor:
    from ..kernels import pool as kernel

    return kernel.backward(*args)


def _torchs_is_quicker(x: Tensor, with_place: bool) -> bool:
    return x.numel() < _CPU_PAYS[with_place] or layout_of(x) is torch.channels_last


def _cpu_why_not(x: Tensor, window: Window, ceil_mode: bool, with_place: bool) -> str | None:
    if x.is_cpu and dispatch.requested() != "cpu" and _torchs_is_quicker(x, with_place):
        return _WHY_TORCHS_IS_QUICKER
    return why_large(window) or compiled_why_not("cpu", x)


def _cpu_backward_why_not(grad: Tensor, *_: Any) -> str | None:
    return compiled_why_not("cpu", grad)


def _cpu_forward(*args: Any) -> Outputs:
    return torch.ops.alexnet_kernels_cpu.max_pool2d.default(*args)


def _cpu_backward(*args: Any) -> Tensor:
    return torch.ops.alexnet_kernels_cpu.max_pool2d_backward.default(*args)


def in_layout(outputs: Outputs, layout: memory_format) -> Outputs:
    y, place = outputs
    return dense(y, layout), dense(place, layout) if place.dim() == 4 else place


def _reference_forward(x: Tensor, *args: Any) -> Outputs:
    return in_layout(reference.max_pool2d_with_place(x, *args), layout_of(x))


def _reference_backward(grad: Tensor, place: Tensor, *args: Any) -> Tensor:
    return dense(reference.max_pool2d_backward(grad, place, *args), layout_of(place))


dispatch.register("max_pool2d", "triton", _triton_forward, _triton_why_not)
dispatch.register("max_pool2d", "cpu", _cpu_forward, _cpu_why_not)
dispatch.register("max_pool2d", "reference", _reference_forward, dispatch.never)
dispatch.register("max_pool2d_backward", "triton", _triton_backward, _triton_backward_why_not)
dispatch.register("max_pool2d_backward", "cpu", _cpu_backward, _cpu_backward_why_not)
dispatch.register("max_pool2d_backward", "reference", _reference_backward, dispatch.never)
