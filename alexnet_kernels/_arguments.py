"""Checks of arguments that ``functional`` shares with ``_explain``; every error about an argument is raised in these."""

from __future__ import annotations

from numbers import Integral
from typing import Literal, get_args

from torch import SymInt, Tensor

AlphaMode = Literal["mean", "sum"]
Pair = int | tuple[int, int]
Number = float | Tensor
Norm = tuple[int, Number, Number, Number]
Pooling = tuple[Pair, Pair | None, Pair, Pair, bool]
Convolution = tuple[Pair, Pair | str, Pair, int]
Precision = Literal["ieee", "tf32", "tf32x3"]


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def require_integer(name: str, value: object) -> None:
    if type(value) is not int and not isinstance(value, (Integral, SymInt)):
        raise TypeError(f"{name}={value!r} must be an integer, got {type(value).__name__}; convert with int({name})")


def lrn_scale(x: Tensor, size: int, alpha: Number, groups: int, alpha_mode: str) -> Number:
    """Check the arguments of a response normalisation; the factor of the plain sum of squares."""
    require_tensor("input", x)
    if x.dim() < 3:
        raise ValueError(
            f"input has {x.dim()} dimensions, shape {tuple(x.shape)}: response normalisation runs over dim 1 of "
            "[N, C, ...] with 3 or more (Expected 3D or higher dimensionality); add the missing ones with unsqueeze"
        )
    if x.is_complex():
        raise TypeError(
            f"input is {x.dtype}: response normalisation is defined on real numbers; pass input.abs() or real and imag"
        )
    require_integer("size", size)
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 (the number of neighbouring channels; the paper's is 5)")
    if groups != 1 and (groups < 1 or x.shape[1] % groups):
        raise ValueError(f"groups={groups} does not divide the {x.shape[1]} channels of input {tuple(x.shape)}")
    if alpha_mode == "mean":
        return alpha / size
    if alpha_mode == "sum":
        return alpha
    raise ValueError(
        f"alpha_mode={alpha_mode!r} is unknown: 'mean' divides alpha by size (torch, Caffe), 'sum' does not (paper)"
    )


def require_maps(x: Tensor, size: int) -> None:
    require_tensor("input", x)
    if not x.is_floating_point():
        raise TypeError(
            f"input is {x.dtype}: spatial normalisation needs a floating-point tensor; convert with .float()"
        )
    if x.dim() not in (3, 4):
        raise ValueError(f"input has {x.dim()} dimensions, shape {tuple(x.shape)}: [N, C, H, W] or [C, H, W] is needed")
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size} must be odd and at least 1, so that the window has a centre")


def are_numbers(*coefficients: Number) -> bool:
    return not any(isinstance(value, Tensor) for value in coefficients)


def require_precision(value: str | None) -> None:
    if value is not None and value not in get_args(Precision):
        known = ", ".join(map(repr, get_args(Precision)))
        raise ValueError(f"precision={value!r} is unknown; use {known}, or None for what torch's flags say")


def require_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} must lie between 0 and 1: the share of the elements that dropout sets to 0")
