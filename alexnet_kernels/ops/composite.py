"""Operations without a kernel of their own in this version: plain torch, differentiable to any order, on any device.

They pass through ``dispatch`` all the same, so that a backend asked for by name is an error here too and ``explain`` knows
them. Under ``torch.compile`` they are traced into the surrounding code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import dispatch, reference

WHY = "no implementation in this version"
WHY_INDICES = "return_indices=True: torch's own pooling writes int64 indices, kernels a byte"


def plain(op: str, why: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, a function of ``reference``, as the way to run ``op`` where nothing else can."""
    if not torch.compiler.is_compiling():
        dispatch.require_reference(op, why)
    return function(*args)


def max_pool2d_with_indices(*args: Any) -> Any:
    return plain("max_pool2d", WHY_INDICES, reference.max_pool2d_with_indices, *args)


def spatial_response_norm(*args: Any) -> Any:
    return plain("spatial_response_norm", WHY, reference.spatial_response_norm, *args)


def explain(op: str, why: str = WHY) -> dispatch.Explanation:
    """What :func:`plain` would run for ``op``."""
    return dispatch.explain_reference(op, why)
