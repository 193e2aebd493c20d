"""The ways to run the passes of a convolution, and their rows in the dispatch table: Triton, cuDNN, plain torch.

``conv2d`` is the forward, ``conv2d_dgrad`` and ``conv2d_wgrad`` the gradients by input and weight. All take dense tensors,
and geometry as ``stride, padding, dilation`` (pairs) and ``groups``. Around cuDNN stand this package's own passes: one for
bias and ReLU, one for the ReLU's mask and the bias gradient, which dgrad and wgrad share.

``precision`` matters for fp32 on a GPU alone. It says what accuracy is asked for: ``"tf32"`` one product of rounded factors,
``"tf32x3"`` nearly fp32's by three of them, ``"ieee"`` fp32's; None: what torch's flags say when it runs. cuDNN has no
``"tf32x3"`` and runs it as ``"ieee"``, which is more than was asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from .. import dispatch, reference
from . import _choice
from ._choice import Choice, Facts, Pass
from ._library import dense, layout_of, triton_why_not

Precision = Literal["ieee", "tf32", "tf32x3"]
Pair = tuple[int, int]
Arguments = tuple[Pair, Pair, Pair, int, "Precision | None"]  # stride, padding, dilation, groups, precision


def layout_for(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Of a convolution's result, by torch's rule: channels_last where either is."""
    last = torch.channels_last in (layout_of(x), layout_of(weight))
    return torch.channels_last if last else torch.contiguous_format


def torchs_precision() -> Precision:
    """What torch's flags ask of fp32 convolutions on a GPU, by their old names or their new ones."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is None:  # before torch 2.9; since then the old flag raises where somebody has set the new ones
        return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"


@contextlib.contextmanager
def _flags_for(x: Tensor, precision: Precision | None) -> Iterator[None]:
    """Torch's flags such that cuDNN runs ``precision``; they are the process's, as torch's own contexts set them."""
    wanted = None if x.dtype != torch.float32 or precision is None else "tf32" if precision == "tf32" else "ieee"
    if wanted is None or wanted == torchs_precision():
        yield
        return
    conv: Any = getattr(torch.backends.cudnn, "conv")  # noqa: B009  # unknown to torch's annotations
    before = conv.fp32_precision
    conv.fp32_precision = wanted
    try:
        yield
    finally:
        conv.fp32_precision = "none"  # follows the flags above it; what was set here before is set again
        if conv.fp32_precision != before:
            conv.fp32_precision = before


# -------------------------------------------------------------------------------------------------------------- choosing


def _choice_for(run: Pass, x: Tensor, weight: Tensor, args: Arguments, epilogue: bool = False) -> Choice:
    dtype = str(x.dtype)[6:] if x.dtype != torch.float32 else args[4] or torchs_precision()
    # One that begins between two multiples of 16 bytes no descriptor reads; how far in it begins, a fake tensor says too.
    last = layout_for(x, weight) is torch.channels_last and x.storage_offset() * x.element_size() % 16 == 0
    return _choice.choose(Facts(run, dtype, last, x.shape, weight.shape, *args[:4], epilogue), x.device)


def _slower(run: Pass, own: bool, x: Tensor, weight: Tensor, args: Arguments, epilogue: bool = False) -> str | None:
    """Why Triton (``own``) or cuDNN leaves a call to the other under "auto", though it could run it."""
    if dispatch.requested() != "auto" or _triton_cannot(x) is not None:
        return None
    choice = _choice_for(run, x, weight, args, epilogue)
    return None if own == (choice.way == "triton") else choice.why


def _triton_cannot(x: Tensor) -> str | None:
    if x.numel() >= 2**31 * max(1, x.shape[0]):
        return f"an image has {x.numel() // x.shape[0]} elements: kernels count them by 31 bits"
    return triton_why_not(x)


