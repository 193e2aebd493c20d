"""Response normalisation and max pooling as modules, and both in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .._fusion import ORDINARY_TENSORS
from ._layers import lrn_arguments, lrn_options, pool_arguments, refuse_script


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """``torch.nn.LocalResponseNorm`` with ``groups`` and ``alpha_mode``; see ``functional.local_response_norm``.

    >>> LocalResponseNorm(5, k=2.0, groups=2)
    LocalResponseNorm(5, alpha=0.0001, beta=0.75, k=2.0, groups=2)
    """

    __prepare_scriptable__ = refuse_script

    groups: int = 1  # class attributes, so that an instance of torch's class can change into this one
    alpha_mode: F.AlphaMode = "mean"

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        groups: int = 1,
        alpha_mode: F.AlphaMode = "mean",
    ) -> None:
        super().__init__(size, alpha, beta, k)
        self.groups = groups
        self.alpha_mode = alpha_mode

    def forward(self, input: Tensor) -> Tensor:
        return F.local_response_norm(
            input, self.size, self.alpha, self.beta, self.k, groups=self.groups, alpha_mode=self.alpha_mode
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _scope(self)


def _scope(norm: LocalResponseNorm | _LRNAndPool) -> str:
    groups = f", groups={norm.groups}" if norm.groups != 1 else ""
    mode = f", alpha_mode={norm.alpha_mode!r}" if norm.alpha_mode != "mean" else ""
    return groups + mode


class SpatialResponseNorm(torch.nn.Module):
    """Response normalisation over size x size neighbours inside a map; see ``functional.spatial_response_norm``."""

    def __init__(self, size: int, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, input: Tensor) -> Tensor:
        return F.spatial_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class MaxPool2d(torch.nn.MaxPool2d):
    """``torch.nn.MaxPool2d``: constructor, shapes, dtypes (integers too), ``return_indices`` and errors.

    >>> MaxPool2d(3, stride=2)
    MaxPool2d(kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False)
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor) -> Any:
        if type(input) not in ORDINARY_TENSORS:
            return super().forward(input)
        return F.max_pool2d(input, *pool_arguments(self), self.return_indices)


class _LRNAndPool(torch.nn.Module):
    """What ``LRNMaxPool2d`` and ``MaxPoolLRN2d`` share: the arguments of both operations, no parameters."""

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        kernel_size: F.Pair = 3,
        stride: F.Pair | None = 2,
        padding: F.Pair = 0,
        dilation: F.Pair = 1,
        ceil_mode: bool = False,
        *,
        groups: int = 1,
        alpha_mode: F.AlphaMode = "mean",
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.dilation, self.ceil_mode = padding, dilation, ceil_mode
        self.groups, self.alpha_mode = groups, alpha_mode

    def extra_repr(self) -> str:
        norm = torch.nn.LocalResponseNorm.extra_repr(self)  # type: ignore[arg-type]
        return f"{norm}{_scope(self)}, {torch.nn.MaxPool2d.extra_repr(self)}"  # type: ignore[arg-type]


class LRNMaxPool2d(_LRNAndPool):
    """``LocalResponseNorm``, then ``MaxPool2d`` (the paper's order), in one; see ``functional.lrn_max_pool2d``.

    ``[N, C, H, W]`` to the same with smaller maps, in the input's dtype and layout. LRN's arguments come first, then the
    pool's; ``stride=None`` is ``kernel_size``, as in torch.

    >>> LRNMaxPool2d(5, k=2.0)(torch.ones(1, 8, 13, 13)).shape
    torch.Size([1, 8, 6, 6])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.lrn_max_pool2d(input, *lrn_arguments(self), *pool_arguments(self), **lrn_options(self))


class MaxPoolLRN2d(_LRNAndPool):
    """``MaxPool2d``, then ``LocalResponseNorm`` (CaffeNet's order), in one; see ``functional.max_pool2d_lrn``.

    Arguments, shapes and dtypes of :class:`LRNMaxPool2d`.

    >>> MaxPoolLRN2d(5)
    MaxPoolLRN2d(5, alpha=0.0001, beta=0.75, k=1.0, kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False)
    """

    def forward(self, input: Tensor) -> Tensor:
        if type(input) in ORDINARY_TENSORS:
            return F.max_pool2d_lrn(input, *lrn_arguments(self), *pool_arguments(self), **lrn_options(self))
        pooled = torch.nn.functional.max_pool2d(input, *pool_arguments(self))
        return F.local_response_norm(pooled, *lrn_arguments(self), **lrn_options(self))
