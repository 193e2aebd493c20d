"""The CUDA kernel's source on the CPU, against torch's autograd in fp64."""

from __future__ import annotations

import ctypes
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
SIZE, SCALE, K = 5, 0.02, 2.0


class Problem(ctypes.Structure):
    """``LrnPoolBackward`` of ``csrc/lrn_pool_backward.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "place", "x", "bias", "dx", "partial", "dbias")),
        ("images", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("height", "width", "out_height", "out_width", "channels", "groups")),
        *((name, ctypes.c_int) for name in ("pad_height", "pad_width")),
        *((name, ctypes.c_float) for name in ("scale", "beta", "k")),
        ("relu", ctypes.c_bool),
    ]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    groups: int = 1
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    beta: float = 0.75
    relu: bool = True
    with_bias: bool = True
    dtype: torch.dtype = torch.float32
    order: int = 0


@pytest.fixture(scope="module")
def host(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    loaded.run_lrn_pool_backward.restype = ctypes.c_char_p
    loaded.run_lrn_pool_backward.argtypes = [Problem, ctypes.c_int, ctypes.c_int]
    return loaded


def forward(case: Case, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is pooled (rounded to the dtype, values in x's dtype) and the place of each maximum."""
    a = x if bias is None else (x + bias.view(1, -1, 1, 1))
    a = F.relu(a) if case.relu else a
    y = reference.lrn(a.to(case.dtype), SIZE, SCALE, case.beta, K, case.groups)
    pooled, at = F.max_pool2d(y, 3, 2, case.padding, ceil_mode=case.ceil_mode, return_indices=True)
    top = 2 * torch.arange(at.shape[2]).view(-1, 1) - case.padding[0]
    left = 2 * torch.arange(at.shape[3]) - case.padding[1]
    return pooled, ((at // x.shape[3] - top) * 3 + at % x.shape[3] - left).to(torch.uint8)


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(case.shape, generator=generator) * 3).to(case.dtype)
    bias = torch.randn(case.shape[1], generator=generator).to(case.dtype) if case.with_bias else None
    pooled, place = forward(case, x, bias)
    return x, bias, place, torch.randn(pooled.shape, generator=generator).to(case.dtype)


def expected(
    case: Case, x: Tensor, bias: Tensor | None, place: Tensor, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """torch's gradient by x, and its sum, in ``dtype``; the maxima are the given ones."""
    width = case.shape[3]
    z = x if bias is None else (x.to(dtype) + bias.to(dtype).view(1, -1, 1, 1)).to(case.dtype)
    z = z.to(dtype).requires_grad_()
    a = F.relu(z) if case.relu else z
    parts = [F.local_response_norm(part, SIZE, SCALE * SIZE, case.beta, K) for part in a.chunk(case.groups, 1)]
    h = 2 * torch.arange(grad.shape[2]).view(-1, 1) - case.padding[0] + place.long() // 3
    w = 2 * torch.arange(grad.shape[3]) - case.padding[1] + place.long() % 3
    torch.cat(parts, 1).flatten(2).gather(2, (h * width + w).flatten(2)).backward(grad.to(dtype).flatten(2))
    assert z.grad is not None
    return z.grad, z.grad.sum((0, 2, 3))


def address(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.data_ptr()


def run(
    host: ctypes.CDLL, case: Case, x: Tensor, bias: Tensor | None, place: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    x, place, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, place, grad))
    dx = torch.full_like(x, float("nan"))
    dbias = torch.full((case.shape[1],), float("nan"), dtype=case.dtype)
    n, c, height, width = case.shape
    problem = Problem(
        *(address(t) for t in (grad, place, x, bias, dx, None, dbias)),
        *(n, height, width, grad.shape[2], grad.shape[3], c, case.groups, *case.padding),
        *(SCALE, case.beta, K, case.relu),
    )
    message = host.run_lrn_pool_backward(problem, DTYPES.index(case.dtype), case.order)
    assert message is None, message
    return dx, dbias


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def check(host: ctypes.CDLL, case: Case, seed: int = 0) -> None:
    x, bias, place, grad = inputs(case, seed)
    dx, dbias = run(host, case, x, bias, place, grad)
    exact = expected(case, x, bias, place, grad, torch.float64)
    torchs = expected(case, x, bias, place, grad, torch.float32)
    floor = 3e-8  # fp32's own rounding of a result that torch happens to hit exactly
    for got, stock, want in zip((dx, dbias), torchs, exact, strict=True):
        assert error(got, want) <= 1.5 * error(stock.to(case.dtype), want) + floor


cases = st.builds(
    lambda n, groups, vectors, h, w, **rest: Case((n, 8 * vectors * groups, h, w), groups, **rest),
    n=st.integers(1, 2),
    groups=st.integers(1, 2),
    vectors=st.integers(1, 4),
    h=st.integers(3, 10),
    w=st.integers(3, 10),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    ceil_mode=st.booleans(),
    beta=st.sampled_from([0.75, 0.75, 0.5, 1.0]),
    relu=st.booleans(),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from([0, 1, 5]),
)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(case=cases, seed=st.integers(0, 99))
def test_against_fp64(host: ctypes.CDLL, case: Case, seed: int) -> None:
    check(host, case, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "groups"),
    [(96, 1), (96, 2), (264, 1)],
    ids=["a group over the end of a warp", "five groups a warp", "a group longer than a warp"],
)
def test_groups_and_warps(host: ctypes.CDLL, dtype: torch.dtype, channels: int, groups: int) -> None:
    check(host, Case((1, channels, 7, 9), groups, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_orders_of_the_threads_give_the_same_bits(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    results = []
    for order in (0, 1, 2, 3):
        case = Case((2, 48, 8, 7), 2, dtype=dtype, order=order)
        results.append(run(host, case, *inputs(case)))
    for dx, dbias in results[1:]:
        assert torch.equal(dx, results[0][0]) and torch.equal(dbias, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(host: ctypes.CDLL, dtype: torch.dtype, relu: bool, special: float) -> None:
    case = Case((1, 24, 7, 7), relu=relu, with_bias=False, dtype=dtype)
    x, bias, place, grad = inputs(case)
    x[0, 9, 2, 3] = x[0, 0, 5, 5] = special
    _, place = forward(case, x, bias)
    dx, _ = run(host, case, x, bias, place, grad)
    want, _ = expected(case, x, bias, place, grad, torch.float32)
    assert torch.equal(dx.isnan(), want.isnan())
    torch.testing.assert_close(dx.float(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4, equal_nan=True)


def test_ties_and_uncovered_pixels(host: ctypes.CDLL) -> None:
    case = Case((1, 8, 6, 8), relu=False, with_bias=False)  # the last row and the last column belong to no window
    x = torch.ones(case.shape)
    _, place = forward(case, x, None)
    assert not place[:, :, 1:, 1:].any()
    grad = torch.ones(place.shape)
    dx, dbias = run(host, case, x, None, place, grad)
    want, want_bias = expected(case, x, None, place, grad, torch.float64)
    assert not dx[:, :, 5].any() and not dx[..., 7].any()
    torch.testing.assert_close(dx.double(), want)
    torch.testing.assert_close(dbias.double(), want_bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_are_torchs(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()  # each number of the type
    halfway = (every[:-1].double() / 2 + every[1:].double() / 2).float()
    values = torch.cat([bits.view(torch.float32), every, halfway, torch.tensor([65519.9, 65520.0, 3.4e38])])
    rounded, back = torch.empty(len(values), dtype=torch.int16), torch.empty(len(values))
    host.round_trip(
        *(ctypes.c_void_p(t.data_ptr()) for t in (values, rounded, back)),
        ctypes.c_int64(len(values)),
        DTYPES.index(dtype),
    )
    torch.testing.assert_close(rounded.view(dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, values.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_refusals(host: ctypes.CDLL) -> None:
    problem = Problem(channels=12, groups=1, images=1, height=7, width=7)
    assert host.run_lrn_pool_backward(problem, 0, 0) == b"a group is not a multiple of 8 channels"
    problem = Problem(channels=8, groups=1, images=1, height=7, width=7, pad_width=2)
    assert host.run_lrn_pool_backward(problem, 0, 0) == b"padding beyond 1"
    problem = Problem(channels=96, groups=1, images=2**27, height=55, width=55)
    assert host.run_lrn_pool_backward(problem, 0, 0) == b"2^31 threads or more"


def test_sanitizers_and_orders(sanitized: Path) -> None:
    done = subprocess.run([sanitized], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_offsets_beyond_int32(beyond: Path) -> None:
    """The last block on tensors of more than 2^31 elements, by images and inside one image; most of their pages never exist."""
    done = subprocess.run([beyond], capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
