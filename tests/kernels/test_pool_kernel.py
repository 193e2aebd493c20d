"""The Triton max pool against torch, value for value and place for place, in the interpreter or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nowhere import addresses
from torch import Tensor

from alexnet_kernels.kernels import _launch
from alexnet_kernels.kernels import pool as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PAPER = (3, 3, 2, 2, 0, 0, 1, 1)
VALUES = [-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, float("inf"), -float("inf"), float("nan")]  # few: ties are the rule


def laid_out(x: Tensor, innermost: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if innermost else torch.contiguous_format)


def expected(x: Tensor, window: tuple[int, ...], ceil_mode: bool) -> tuple[Tensor, Tensor, Tensor]:
    """torch's pooled map, its flat positions, and the tap of each of them."""
    kh, kw, sh, sw, ph, pw, dh, dw = window
    y, at = F.max_pool2d(x.float(), (kh, kw), (sh, sw), (ph, pw), (dh, dw), ceil_mode, return_indices=True)
    top = (torch.arange(y.shape[2], device=x.device) * sh - ph)[:, None]
    side = torch.arange(y.shape[3], device=x.device) * sw - pw
    return y.to(x.dtype), at, (at // x.shape[3] - top) // dh * kw + (at % x.shape[3] - side) // dw


def check(x: Tensor, window: tuple[int, ...], ceil_mode: bool) -> None:
    """Exact: pooling adds nothing, and the gradient adds small integers."""
    y, at, tap = expected(x, window, ceil_mode)
    value, place = kernel.forward(x, window, ceil_mode, True)
    alone, nothing = kernel.forward(x, window, ceil_mode, False)
    assert (value.dtype, place.dtype, nothing.shape) == (x.dtype, torch.uint8, (0,))
    assert value.is_contiguous(memory_format=kernel.layout_of(x)) and place.stride() == value.stride()
    torch.testing.assert_close(value, y, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(alone, y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(place.long(), tap)
    grad = torch.randint(-4, 5, y.shape, device=x.device).to(x.dtype)
    grad = grad.contiguous(memory_format=kernel.layout_of(x))
    dx = kernel.backward(grad, place, x.shape[2], x.shape[3], window)
    scattered = torch.zeros(*x.shape[:2], x.shape[2] * x.shape[3], device=x.device)
    scattered.scatter_add_(2, at.flatten(2), grad.float().flatten(2))
    assert dx.dtype == x.dtype and dx.is_contiguous(memory_format=kernel.layout_of(grad))  # one pixel is both
    assert torch.equal(dx.float(), scattered.view(x.shape))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results start as 77, which no test expects, so that an element that no program writes shows."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **kw: real(*a, **kw).fill_(77))


@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize(
    ("shape", "window", "ceil_mode"),
    [
        ((2, 16, 13, 11), PAPER, False),
        ((1, 24, 8, 10), PAPER, True),  # the last windows hang over the edge
        ((1, 8, 6, 7), (3, 3, 1, 1, 1, 1, 1, 1), False),
        ((1, 4, 9, 8), (2, 3, 2, 2, 1, 1, 1, 3), False),  # dilated
        ((1, 8, 7, 6), (2, 2, 3, 3, 0, 0, 1, 1), False),  # pixels that no window holds
        ((1, 3, 9, 9), (6, 6, 3, 2, 3, 3, 1, 1), True),  # more taps than are unrolled
        ((1, 16, 5, 4), (5, 4, 1, 1, 0, 0, 1, 1), False),  # one window
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_is_torchs(
    shape: tuple[int, ...], window: tuple[int, ...], ceil_mode: bool, innermost: bool, dtype: torch.dtype
) -> None:
    x = torch.tensor(VALUES)[torch.randint(len(VALUES), shape)].to(DEVICE, dtype)
    x[:, 0] = -float("inf")
    check(laid_out(x, innermost), window, ceil_mode)


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """A window and a map that it fits."""
    kernel_size = [draw(st.integers(1, 4)) for _ in range(2)]
    stride = [draw(st.integers(1, 4)) for _ in range(2)]
    padding = [draw(st.integers(0, k // 2)) for k in kernel_size]
    dilation = [draw(st.sampled_from([1, 1, 2])) for _ in range(2)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    sides = [draw(st.integers(r, 9)) for r in reach]
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 8])), *sides)
    return shape, (*kernel_size, *stride, *padding, *dilation), draw(st.booleans())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(windows(), st.booleans(), st.sampled_from([torch.float32, torch.float16]), st.integers(0, 99))
def test_any_window_is_torchs(
    case: tuple[tuple[int, ...], tuple[int, ...], bool], innermost: bool, dtype: torch.dtype, seed: int
) -> None:
    shape, window, ceil_mode = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.tensor(VALUES)[torch.randint(len(VALUES), shape, generator=generator)].to(DEVICE, dtype)
    check(laid_out(x, innermost), window, ceil_mode)


def test_what_it_does_not_take() -> None:
    x = torch.empty(1, 1, 32, 32)
    assert kernel.supports(x, PAPER) is None
    assert kernel.supports(x, (16, 16, 1, 1, 0, 0, 1, 1)) is None
    assert "kernel area 16x17 > 256" in str(kernel.supports(x, (16, 17, 1, 1, 0, 0, 1, 1)))
    assert "not torch.float64" in str(kernel.supports(x.double(), PAPER))


MANY, HUGE = (8192, 96, 55, 55), (1, 96, 4800, 4801)  # by images, and inside one image


@pytest.mark.skipif(not INTERPRETED, reason="records the addresses that the interpreter forms")
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize("shape", [MANY, HUGE], ids=["many", "huge"])
@pytest.mark.parametrize("window", [PAPER, (3, 3, 2, 2, 0, 0, 2, 2)], ids=["cell", "general"])
def test_addresses_beyond_int32(
    window: tuple[int, ...], shape: tuple[int, ...], innermost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program of each kernel touches the end of its tensors, and reads the windows of what it writes, no more."""
    monkeypatch.undo()
    x = laid_out(torch.empty(shape, dtype=torch.bfloat16, device="meta"), innermost)
    y = laid_out(torch.empty(kernel.output_shape(x, window, False), dtype=torch.bfloat16, device="meta"), innermost)
    place = torch.empty_like(y, dtype=torch.uint8)
    channels, height, width = shape[1:]
    rows, columns = y.shape[2:]
    step = channels if innermost else 1

    def taps(e: int) -> set[int]:
        """The elements of x in the window of element e of y."""
        pixel, c = divmod(e, step)
        plane, o = divmod(pixel, rows * columns)
        r, s = o // columns * 2, o % columns * 2
        d = window[6]
        return {
            (plane * height * width + (r + i * d) * width + s + j * d) * step + c for i in range(3) for j in range(3)
        }

    forward = kernel.plan_forward(x, None, y, place, window)
    reads, _, written, places = addresses(forward, forward.grid[0] - 1, monkeypatch)
    assert written == places == set(range(min(written), y.numel()))
    assert reads == set().union(*map(taps, written))
    backward = kernel.plan_backward(y, place, x, window)
    taken, asked, written = addresses(backward, backward.grid[0] - 1, monkeypatch)
    assert max(written) == x.numel() - 1 and min(written) > 2**31
    assert backward.name == ("cell_backward" if window == PAPER else "general_backward")
    assert all(taps(e) & written for e in asked)
    if window == PAPER:
        assert taken == asked and max(asked) == y.numel() - 1
    else:  # a gradient is read only where the place is right, and here all places read 0; no window holds an odd row
        assert taken <= asked and (asked or shape is HUGE)


def test_flat_indices_are_int64_when_they_must_be() -> None:
    import triton.language as tl

    assert _launch.plane_index(1000, 100, 2**27, 128) == tl.int32
    assert _launch.plane_index(1000, 100, 2**30, 128) == tl.int64  # a block reaches over several planes
    assert _launch.plane_index(2**31, 100, 100, 128) == tl.int64
