"""The C++ kernels against fp64 and against torch: values, gradients, ties, NaN, layouts, threads, instruction sets."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alexnet_kernels import _extension, reference, use_backend
from alexnet_kernels import functional as F

pytestmark = pytest.mark.skipif(_extension.why_not("cpu") is not None, reason=str(_extension.why_not("cpu")))
OPS = torch.ops.alexnet_kernels_cpu
ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
PAPER = (3, 3, 2, 2, 0, 0, 1, 1)
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


@st.composite
def tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """[N, C, H, W] in either layout and any dtype, and a number of groups that divides C."""
    groups = draw(st.integers(1, 3))
    shape = (
        draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 19)),
        draw(st.integers(1, 17)),
        draw(st.integers(1, 17)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 3.0, 60.0]))
    return x.to(draw(st.sampled_from(DTYPES))).contiguous(memory_format=draw(st.sampled_from(LAYOUTS))), groups


COEFFICIENTS = st.tuples(
    st.sampled_from([1, 2, 3, 4, 5, 5, 5, 8, 60]),
    st.sampled_from([1e-4, 0.1]),
    st.sampled_from([0.75, 0.75, 0.5, 1.0, 0.6]),
    st.sampled_from([1.0, 2.0]),
)


@st.composite
def windows(draw: st.DrawFn) -> tuple[int, ...]:
    if draw(st.booleans()):
        return PAPER
    kernel, small, dilation = st.integers(1, 4), st.integers(1, 3), st.integers(1, 2)
    kh, kw = draw(kernel), draw(kernel)
    padding = (draw(st.integers(0, kh // 2)), draw(st.integers(0, kw // 2)))
    return (kh, kw, draw(small), draw(small), *padding, draw(dilation), draw(dilation))


def layout_of(x: torch.Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def like(x: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
    """Random, of x's dtype and layout."""
    return torch.randn(shape or x.shape).to(x.dtype).contiguous(memory_format=layout_of(x))


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def check(got: torch.Tensor, exact: torch.Tensor, torchs: torch.Tensor, terms: torch.Tensor | None = None) -> None:
    """At most 1.5 times the error of torch's arithmetic in fp32, rounded to the dtype (fp64: a few roundings).

    ``terms``: what a gradient is the difference of. Where it nearly cancels, a rounding of the terms is all that is left.
    """
    floor = 1e-7 if got.dtype != torch.float64 else 4e-16  # where torch happens to be exact
    if terms is not None:
        floor *= max(1.0, float(terms.double().norm() / exact.norm().clamp_min(1e-300)))
    assert error(got, exact) <= max(1.5 * error(torchs.detach().to(got.dtype), exact), 2 * floor)


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(reference.arithmetic_dtype(x.dtype))