def _cudnn_cannot(x: Tensor) -> str | None:
    if not x.is_cuda or torch.version.hip:
        return "no kernel for ROCm" if x.is_cuda else f"no kernel for device {x.device.type!r}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {x.dtype}"
    return None if torch.backends.cudnn.enabled else "torch.backends.cudnn.enabled is False"


def _triton_why_not(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *args: Any) -> str | None:
    return _triton_cannot(x) or _slower("forward", True, x, weight, args, relu or bias is not None)


def _cudnn_why_not(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *args: Any) -> str | None:
    return _cudnn_cannot(x) or _slower("forward", False, x, weight, args, relu or bias is not None)


def _dgrad_triton_why_not(dz: Tensor, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return _triton_cannot(x) or _slower("dgrad", True, x, weight, args)


def _dgrad_cudnn_why_not(dz: Tensor, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return _cudnn_cannot(x) or _slower("dgrad", False, x, weight, args)


def _wgrad_triton_why_not(dz: Tensor, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return _triton_cannot(x) or _slower("wgrad", True, x, weight, args)


def _wgrad_cudnn_why_not(dz: Tensor, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return _cudnn_cannot(x) or _slower("wgrad", False, x, weight, args)


# ---------------------------------------------------------------------------------------------------------------- Triton


def _settled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A kernel's last arguments: the geometry, and a precision in any case."""
    return *args[:4], args[4] or torchs_precision()


def triton_forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *args: Any) -> Tensor:
    from ..kernels import conv as kernel

    return kernel.forward(x, weight, bias, relu, *_settled(args))


def triton_dgrad(dz: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    from ..kernels import conv_backward as kernel

    return kernel.input_gradient(dz, weight, tuple(x.shape), *_settled(args))[0]


def triton_wgrad(dz: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    from ..kernels import conv_backward as kernel

    return kernel.weight_gradient(dz, x, tuple(weight.shape), *_settled(args))


# ------------------------------------------------------------------------------------------------------ torch's, by cuDNN


def convolution(x: Tensor, weight: Tensor, args: Arguments, split: bool = False) -> Tensor:
    """Torch's convolution without bias; ``split``, each group by itself."""
    stride, padding, dilation, groups, precision = args
    with _flags_for(x, precision):
        if not split:
            return torch.convolution(x, weight, None, stride, padding, dilation, False, (0, 0), groups)
        towers = zip(x.chunk(groups, 1), weight.chunk(groups), strict=True)
        parts = [torch.convolution(*t, None, stride, padding, dilation, False, (0, 0), 1) for t in towers]
    return torch.cat(parts, 1)


def gradients(
    dz: Tensor, x: Tensor, weight: Tensor, args: Arguments, mask: tuple[bool, bool], split: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Torch's gradients of :func:`convolution` by input and weight, those that ``mask`` names."""
    stride, padding, dilation, groups, precision = args
    towers = groups if split else 1
    parts = zip(dz.chunk(towers, 1), x.chunk(towers, 1), weight.chunk(towers), strict=True)
    with _flags_for(x, precision):
        found = [
            torch.ops.aten.convolution_backward(
                *part, None, stride, padding, dilation, False, (0, 0), groups // towers, (*mask, False)
            )
            for part in parts
        ]
    if not split:
        return found[0][:2]
    dx, dw, _ = zip(*found, strict=True)
    return torch.cat(dx, 1) if mask[0] else None, torch.cat(dw) if mask[1] else None


def cudnn_forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *args: Any) -> Tensor:
    split = is_split("forward", x, weight, args, relu or bias is not None)
    y = dense(convolution(x, weight, args, split), layout_of(x))
    return epilogue(y, bias, relu)


def cudnn_dgrad(dz: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Tensor | None:
    return gradients(dz, x, weight, args, (True, False), is_split("dgrad", x, weight, args))[0]


def cudnn_wgrad(dz: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Tensor | None:
    return gradients(dz, x, weight, args, (False, True), is_split("wgrad", x, weight, args))[1]


def is_split(run: Pass, x: Tensor, weight: Tensor, args: Arguments, epilogue: bool = False) -> bool:
    """Whether cuDNN runs a pass group by group, by the table; that is read with Triton's modules, and only where they are."""
    if args[3] == 1 or _triton_cannot(x) is not None:
        return False
    return _choice_for(run, x, weight, args, epilogue).torchs == "cudnn split"


# ------------------------------------------------------------------------------------- around a convolution: bias and ReLU


def epilogue(y: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``y + bias``, then ``max(0, .)`` where ``relu``; in place, for nobody else holds what a convolution made."""
    if bias is None and not relu:
        return y
    if runs_ours(y):
        from ..kernels import activation

        dispatch.note("triton")
        return activation.bias_relu(y, bias, relu, inplace=True)
    if bias is not None:
        y.add_(bias[:, None, None])
    return y.relu_() if relu else y


def epilogue_backward(grad: Tensor, y: Tensor | None, with_bias_grad: bool) -> tuple[Tensor, Tensor | None]:
    """``dz``, the gradient before the ReLU that made ``y`` (None: none did), and the bias gradient ``Σ dz``; NaN passes."""
    if y is not None and runs_ours(y):
        from ..kernels import activation

        dispatch.note("triton")
        return activation.backward(grad, y, with_bias_grad)
    dz = grad if y is None else grad.masked_fill(y <= 0, 0)
    return dz, dz.sum((0, 2, 3)) if with_bias_grad else None


def dgrad_through_relu(
    dz: Tensor, x: Tensor, weight: Tensor, args: Arguments, with_bias_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """dgrad and :func:`epilogue_backward` after it, where a ReLU made ``x``: one kernel where dgrad is Triton's."""
    chosen = dispatch.choose("conv2d_dgrad", dz, x, weight, *args)
    if chosen.backend != "triton":
        return epilogue_backward(dispatch.perform(chosen, dz, x, weight, *args), x, with_bias_grad)
    from ..kernels import conv_backward as kernel

    dispatch.note("triton")
    precision = args[4] or torchs_precision()
    return kernel.input_gradient(dz, weight, x.shape, *args[:4], precision, x, with_bias_grad)


def runs_ours(y: Tensor) -> bool:
    """Whether this package's kernels run around a convolution: where they can, for cuDNN's convolution as for Triton's."""
    return dispatch.requested() != "reference" and triton_why_not(y) is None


# ------------------------------------------------------------------------------------------------------------- reference


def _reference_forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *args: Any) -> Tensor:
    y = reference.conv2d(x, weight, bias, relu, *args[:-1])
    return dense(y, layout_of(x))


def _reference_dgrad(dz: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Tensor | None:
    return gradients(dz, x, weight, args, (True, False))[0]


def _reference_wgrad(dz: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Tensor | None:
    return gradients(dz, x, weight, args, (False, True))[1]


# Triton first, where the table that was measured on the GPU, or the model in its place, says that it is quicker than cuDNN.
dispatch.register("conv2d", "triton", triton_forward, _triton_why_not)
dispatch.register("conv2d", "cudnn", cudnn_forward, _cudnn_why_not)
dispatch.register("conv2d", "reference", _reference_forward, dispatch.never)
dispatch.register("conv2d_dgrad", "triton", triton_dgrad, _dgrad_triton_why_not)
dispatch.register("conv2d_dgrad", "cudnn", cudnn_dgrad, _dgrad_cudnn_why_not)
dispatch.register("conv2d_dgrad", "reference", _reference_dgrad, dispatch.never)
dispatch.register("conv2d_wgrad", "triton", triton_wgrad, _wgrad_triton_why_not)
dispatch.register("conv2d_wgrad", "cudnn", cudnn_wgrad, _wgrad_cudnn_why_not)
dispatch.register("conv2d_wgrad", "reference", _reference_wgrad, dispatch.never)
