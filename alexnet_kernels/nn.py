"""Modules for ``torch.nn`` users: subclasses with torch's constructors and ``state_dict``s, running our operations."""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional as F


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """``torch.nn.LocalResponseNorm`` with ``groups`` and ``alpha_mode``; see ``functional.local_response_norm``.

    >>> LocalResponseNorm(5, k=2.0, groups=2)
    LocalResponseNorm(5, alpha=0.0001, beta=0.75, k=2.0, groups=2)
    """

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
        groups = f", groups={self.groups}" if self.groups != 1 else ""
        mode = f", alpha_mode={self.alpha_mode!r}" if self.alpha_mode != "mean" else ""
        return super().extra_repr() + groups + mode


class SpatialResponseNorm(torch.nn.Module):
    """Response normalisation over size x size neighbours inside a map; see ``functional.spatial_response_norm``."""

    def __init__(self, size: int, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, input: Tensor) -> Tensor:
        return F.spatial_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class CeilConv2d(torch.nn.Conv2d):
    """``Conv2d`` whose output size is rounded up: the last window may hang over the right and bottom edge, onto zeros.

    The 2012 source counts modules so (``layer.py:1004``): 224 pixels, an 11x11 kernel and stride 4 give 55, not 54.
    """

    def forward(self, input: Tensor) -> Tensor:
        right, bottom = (self._overhang(input.shape[axis], axis) for axis in (-1, -2))
        return super().forward(torch.nn.functional.pad(input, (0, right, 0, bottom)))

    def _overhang(self, size: int, axis: int) -> int:
        """Zeros after the last row or column that the last window needs."""
        padding = 0 if isinstance(self.padding, str) else self.padding[axis]
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (reach - size - 2 * padding) % self.stride[axis]
