"""The ways to run ``conv1``, ``stem`` and their gradient, and their rows in the dispatch table: compiled CUDA, plain torch.

Both take dense tensors, and geometry as ``stem.py`` has it. Whatever can be known of a call without running it, the reasons
here say in one line each; they look at dtypes, devices and channels alone, so that a compiler may ask with placeholders.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, channels_last
from torch.utils._python_dispatch import _disable_current_modes

from .. import _extension, dispatch, reference
from . import pool
from ._conv_ways import torchs_precision
from ._library import dense, layout_of, why_transformed

STRIDE = 4
WINDOW = (3, 11, 11)
_DEVICE = "cuda"
_CHANNELS = (48, 64, 96)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_POOLING = (3, 3, 2, 2, 0, 0, 1, 1)

Padding = Sequence[int]
Map = tuple[Tensor, Tensor, Tensor]


@functools.cache
def _library_why_not(op: str, index: int, dtype: torch.dtype, channels: int) -> str | None:
    """Why the compiled ``op`` cannot run on this device: no library, one without the operation or without code for it, or too
    little shared memory. The last two show at a launch alone: one over the smallest image.
    """
    reason = _extension.why_not("cuda") or dispatch.old_gpu(index)
    if reason is not None:
        return reason
    if not hasattr(torch.ops.alexnet_kernels_cuda, op):
        return f"the compiled library is of another version and has no {op}; {_extension.REBUILD}"
    try:
        with _disable_current_modes():  # an exporter's, whose tensors have no memory to launch over
            _compiled(op)(*_smallest(op, torch.device(_DEVICE, index), dtype, channels))
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        message = message[max(message.find(f"{op}: "), 0) :]  # before that, the check's place in the source
        if "holds no code for" in message:
            major, minor = torch.cuda.get_device_capability(index)
            arch = f"sm_{major}{minor} (cuda:{index})"
            return f"the compiled library was built for another arch than {arch}; {_extension.REBUILD}"
        if "shared memory" in message:
            return message
        raise
    return None


def _smallest(op: str, device: torch.device, dtype: torch.dtype, channels: int) -> tuple[Any, ...]:
    """Arguments of ``op`` with one window of the convolution, or of the pooling after it."""
    side = 19 if op == "stem" else 11
    x = torch.zeros(1, 3, side, side, dtype=dtype, device=device)
    weight = torch.zeros(channels, *WINDOW, dtype=dtype, device=device)
    around = (0, 0, 0, 0)
    if op == "conv1_backward":
        return x.new_zeros(1, channels, 1, 1), None, x, weight, None, None, around, (False, True, True)
    block = (5, 1.0, 0.75, 1.0, 1, _POOLING, False, False, True) if op == "stem" else ()
    return x, weight, None, None, None, around, True, *block


def _compiled(op: str) -> Any:
    return getattr(torch.ops.alexnet_kernels_cuda, op).default


def _why_not(op: str, x: Tensor, weight: Tensor) -> str | None:
    if weight.shape[0] not in _CHANNELS:
        return f"written for {' or '.join(map(str, _CHANNELS))} output channels, not {weight.shape[0]}"
    if weight.dtype not in _DTYPES:
        return f"no kernel for {weight.dtype}"
    if x.dtype not in (torch.uint8, *_DTYPES):
        return f"no kernel for images in {x.dtype}"
    if x.device.type != _DEVICE:
        return f"no kernel for device {x.device.type!r}"
    if weight.dtype == torch.float32 and torchs_precision() != "tf32":
        return "torch's tf32 flags ask for strict fp32, and tensor cores have tf32 (torch.backends.cudnn.allow_tf32 = True)"
    return _library_why_not(op, x.device.index, weight.dtype, weight.shape[0])


def cuda_conv1_why_not(x: Tensor, weight: Tensor, *_: Any) -> str | None:
    return _why_not("conv1", x, weight)


def cuda_stem_why_not(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    *_, size, _, _, _, groups, window, _, _, _ = args
    if size != 5 or tuple(window) != _POOLING:
        return "written for LRN over 5 channels and 3x3 windows with stride 2"
    if weight.shape[0] % (8 * groups):
        return "written for a multiple of 8 channels a group"
    return _why_not("stem", x, weight)


def _cuda_backward_why_not(grad: Tensor, a: Tensor | None, x: Tensor, weight: Tensor, *_: Any) -> str | None:
    why = why_transformed()
    if why is not None:
        return why
    if any(t is not None and t.data_ptr() % 16 for t in (grad, a)):
        return "reads 16 bytes at once, and a tensor begins between two of those"
    return _why_not("conv1_backward", x, weight)


def _cuda_conv1(*args: Any) -> Tensor:
    return _compiled("conv1")(*args)


def _cuda_stem(*args: Any) -> Map:
    return _compiled("stem")(*args)


def _cuda_backward(*args: Any) -> Map:
    return _compiled("conv1_backward")(*args)


def _reference_conv1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    padding: Padding,
    relu: bool,
) -> Tensor:
    return reference.conv1(x, weight, bias, mean, scale, (STRIDE, STRIDE), padding, relu)


def _reference_stem(*args: Any) -> Map:
    keep = args[-1]
    a = dense(_reference_conv1(*args[:7]), channels_last)
    block: Any = args[7:]
    y, place = pool.in_layout(reference.lrn_pool(a, None, False, *block), channels_last)
    return y, a if keep else a.new_empty(0), place


def _reference_backward(
    grad: Tensor,
    a: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    padding: Padding,
    mask: Sequence[bool],
) -> Map:
    dx, dw, db = reference.conv1_backward(grad, a, x, weight, mean, scale, (STRIDE, STRIDE), padding, mask)
    return _laid(dx, x), _laid(dw, weight), db


def _laid(gradient: Tensor, like: Tensor) -> Tensor:
    return dense(gradient, layout_of(like)) if gradient.dim() == 4 else gradient


# Not timed yet: bench/results/PENDING.md. The kernel reads 8-bit pixels where the other way writes and reads them again
# prepared, and stores neither the map (without gradients) nor its normalisation.
dispatch.register("conv1", "cuda", _cuda_conv1, cuda_conv1_why_not)
dispatch.register("conv1", "reference", _reference_conv1, dispatch.never)
dispatch.register("stem", "cuda", _cuda_stem, cuda_stem_why_not)
dispatch.register("stem", "reference", _reference_stem, dispatch.never)
dispatch.register("conv1_backward", "cuda", _cuda_backward, _cuda_backward_why_not)
dispatch.register("conv1_backward", "reference", _reference_backward, dispatch.never)
