"""A layer with weights and the ReLU after it in one module."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from .._fusion import ORDINARY_TENSORS
from ._layers import refuse_script, weights


class ConvReLU2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` and the ReLU after it in one; constructor, ``state_dict`` and errors of ``torch.nn.Conv2d``.

    ``[N, C, H, W]`` or ``[C, H, W]`` to the same with ``out_channels`` maps, in the input's dtype; any ``padding_mode``.

    >>> ConvReLU2d(3, 8, 3, padding=1)(torch.randn(1, 3, 5, 5)).min() >= 0
    tensor(True)
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = weights(self)
        if self.padding_mode != "zeros" or not ORDINARY_TENSORS.issuperset((type(input), type(weight), type(bias))):
            return torch.nn.functional.relu(super().forward(input))
        return F.conv2d_relu(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


class LinearReLU(torch.nn.Linear):
    """``torch.nn.Linear`` and the ReLU after it in one; constructor, ``state_dict`` and errors of ``torch.nn.Linear``.

    ``[..., in_features]`` to ``[..., out_features]`` in the input's dtype.

    >>> LinearReLU(4, 2)
    LinearReLU(in_features=4, out_features=2, bias=True)
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = weights(self)
        if not ORDINARY_TENSORS.issuperset((type(input), type(weight), type(bias))):
            return torch.nn.functional.relu(super().forward(input))
        return F.linear_relu(input, weight, bias)
