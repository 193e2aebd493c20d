"""What the op files share: the library they register in, and the layout rule."""

from __future__ import annotations

from torch import Tensor, bfloat16, float32, float64, library, memory_format
from torch import channels_last as _channels_last
from torch import channels_last_3d as _channels_last_3d
from torch import contiguous_format as _contiguous

from .. import _extension
from ..dispatch import Explanation

__all__ = ["AUTOCAST_KEYS", "LIBRARY", "Explanation", "cpu_why_not", "dense", "layout_of"]

LIBRARY = library.Library("alexnet_kernels", "DEF")

AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA")


def layout_of(x: Tensor) -> memory_format:
    """channels_last where ``x`` is dense in it and not in torch's default; the default for everything else."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=_channels_last):
            return _channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=_channels_last_3d):
            return _channels_last_3d
    return _contiguous


def dense(x: Tensor, layout: memory_format | None = None) -> Tensor:
    """``x`` in ``layout`` (default: its own): itself if it lies so already, else a copy (of a slice, an expanded tensor)."""
    return x.contiguous(memory_format=layout_of(x) if layout is None else layout)


_CPU_DTYPES = (float32, bfloat16, float64)


def cpu_why_not(x: Tensor) -> str | None:
    """The reasons that hold for every operation of the compiled library for CPUs."""
    if not x.is_cpu:
        return f"no kernel for device {x.device.type!r}"
    return _extension.why_not("cpu") if x.dtype in _CPU_DTYPES else f"no kernel for {x.dtype}"
