"""What the modules share: reading a layer's arguments and weights, and why one cannot be in a run."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse_script(self: torch.nn.Module) -> NoReturn:
    name = type(self).__name__
    torchs = {"FusedSequential": "Sequential", "PixelConv2d": "Conv2d"}.get(name, name)
    if hasattr(torch.nn, torchs):
        raise RuntimeError(
            f"{name} cannot be scripted: revert first; alexnet_kernels.revert(model) makes it torch.nn.{torchs} again, "
            "and torch.jit.script(model) then works. torch.jit.trace, torch.export and torch.compile need no revert"
        )
    raise RuntimeError(
        f"{name} cannot be scripted and has no class in torch.nn to revert to; use torch.jit.trace, torch.export or "
        "torch.compile, or build the model from torch.nn's modules, convert it, and revert first"
    )


def weights(layer: Any) -> tuple[Tensor, Tensor | None]:
    """``weight, bias``, past ``Module.__getattr__``, which takes most of a microsecond for each."""
    parameters = layer._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return layer.weight, layer.bias


def pool_arguments(pool: Any) -> tuple[Any, Any, Any, Any, Any]:
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode


def lrn_arguments(norm: Any) -> tuple[int, float, float, float]:
    return norm.size, norm.alpha, norm.beta, norm.k


def lrn_options(norm: Any) -> dict[str, Any]:
    """What ours has and torch's has not."""
    if type(norm) is torch.nn.LocalResponseNorm:
        return {}
    return {"groups": norm.groups, "alpha_mode": norm.alpha_mode}


def why_not_conv(conv: torch.nn.Conv2d) -> str | None:
    return None if conv.padding_mode == "zeros" else f"padding_mode={conv.padding_mode}"


def why_not_pool(pool: torch.nn.MaxPool2d) -> str | None:
    return "return_indices=True" if pool.return_indices else None