def torchs_lrn(x: torch.Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> torch.Tensor:
    return torch.cat([TF.local_response_norm(part, size, scale * size, beta, k) for part in x.chunk(groups, 1)], 1)


@settings(deadline=None, max_examples=60)
@given(tensors(), COEFFICIENTS)
def test_lrn(given_x: tuple[torch.Tensor, int], coefficients: tuple[int, float, float, float]) -> None:
    x, groups = given_x
    grad = like(x)
    y = OPS.lrn(x, *coefficients, groups)
    dx = OPS.lrn_backward(grad, x, *coefficients, groups)
    assert y.stride() == torch.empty_like(x).stride() == dx.stride()
    leaf = wide(x).clone().requires_grad_()
    torchs = torchs_lrn(leaf, *coefficients, groups)
    (torchs_dx,) = torch.autograd.grad(torchs, leaf, wide(grad))
    check(y, reference.lrn(x.double(), *coefficients, groups), torchs)
    check(dx, reference.lrn_backward(grad.double(), x.double(), *coefficients, groups), torchs_dx, grad)


def pooled(x: torch.Tensor, window: tuple[int, ...], ceil: bool) -> tuple[torch.Tensor, torch.Tensor]:
    kh, kw, sh, sw, ph, pw, dh, dw = window
    try:
        return TF.max_pool2d(x, (kh, kw), (sh, sw), (ph, pw), (dh, dw), ceil, return_indices=True)
    except RuntimeError:
        assume(False)
        raise


def indices(place: torch.Tensor, window: tuple[int, ...], width: int) -> torch.Tensor:
    """torch's flat positions from the taps."""
    _, kw, sh, sw, ph, pw, dh, dw = window
    rows = torch.arange(place.shape[2])[:, None] * sh - ph + place.long() // kw * dh
    return rows * width + torch.arange(place.shape[3]) * sw - pw + place.long() % kw * dw


def every_window_sees_the_picture(x: torch.Tensor, y: torch.Tensor, window: tuple[int, ...]) -> bool:
    """Not so for a dilated window over a very small picture, where torch's index points beside it."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (window[i : i + 2] for i in (0, 2, 4, 6))
    axes = zip(x.shape[2:], y.shape[2:], (kh, kw), (sh, sw), (ph, pw), (dh, dw), strict=True)
    return all(any(0 <= o * s - p + t * d < n for t in range(k)) for n, m, k, s, p, d in axes for o in range(m))


@settings(deadline=None, max_examples=100)
@given(tensors(), windows(), st.booleans(), st.sampled_from(["plain", "ties", "minus infinity", "nan"]))
def test_pooling_is_torchs(given_x: tuple[torch.Tensor, int], window: tuple[int, ...], ceil: bool, kind: str) -> None:
    x, _ = given_x
    if kind == "ties":
        x = x.clamp(-1, 1).round()
    if kind in ("minus infinity", "nan"):
        x = x.masked_fill(like(x) > 0.5, float("-inf"))
    if kind == "nan":
        x = x.masked_fill(like(x) > 1.5, float("nan"))
    expected, positions = pooled(x, window, ceil)
    assume(every_window_sees_the_picture(x, expected, window))
    y, place = OPS.max_pool2d(x, window, ceil, True)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices(place, window, x.shape[3]), positions)
    assert OPS.max_pool2d(x, window, ceil, False)[1].shape == (0,)
    grad = like(x, y.shape)
    place = place.contiguous(memory_format=layout_of(grad))
    dx = OPS.max_pool2d_backward(grad, place, x.shape[2], x.shape[3], window)
    torch.testing.assert_close(dx, scattered(wide(grad), positions, x).to(x.dtype))


def scattered(grad: torch.Tensor, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    flat = torch.zeros(*x.shape[:2], x.shape[2] * x.shape[3], dtype=grad.dtype)
    return flat.scatter_add_(2, positions.flatten(2), grad.flatten(2)).view(x.shape)


@settings(deadline=None, max_examples=60)
@given(tensors(), COEFFICIENTS, windows(), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_fused_is_the_parts_in_one(
    given_x: tuple[torch.Tensor, int],
    coefficients: tuple[int, float, float, float],
    window: tuple[int, ...],
    ceil: bool,
    relu: bool,
    with_bias: bool,
    pool_first: bool,
) -> None:
    """Forward bit for bit; backward within the tolerance, with the bias gradient."""
    x, groups = given_x
    bias = torch.randn(x.shape[1]).to(x.dtype) if with_bias else None
    a = x if bias is None else x + bias[:, None, None]
    a = (a.relu() if relu else a).contiguous(memory_format=layout_of(x))
    before = a if pool_first else OPS.lrn(a, *coefficients, groups)
    expected, positions = pooled(before, window, ceil)
    assume(every_window_sees_the_picture(x, expected, window))
    if pool_first:
        expected = OPS.lrn(expected, *coefficients, groups)
    y, place = OPS.lrn_pool(x, bias, relu, *coefficients, groups, window, ceil, pool_first, True)
    assert torch.equal(y, expected)
    assert torch.equal(indices(place, window, x.shape[3]), positions)
    grad = like(x, y.shape)
    place = place.contiguous(memory_format=layout_of(grad))

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        g, z = grad.to(dtype), a.to(dtype)
        if pool_first:
            maxima = z.flatten(2).gather(2, positions.flatten(2)).view(y.shape)
            dx = scattered(reference.lrn_backward(g, maxima, *coefficients, groups), positions, x)
        else:
            dx = reference.lrn_backward(scattered(g, positions, x), z, *coefficients, groups)
        return dx * (a > 0) if relu else dx

    arguments = (x, bias, place, relu, *coefficients, groups, window, pool_first)
    dx, dbias = OPS.lrn_pool_backward(grad, *arguments, True)
    exact = gradient(torch.float64)
    check(dx, exact, gradient(wide(x).dtype), grad)
    terms = exact.abs().sum((0, 2, 3)) + grad.double().abs().sum((0, 2, 3)).max()
    assert bool(((dbias.double() - exact.sum((0, 2, 3))).abs() <= 4 * torch.finfo(x.dtype).eps * terms).all())
    assert OPS.lrn_pool_backward(grad, *arguments, False)[1].shape == (0,)


VIEWS = {
    "slice": lambda x: x[:, :, 1:, ::2],
    "some channels": lambda x: x[:, 1:],  # starts anywhere, at no multiple of 16 bytes
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "flipped dimensions": lambda x: x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
    "batch inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}
WHOLE = {
    "lrn": (F.local_response_norm, lambda x, *norm: torchs_lrn(x, *norm, 1)),
    "pool": (lambda x, *_: F.max_pool2d(x, 3, 2), lambda x, *_: TF.max_pool2d(x, 3, 2)),
    "lrn then pool": (F.lrn_max_pool2d, lambda x, *norm: TF.max_pool2d(torchs_lrn(x, *norm, 1), 3, 2)),
    "pool then lrn": (F.max_pool2d_lrn, lambda x, *norm: torchs_lrn(TF.max_pool2d(x, 3, 2), *norm, 1)),
}


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.sampled_from(sorted(WHOLE)), st.sampled_from(sorted(VIEWS)), tensors())
def test_any_strides(name: str, view: str, given_x: tuple[torch.Tensor, int]) -> None:
    """As a user calls them: the result and the gradient by a tensor that lies in memory in any way."""
    base = given_x[0]
    assume(base.shape[1] > 1 and min(base.shape[2:]) >= 6)
    # a maximum is chosen among rounded values: in bf16 many tie, and fp64, which the gradient is held to, tells them apart
    assume(name != "lrn then pool" or base.dtype != torch.bfloat16)
    ours, torchs = WHOLE[name]
    x = VIEWS[view](base)
    results = []
    for call, dtype in ((ours, x.dtype), (torchs, reference.arithmetic_dtype(x.dtype)), (torchs, torch.float64)):
        leaf = VIEWS[view](base).to(dtype).detach().requires_grad_()
        with use_backend("cpu"):
            coefficients = (5, 0.1 * (5 if call is ours else 1), 0.75, 2.0)
            y = call(leaf, *coefficients)
            weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(x.dtype).to(dtype)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, weights)))
    for got, torchs_result, exact in zip(*results, strict=True):
        check(got, exact.double(), torchs_result)


def test_infinity_and_nan_go_where_torchs_do() -> None:
    x = torch.randn(1, 12, 2, 3)
    x[0, 3, 0, 0], x[0, 7, 1, 1] = float("inf"), float("nan")
    for layout in LAYOUTS:
        y = OPS.lrn(x.contiguous(memory_format=layout), 5, 0.1, 0.75, 1.0, 1)
        torch.testing.assert_close(y, TF.local_response_norm(x, 5, 0.5, 0.75, 1.0), equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("magnitude", [3e-14, 1e13, 1e15, 1e18])
def test_the_whole_range_of_fp32(magnitude: float, layout: torch.memory_format) -> None:
    """Whatever is made of s on the way to its power stays a number, for the smallest and the largest s too."""
    x = (torch.randn(2, 12, 3, 5).clamp(-3, 3) * magnitude).contiguous(memory_format=layout)
    grad, arguments = like(x), (5, 0.1, 0.75, 0.0, 2)
    check(OPS.lrn(x, *arguments), *(reference.lrn(t, *arguments) for t in (x.double(), x)))
    dx = OPS.lrn_backward(grad, x, *arguments)
    # without k, the gradient of a group is orthogonal to it: its terms cancel in part
    direct = grad.double() * reference.lrn(x.double(), *arguments) / x.double()
    check(dx, *(reference.lrn_backward(grad.to(t.dtype), t, *arguments) for t in (x.double(), x)), direct)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (2, 6, 2, 3, 4)])
def test_lrn_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(OPS.lrn(x, 5, 0.1, 0.75, 1.0, 2), reference.lrn(x, 5, 0.1, 0.75, 1.0, 2))


def all_results(dtype: torch.dtype, layout: torch.memory_format) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = (torch.randn(5, 96, 27, 29) * 3).to(dtype).contiguous(memory_format=layout)
    bias, found = torch.randn(96).to(dtype), []
    for beta in (0.75, 0.6):
        found += [OPS.lrn(x, 5, 0.1, beta, 2.0, 2), OPS.lrn_backward(x, x, 5, 0.1, beta, 2.0, 2)]
    for pool_first in (False, True):
        y, place = OPS.lrn_pool(x, bias, True, 5, 0.1, 0.75, 2.0, 2, PAPER, False, pool_first, True)
        arguments = (x, bias, place, True, 5, 0.1, 0.75, 2.0, 2, PAPER, pool_first, True)
        found += [y, place, *OPS.lrn_pool_backward(y, *arguments)]
    y, place = OPS.max_pool2d(x, PAPER, False, True)
    return [*found, y, place, OPS.max_pool2d_backward(y, place, 27, 29, PAPER)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(all_results(dtype, layout))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_instruction_set_changes_no_bit() -> None:
    """The baseline in a process of its own, against whatever runs here."""
    code = (
        "import sys, torch, test_cpu_kernels as t; assert t.OPS.simd_level() == 0\n"
        "torch.save([t.all_results(d, l) for d in t.DTYPES for l in t.LAYOUTS], sys.stdout.buffer)"
    )
    environment = {**os.environ, "ALEXNET_KERNELS_SIMD": "baseline", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    baseline = torch.load(io.BytesIO(done.stdout))
    here = [all_results(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
    for a, b in zip(baseline, here, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_what_no_kernel_may_be_given_is_refused() -> None:
    x = torch.randn(1, 4, 5, 5)
    with pytest.raises(RuntimeError, match="float32, float64 or bfloat16"):
        OPS.lrn(x.half(), 5, 0.1, 0.75, 1.0, 1)
    with pytest.raises(RuntimeError, match="groups must divide C"):
        OPS.lrn(x, 5, 0.1, 0.75, 1.0, 3)
    with pytest.raises(RuntimeError, match="shape, dtype and layout"):
        OPS.lrn_backward(x[:, :2], x, 5, 0.1, 0.75, 1.0, 1)
    with pytest.raises(RuntimeError, match="area at most 256"):
        OPS.max_pool2d(x, (17, 17, 1, 1, 0, 0, 1, 1), False, True)
    with pytest.raises(RuntimeError, match="does not fit"):
        OPS.max_pool2d(x, (7, 7, 1, 1, 0, 0, 1, 1), False, True)


def driver(source: str, target: Path, *flags: str) -> Path:
    """The kernels and a program of C++ that calls them, without torch."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH")
    sources = [str(ROOT / "csrc/lrn_pool_cpu.cpp"), str(ROOT / "tests/cpu" / source)]
    warnings = ["-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all"]
    command = [compiler, *FLAGS, *warnings, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target


def test_offsets_beyond_int32(tmp_path: Path) -> None:
    """The end of tensors of more than 2^31 elements, by images and inside one image; most of their pages never exist."""
    program = driver("beyond_driver.cpp", tmp_path / "beyond", "-O0", "-fsanitize=undefined")
    done = subprocess.run([program], capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stdout)
    assert (done.returncode, done.stdout) == (0, "ok 64\n"), done.stdout + done.stderr


@pytest.mark.slow
def test_under_sanitizers(tmp_path: Path) -> None:
    """Odd shapes, buffers of the exact size, every instruction set of this machine, tasks divided in several ways."""
    program = driver("kernels_driver.cpp", tmp_path / "driver", "-fsanitize=address,undefined", "-g")
    done = subprocess.run([program, "2000"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("ok 0"), done.stdout + done.stderr
