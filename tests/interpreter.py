"""What Triton 3.6's interpreter does otherwise than a GPU with bf16, mended for the tests.

It cuts bits off where a GPU rounds to the nearest value, ties to even, and ``tl.dot`` of bf16 multiplies the bits as integers.
"""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Have this process's interpreter round to bf16 as hardware does, and multiply values."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    builder: Any = InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = np.asarray(src.data, np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return TensorHandle(np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    def widened(v: Any) -> Any:
        return TensorHandle((v.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (widened(v) if v.dtype.scalar == tl.bfloat16 else v for v in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
