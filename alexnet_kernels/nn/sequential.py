"""``torch.nn.Sequential`` whose known runs are one operation each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._fusion import RunsAsOne, why_nowhere
from ._layers import refuse_script
from ._runs import KNOWN


class FusedSequential(RunsAsOne):
    """``torch.nn.Sequential`` that runs known runs of its children as one operation: convolution or ``Linear`` and ReLU,
    ``Dropout`` after the latter, LRN and max pooling in either order.

    Every other child is called itself. Indexing, slicing, iterating, ``state_dict``, values and gradients are those of
    ``Sequential``. At each call, a run is fused only while nobody can see inside it: its members have exactly torch's
    types or ours, no hook of any kind, no ``forward`` of their own, ordinary weights, ``padding_mode="zeros"`` and no
    ``return_indices``; no global module hook is registered, neither ``torch.fx`` nor ``torch.jit`` is tracing, and the
    input is no tensor subclass. ``conversion_report`` says what a call would do now.

    Raises:
        RuntimeError: ``torch.jit.script`` is called on it, or on a model that holds it; ``revert`` first.

    >>> net = FusedSequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten())
    >>> net[:1]
    FusedSequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    )
    >>> from alexnet_kernels.convert import conversion_report
    >>> conversion_report(net).fused
    (FusedRun(names=('0', '1'), operation='conv2d_relu'),)
    """

    __prepare_scriptable__ = refuse_script
    _known = KNOWN


def fused_step(children: Sequence[torch.nn.Module], at: int, input: Any) -> tuple[Any, int]:
    """One step of ``FusedSequential(*children)``, for who runs several of them in turns.

    The run of ``children`` that begins at ``at``, as one operation, or that child by itself; the result, and where the next
    step begins.

    >>> layers = (torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Identity())
    >>> y, at = fused_step(layers, 0, torch.ones(1, 4))
    >>> tuple(y.shape), at
    ((1, 2), 2)
    """
    if why_nowhere() is not None:
        return children[at](input), at + 1
    return KNOWN.advance((*children, None), at, input)
