"""What the op files share: the library they register in, the layout rule, and when an operation needs PyTorch's dispatcher."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, library, memory_format
from torch import channels_last as _channels_last
from torch import channels_last_3d as _channels_last_3d
from torch import contiguous_format as _contiguous

from .. import _extension, dispatch
from ..dispatch import Explanation
from ..reference import is_transformed

__all__ = [
    "AUTOCAST_KEYS",
    "LIBRARY",
    "Explanation",
    "as_forward",
    "compiled_why_not",
    "dense",
    "is_direct",
    "layout_of",
    "runs_compiled",
    "triton_why_not",
    "wants_gradient",
    "why_transformed",
]

LIBRARY = library.Library("alexnet_kernels", "DEF")

AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA")

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMPILED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
_ORDINARY = (Tensor, torch.nn.Parameter, type(None))


def layout_of(x: Tensor) -> memory_format:
    """channels_last where ``x`` is dense in it and not in torch's default; the default for everything else.

    Under a function transform too: there a tensor does not say how it lies, and plain torch runs, which need not know.
    """
    if not x.is_contiguous() and not is_transformed(x):
        if x.dim() == 4 and x.is_contiguous(memory_format=_channels_last):
            return _channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=_channels_last_3d):
            return _channels_last_3d
    return _contiguous


def dense(x: Tensor, layout: memory_format | None = None) -> Tensor:
    """``x`` in ``layout`` (default: its own): itself if it lies so already, else a copy (of a slice, an expanded tensor).

    Under a function transform itself in any case, see :func:`layout_of`.
    """
    if layout is None:
        layout = layout_of(x)
    if (layout is _contiguous and x.is_contiguous()) or is_transformed(x):
        return x
    return x.contiguous(memory_format=layout)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward may be asked for: what it would need has to be kept."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether nobody but autograd watches: no compiler, tracer, dispatch mode or tensor subclass.

    Then an operation may call its implementation itself. Through ``torch.library``, whose layers are Python, the same call
    costs 15 to 30 us more.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and all(type(t) in _ORDINARY for t in tensors)
    )


def why_transformed() -> str | None:
    """Why plain torch runs whatever the tensors are: under a function transform."""
    if is_transformed():
        return "a function transform (torch.func, forward mode) needs plain torch, which composes with all of them"
    return None


def as_forward(ctx: Any, *grads: Tensor | None) -> contextlib.AbstractContextManager[None]:
    """The backend of a backward: that of its forward; plain torch for batched gradients (``is_grads_batched``, jacobians)."""
    batched = any(grad is not None and is_transformed(grad) for grad in grads)
    if batched:
        with dispatch.use_backend(ctx.backend):
            dispatch.require_reference("a batched gradient", "plain torch alone composes with function transforms")
    return dispatch.use_backend("reference" if batched else ctx.backend)


def triton_why_not(x: Tensor) -> str | None:
    return why_transformed() or dispatch.triton_why_not(x, _TRITON_DTYPES)


def compiled_why_not(name: str, x: Tensor) -> str | None:
    """The reasons that hold for every kernel of the compiled library ``name``: another device, no such dtype, no library."""
    if x.device.type != name:
        return f"no kernel for device {x.device.type!r}"
    if x.layout is not torch.strided:
        return f"no kernel for {x.layout}"
    if x.dtype not in _COMPILED_DTYPES[name]:
        return f"no kernel for {x.dtype}"
    return _extension.why_not(name) or why_transformed()


def runs_compiled(op: str, device: torch.device, dtype: torch.dtype, *args: Any) -> bool:
    """Whether a graph under compilation should hold ``op``, which asks for its backend when it runs: some kernel can.

    Where none can, the graph holds plain torch, which the compiler fuses with its surroundings. ``args`` follow the input.
    """
    return dispatch.has_kernel(op, torch.empty(0, dtype=dtype, device=device), *args)


# What torch.compiler.assume_constant_result does; calling that loads torch._dynamo, and with it Triton, at import.
runs_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
