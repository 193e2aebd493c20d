"""The fused pool and response normalisation against the reference in fp64: every form, in the interpreter or on a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nowhere import addresses
from torch import Tensor

from alexnet_kernels import reference
from alexnet_kernels.kernels import fused as kernel
from alexnet_kernels.kernels import fused_backward, lrn, pool
from alexnet_kernels.kernels._launch import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PAPER = (3, 3, 2, 2, 0, 0, 1, 1)
APPROXIMATE = 2.0**-22  # two ulp of fp32: rsqrt.approx and sqrt.approx are allowed about one each
SCALE, BETA, K = 2e-2, 0.75, 2.0  # the norm does something: s is between 2 and about 5

# form of the gradient, shape, channels innermost, size, groups, window, ceil_mode
CASES = [
    ("vector", (2, 16, 7, 9), True, 5, 2, PAPER, False),
    ("vector", (1, 24, 8, 6), True, 5, 1, PAPER, True),  # windows over the edge; rows and columns that none holds
    ("vector", (1, 8, 6, 5), True, 5, 1, (3, 3, 1, 1, 1, 1, 1, 1), False),
    ("vector", (1, 16, 5, 4), True, 5, 1, (2, 2, 2, 2, 0, 0, 1, 1), False),
    ("ring", (2, 12, 7, 9), False, 5, 2, PAPER, False),  # each group takes one step of 8 channels, not full
    ("ring", (1, 5, 13, 12), False, 5, 1, PAPER, True),  # 156 pixels: two blocks
    ("composed", (1, 6, 7, 7), True, 5, 2, PAPER, False),
    ("composed", (1, 8, 9, 7), False, 4, 1, (3, 2, 2, 1, 1, 0, 1, 1), False),
    ("composed", (1, 8, 9, 9), True, 5, 1, (2, 2, 2, 2, 1, 1, 2, 1), False),
]


def laid_out(x: Tensor, innermost: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if innermost else torch.contiguous_format)


def positions(place: Tensor, width: int, window: tuple[int, ...]) -> Tensor:
    """torch's flat positions of the maxima."""
    _, kw, sh, sw, ph, pw, dh, dw = window
    top = (torch.arange(place.shape[2], device=place.device) * sh - ph)[:, None]
    side = torch.arange(place.shape[3], device=place.device) * sw - pw
    return (top + place.long() // kw * dh) * width + side + place.long() % kw * dw


def unpool(grad: Tensor, place: Tensor, like: Tensor, window: tuple[int, ...]) -> Tensor:
    out = torch.zeros_like(like).flatten(2)
    return out.scatter_add_(2, positions(place, like.shape[3], window).flatten(2), grad.flatten(2)).view(like.shape)


def compose(
    x: Tensor, bias: Tensor | None, relu: bool, grad: Tensor, place: Tensor, arguments: Any, window: Any, first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, dx and dbias by the reference, at the given places, in the dtype of ``x``."""
    a = x if bias is None else x + bias.view(1, -1, 1, 1)
    a = a.relu() if relu else a
    at = positions(place, x.shape[3], window).flatten(2)
    if first:
        p = a.flatten(2).gather(2, at).view(place.shape)
        y = reference.lrn(p, *arguments)
        d = unpool(reference.lrn_backward(grad, p, *arguments), place, x, window)
    else:
        y = reference.lrn(a, *arguments).flatten(2).gather(2, at).view(place.shape)
        d = reference.lrn_backward(unpool(grad, place, x, window), a, *arguments)
    d = torch.where(a <= 0, torch.zeros_like(d), d) if relu else d
    return y, d, d.sum((0, 2, 3))


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def check(
    x: Tensor, bias: Tensor | None, relu: bool, size: int, groups: int, window: Any, ceil_mode: bool, first: bool
) -> None:
    """An error at most 1.5 times that of torch's fp32 result rounded to this dtype, and the unfused values and places."""
    arguments = (size, SCALE, BETA, K, groups)
    y, place = kernel.forward(x, bias, relu, *arguments, window, ceil_mode, first, True)
    alone, nothing = kernel.forward(x, bias, relu, *arguments, window, ceil_mode, first, False)
    assert nothing.shape == (0,) and torch.equal(alone, y)
    a = fused_backward.activated(x, bias, relu)
    if first:
        before, places = pool.forward(a, window, ceil_mode, True)
        unfused = lrn.forward(before, *arguments)
    else:
        unfused, places = pool.forward(lrn.forward(a, *arguments), window, ceil_mode, True)
    if INTERPRETED and x.shape[1] // groups % 8 == 0:  # the same order of sums; a GPU may contract them differently
        assert torch.equal(y, unfused) and torch.equal(place, places)
    grad = laid_out(torch.randn(y.shape, device=DEVICE).to(x.dtype), not x.is_contiguous())
    dx, dbias = kernel.backward(grad, x, bias, place, relu, *arguments, window, first, bias is not None)
    assert (dx.dtype, dx.shape, dx.stride()) == (x.dtype, x.shape, x.stride())
    assert y.is_contiguous(memory_format=pool.layout_of(x)) and y.stride() == place.stride()
    # the activation is rounded once by contract, so both start from it
    wide = [
        compose(a.to(t), None, False, grad.to(t), place, arguments, window, first) for t in (torch.double, torch.float)
    ]
    on = (a > 0) if relu else torch.ones_like(a, dtype=torch.bool)
    exact, theirs = ((y, d * on, (d * on).sum((0, 2, 3))) for y, d, _ in wide)
    assert relative(y, exact[0]) <= 1.5 * relative(theirs[0].to(x.dtype), exact[0]) + APPROXIMATE
    cancelled = APPROXIMATE * (1 + float(grad.double().norm() / exact[1].norm()))  # dx is the difference of two terms
    assert relative(dx, exact[1]) <= 1.5 * relative(theirs[1].to(x.dtype), exact[1]) + cancelled
    if bias is not None:
        assert dbias.dtype == x.dtype
        tolerance = 4 * torch.finfo(x.dtype).eps
        spread = float((exact[1] ** 2).sum((0, 2, 3)).sqrt().max())
        torch.testing.assert_close(dbias.double(), exact[2], rtol=tolerance, atol=tolerance * spread)
    else:
        assert dbias.shape == (0,)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results start as 77, so that an element that no program writes shows."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **kw: real(*a, **kw).fill_(77))


@pytest.mark.parametrize("first", [False, True], ids=["after", "first"])
@pytest.mark.parametrize("activated", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "activated"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[5]}".replace(" ", ""))
def test_every_form(case: Any, activated: bool, first: bool) -> None:
    form, shape, innermost, size, groups, window, ceil_mode = case
    x = laid_out(torch.randn(shape).mul(5).to(DEVICE), innermost)
    bias = torch.randn(shape[1], device=DEVICE) if activated else None
    assert fused_backward.form(x, size, groups, window) == form
    check(x, bias, activated, size, groups, window, ceil_mode, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6]], ids=lambda c: c[0])
