"""Addresses that a Triton program forms, without the memory they lead to: for tensors of more than 2^31 elements.

The interpreter wraps int32 as the GPU does, so this covers the kernels' own arithmetic; not the compiler's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alexnet_kernels.kernels._launch import Launch


class Nowhere:
    """Enough of a tensor for the interpreter to compute addresses: a dtype and a base, no memory."""

    def __init__(self, base: int, dtype: torch.dtype) -> None:
        self.base, self.dtype = base, dtype

    def data_ptr(self) -> int:
        return self.base


def addresses(launch: Launch, program: int, monkeypatch: pytest.MonkeyPatch) -> tuple[set[int], ...]:
    """Elements that program ``program`` of ``launch`` touches in each tensor and descriptor, nothing being read or written."""
    import numpy as np
    from triton.runtime import interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    builder, grids = interpreter.interpreter_builder, interpreter.GridExecutor
    tensors: list[Tensor] = []
    arguments: list[Any] = []

    def nowhere(tensor: Tensor) -> Nowhere:
        tensors.append(tensor)
        return Nowhere(len(tensors) << 44, tensor.dtype)

    for a in launch.args:
        if isinstance(a, TensorDescriptor):
            a = TensorDescriptor(nowhere(a.base), a.shape, a.strides, a.block_shape)
        arguments.append(nowhere(a) if isinstance(a, Tensor) else a)
    touched: list[set[int]] = [set() for _ in tensors]

    def record(ptrs: Any, mask: Any) -> None:
        data, real = np.broadcast_arrays(ptrs.data, np.asarray(mask.data, bool))
        for address in data[real].astype(object).flatten():
            which = (address >> 44) - 1
            touched[which].add((address & (1 << 44) - 1) // tensors[which].element_size())

    def load(ptrs: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
        record(ptrs, mask)
        return other

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", lambda ptrs, _, mask, *__: record(ptrs, mask))
    monkeypatch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", (program, 0, 0)))
    monkeypatch.setattr(grids, "_init_args_hst", lambda _, args, kwargs: (list(args), kwargs))
    monkeypatch.setattr(grids, "_restore_args_dev", lambda *_: None)
    launch.kernel[(1,)](*arguments, **launch.constants)
    return tuple(touched)
