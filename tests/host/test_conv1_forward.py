"""The first layer's CUDA source on the CPU, against fp64: convolution alone, and with normalisation and pooling."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of ElementType
SOURCES = [*DTYPES, torch.uint8]  # in the order of Conv1Source
LRN = (5, 0.02, 0.75, 2.0)
WINDOW = (3, 3, 2, 2, 0, 0, 1, 1)
LARGE, MIDDLE, SMALL = (227 << 10, 163 << 10, 99 << 10)  # shared memory of a block: sm_90, sm_80, sm_86
NAN, INF = float("nan"), float("inf")


class Images(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("source", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("mean", "scale")),
        *((name, ctypes.c_int64) for name in ("images", "image_stride")),
        *((name, ctypes.c_int) for name in ("height", "width", "row_stride", "column_stride", "plane_stride")),
        *((name, ctypes.c_int) for name in ("pad_top", "pad_left")),
    ]


class Problem(ctypes.Structure):
    """``Conv1Forward`` of ``csrc/conv1.h``."""

    _fields_ = [
        ("images", Images),
        *((name, ctypes.c_void_p) for name in ("weight", "packed", "bias", "a", "y", "place")),
        *((name, ctypes.c_int) for name in ("out_height", "out_width", "pooled_height", "pooled_width")),
        *((name, ctypes.c_int) for name in ("channels", "groups")),
        *((name, ctypes.c_float) for name in ("lrn_scale", "beta", "k")),
        *((name, ctypes.c_bool) for name in ("relu", "pool_first")),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("threads", "shared_bytes", "depth", "used_depth")),
        ("products", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class Case:
    height: int = 27
    width: int = 31
    images: int = 1
    channels: int = 96
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dtype: torch.dtype = torch.bfloat16
    source: torch.dtype = torch.float32
    channels_last: bool = False
    normalised: bool = False
    with_bias: bool = True
    relu: bool = True
    stem: bool = False
    pool_first: bool = False
    ceil_mode: bool = False
    keep: bool = True
    groups: int = 1
    beta: float = 0.75
    shared: int = LARGE
    order: int = 0


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None
    scale: Tensor | None


@pytest.fixture(scope="module")
def host(conv1_library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(conv1_library))
    loaded.run_conv1_forward.restype = ctypes.c_char_p
    loaded.run_conv1_forward.argtypes = [Problem, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    loaded.describe_conv1_forward.restype = Launch
    loaded.describe_conv1_forward.argtypes = [Problem, ctypes.c_int, ctypes.c_int]
    return loaded


def draw(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shape = (case.images, 3, case.height, case.width)
    if case.source == torch.uint8:
        x = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    else:
        x = torch.randn(shape, generator=generator).to(case.source)
    x = x.contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
    weight = (torch.randn(case.channels, 3, 11, 11, generator=generator) / 8).to(case.dtype)
    bias = torch.randn(case.channels, generator=generator).to(case.dtype) if case.with_bias else None
    mean, scale = torch.randn(3, generator=generator) * 20 + 110, torch.rand(3, generator=generator) / 50 + 0.01
    return Inputs(x, weight, bias, mean if case.normalised else None, scale if case.normalised else None)


def to_tf32(x: Tensor) -> Tensor:
    """Rounded to 11 bits, ties away from zero."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), ((bits + 0x1000) & ~0x1FFF).view(torch.float32), x)