def test_half_types(case: Any, dtype: torch.dtype) -> None:
    _, shape, innermost, size, groups, window, ceil_mode = case
    x = laid_out(torch.randn(shape).mul(5).to(DEVICE, dtype), innermost)
    check(x, torch.randn(shape[1], device=DEVICE).to(dtype), True, size, groups, window, ceil_mode, False)


@pytest.mark.parametrize("first", [False, True], ids=["after", "first"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6]], ids=lambda c: c[0])
def test_a_bias_without_relu(case: Any, first: bool) -> None:
    _, shape, innermost, size, groups, window, ceil_mode = case
    x = laid_out(torch.randn(shape).mul(5).to(DEVICE), innermost)
    check(x, torch.randn(shape[1], device=DEVICE), False, size, groups, window, ceil_mode, first)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    groups, innermost = data.draw(st.integers(1, 2)), data.draw(st.booleans())
    channels = groups * data.draw(st.sampled_from([1, 3, 4, 8]))
    shape = (data.draw(st.integers(1, 2)), channels, *(data.draw(st.integers(3, 7)) for _ in range(2)))
    window = data.draw(st.sampled_from([PAPER, PAPER, (3, 2, 1, 2, 1, 1, 1, 1), (2, 2, 2, 1, 0, 1, 1, 2)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    activated, ceil_mode, first = (data.draw(st.booleans()) for _ in range(3))
    size = data.draw(st.sampled_from([5, 5, 3, 2]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = laid_out(torch.randn(shape).mul(5).to(DEVICE, dtype), innermost)
    bias = torch.randn(channels, device=DEVICE).to(dtype) if activated else None
    check(x, bias, activated, size, groups, window, ceil_mode, first)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns of every NaN
@pytest.mark.parametrize("first", [False, True], ids=["after", "first"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6]], ids=lambda c: c[0])
def test_not_finite_where_the_reference_is_not(case: Any, first: bool) -> None:
    """NaN and infinities at the edges of groups, and ties: maxima and places are torch's, gradients NaN at the same elements."""
    _, shape, innermost, size, groups, window, _ = case
    x = torch.randint(-2, 3, shape).float()
    width = shape[1] // groups
    for i, value in enumerate([float("nan"), float("inf"), -float("inf"), 1e25]):
        x[0, i % 2 * (width - 1) + i // 2 * width % shape[1], i, 2 * i] = value
    x = laid_out(x.to(DEVICE), innermost)
    arguments = (size, SCALE, BETA, K, groups)
    y, place = kernel.forward(x, None, True, *arguments, window, False, first, True)
    a = x.relu()
    l = a if first else lrn.forward(a, *arguments)  # noqa: E741
    maxima, at = F.max_pool2d(l, window[:2], window[2:4], return_indices=True)
    maxima = lrn.forward(laid_out(maxima, innermost), *arguments) if first else maxima
    torch.testing.assert_close(y, maxima, equal_nan=True)
    assert torch.equal(positions(place, shape[3], window), at)
    grad = laid_out(torch.randn(y.shape, device=DEVICE), innermost)
    dx, _ = kernel.backward(grad, x, None, place, True, *arguments, window, first, False)
    _, exact, _ = compose(x, None, True, grad, place, arguments, window, first)
    torch.testing.assert_close(dx, exact, rtol=1e-4, atol=1e-4, equal_nan=True)


# ------------------------------------------------------------------------------------------- more than 2^31 elements

MANY, HUGE = (8192, 96, 55, 55), (1, 96, 4800, 4801)  # by images, and inside one image


@pytest.mark.skipif(not INTERPRETED, reason="records the addresses that the interpreter forms")
@pytest.mark.parametrize("shape", [MANY, HUGE], ids=["many", "huge"])
def test_addresses_beyond_int32(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of each channels_last kernel touches the end of its tensors, and no element that it must not."""
    monkeypatch.undo()
    for configs, name in ((kernel.CONFIGS, "strip_forward"), (fused_backward.CONFIGS, "vector_gradient")):
        monkeypatch.setitem(configs, name, Config(block=16))  # fewer addresses to look at
    x = laid_out(torch.empty(shape, dtype=torch.bfloat16, device="meta"), True)
    y = torch.empty(pool.output_shape(x, PAPER, False), dtype=torch.bfloat16, device="meta")
    y = laid_out(y, True)
    place = torch.empty_like(y, dtype=torch.uint8)
    channels, height, width = shape[1:]
    rows, columns = y.shape[2:]

    def beside(elements: set[int], reach: int) -> set[int]:
        return {e + d for e in elements for d in range(-reach, reach + 1) if 0 <= e % 48 + d < 48}

    def taps(e: int) -> set[int]:
        pixel, c = divmod(e, channels)
        image, o = divmod(pixel, rows * columns)
        corner = (image * height + o // columns * 2) * width + o % columns * 2
        return {(corner + i * width + j) * channels + c for i in range(3) for j in range(3)}

    forward = kernel.plan_strip(x, None, y, place, True, SCALE, BETA, K, 2)
    reads, _, written, places = addresses(forward, forward.grid[0] - 1, monkeypatch)
    assert written == places and max(written) == y.numel() - 1
    assert reads == beside(set().union(*map(taps, written)), 2)
    backward, _ = fused_backward.plan_vector(y, place, x, None, x, True, SCALE, BETA, K, 2, PAPER, False)
    taken, asked, reads, _, written, _ = addresses(backward, backward.grid[0] - 1, monkeypatch)
    assert max(written) == x.numel() - 1 and min(written) > 2**31
    assert reads == beside(written, 4)
    assert taken == asked and max(asked) == y.numel() - 1
    assert all(beside(taps(e), 2) & written for e in asked)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("innermost", [True, False])
@pytest.mark.parametrize("first", [False, True], ids=["after", "first"])
def test_values_beyond_int32(first: bool, innermost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in memory, some 17 GB: the first and the last image give what they give alone. Pooling's kernels too."""
    monkeypatch.undo()
    layout = torch.channels_last if innermost else torch.contiguous_format
    arguments = (5, SCALE, BETA, K, 2)
    x = torch.empty(MANY, dtype=torch.bfloat16, device=DEVICE, memory_format=layout).normal_()
    y, place = kernel.forward(x, None, True, *arguments, PAPER, False, first, True)
    grad = torch.empty_like(y).normal_()
    dx, _ = kernel.backward(grad, x, None, place, True, *arguments, PAPER, first, False)
    for image in (slice(0, 1), slice(-1, None)):
        alone, own, slope = (laid_out(t[image].clone(), innermost) for t in (x, place, grad))
        expected, taken = kernel.forward(alone, None, True, *arguments, PAPER, False, first, True)
        agree = (taken == own).float().mean()  # another division of the work may round another way, and two values tie
        assert agree > 0.999
        torch.testing.assert_close(y[image], expected, rtol=2**-7, atol=0)
        by_x, _ = kernel.backward(slope, alone, None, own, True, *arguments, PAPER, first, False)
        torch.testing.assert_close(dx[image], by_x, rtol=2**-6, atol=2**-7)