def multiplied(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What the tensor cores multiply, exactly, in fp64: the padded image and the weights."""
    x = inputs.x.float()
    if inputs.mean is not None and inputs.scale is not None:
        x = (x - inputs.mean.view(3, 1, 1)) * inputs.scale.view(3, 1, 1)
    x = to_tf32(x) if case.dtype == torch.float32 else x.to(case.dtype)
    weight = to_tf32(inputs.weight) if case.dtype == torch.float32 else inputs.weight
    top, bottom, left, right = case.padding
    return F.pad(x.double(), (left, right, top, bottom)), weight.double()


def pooled_shape(case: Case, out: tuple[int, int]) -> tuple[int, int]:
    shape = F.max_pool2d(torch.empty(1, *out), 3, 2, ceil_mode=case.ceil_mode).shape
    return shape[1], shape[2]


def address(tensor: Tensor | None) -> Any:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def problem(case: Case, inputs: Inputs, a: Tensor | None, y: Tensor | None, place: Tensor | None) -> Problem:
    top, bottom, left, right = case.padding
    out = (case.height + top + bottom - 11) // 4 + 1, (case.width + left + right - 11) // 4 + 1
    strides = inputs.x.stride()
    images = Images(
        *(address(inputs.x), SOURCES.index(case.source), address(inputs.mean), address(inputs.scale)),
        *(case.images, strides[0], case.height, case.width, strides[2], strides[3], strides[1], top, left),
    )
    return Problem(
        *(images, address(inputs.weight), None, *(address(t) for t in (inputs.bias, a, y, place))),
        *(*out, *(pooled_shape(case, out) if case.stem else (0, 0)), case.channels, case.groups),
        *(LRN[1], case.beta, LRN[3], case.relu, case.pool_first),
    )


def run(host: ctypes.CDLL, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """``a``, ``y`` and ``place``; empty where they are not asked for."""
    empty = problem(case, inputs, None, None, None)
    shape = (case.images, case.channels, empty.out_height, empty.out_width)
    pooled = (case.images, case.channels, empty.pooled_height, empty.pooled_width)
    kept = case.keep or not case.stem
    options: Any = {"memory_format": torch.channels_last}
    a = torch.full(shape if kept else (0, 0, 0, 0), NAN, dtype=case.dtype).contiguous(**options)
    y = torch.full(pooled if case.stem else (0, 0, 0, 0), NAN, dtype=case.dtype).contiguous(**options)
    place = torch.full(pooled if case.stem and case.keep else (0, 0, 0, 0), 99, dtype=torch.uint8).contiguous(**options)
    message = host.run_conv1_forward(
        problem(case, inputs, a, y, place), DTYPES.index(case.dtype), case.order, case.shared
    )
    assert message is None, message
    return a, y, place


def check_activation(case: Case, inputs: Inputs, a: Tensor) -> None:
    """|error| <= 400 rounded additions + the last rounding, number by number; NaN and infinity where fp64 has them."""
    x, weight = multiplied(case, inputs)
    bias = torch.zeros(case.channels) if inputs.bias is None else inputs.bias
    exact = F.conv2d(x, weight, bias.double(), 4)
    terms = F.conv2d(x.abs(), weight.abs(), bias.double().abs(), 4)
    exact = exact.relu() if case.relu else exact
    bound = (
        400 * 2**-24 * terms + torch.finfo(case.dtype).eps / 2 * exact.abs() + torch.finfo(case.dtype).smallest_normal
    )
    got = a.double()
    finite = exact.isfinite()
    assert torch.equal(got[~finite].nan_to_num(7, 8, 9), exact[~finite].nan_to_num(7, 8, 9))
    assert bool(((got - exact).abs() <= bound)[finite].all())


def check_pooled(case: Case, a: Tensor, y: Tensor, place: Tensor) -> None:
    """From the rounded ``a``: y within its rounding and 2^-19 of the arithmetic; each place is of a number as large."""
    size, scale, _, k = LRN
    source = a.double()
    if case.pool_first:
        pooled, exact_place = reference.max_pool2d_with_place(source, WINDOW, case.ceil_mode)
        exact = reference.lrn(pooled, size, scale, case.beta, k, case.groups)
        assert place.numel() == 0 or torch.equal(place, exact_place)
    else:
        normalised = reference.lrn(source, size, scale, case.beta, k, case.groups)
        exact, _ = reference.max_pool2d_with_place(normalised, WINDOW, case.ceil_mode)
    close = torch.finfo(case.dtype).eps / 2 + 2**-19
    bound = close * exact.abs() + torch.finfo(case.dtype).smallest_normal
    assert bool(((y.double() - exact).abs() <= bound).all())
    if place.numel() > 0 and not case.pool_first:
        there = reference.pick(normalised, reference.indices(place, WINDOW, a.shape[3]))
        assert bool(((there - exact).abs() <= 2 * bound).all())


def check(host: ctypes.CDLL, case: Case, seed: int = 0) -> None:
    inputs = draw(case, seed)
    a, y, place = run(host, case, inputs)
    if a.numel() > 0:
        check_activation(case, inputs, a)
    if case.stem:
        if a.numel() == 0:
            a, kept_y, _ = run(host, dataclasses.replace(case, keep=True), inputs)
            assert torch.equal(y, kept_y)
        check_pooled(case, a, y, place)


cases = st.builds(
    Case,
    height=st.integers(14, 40),
    width=st.integers(14, 40),
    images=st.integers(1, 2),
    channels=st.sampled_from([48, 64, 96]),
    padding=st.tuples(*(st.integers(0, 5) for _ in range(4))),
    dtype=st.sampled_from(DTYPES),
    source=st.sampled_from(SOURCES),
    channels_last=st.booleans(),
    normalised=st.booleans(),
    with_bias=st.booleans(),
    relu=st.booleans(),
    shared=st.sampled_from([LARGE, LARGE, MIDDLE]),
    order=st.sampled_from([0, 1, 5]),
)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(case=cases, seed=st.integers(0, 99))
def test_convolution_against_fp64(host: ctypes.CDLL, case: Case, seed: int) -> None:
    check(host, case, seed)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    case=cases,
    height=st.integers(19, 40),
    width=st.integers(19, 40),
    pool_first=st.booleans(),
    ceil_mode=st.booleans(),
    keep=st.booleans(),
    groups=st.integers(1, 2),
    beta=st.sampled_from([0.75, 0.75, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_stem_against_fp64(host: ctypes.CDLL, case: Case, seed: int, **rest: Any) -> None:
    check(host, dataclasses.replace(case, stem=True, **rest), seed)
