"""Bias, ReLU, dropout and their gradient against torch in fp64: every form, in the interpreter or on a GPU, and compiled."""

from __future__ import annotations

import os
import re

import pytest
import torch
from cross_compile import Compiled, compile_shipped
from nowhere import addresses
from torch import Tensor

from alexnet_kernels.kernels import activation as kernel
from alexnet_kernels.kernels._launch import handle_key

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of rounding a result
# shape, channels_last, the kernel that runs
CASES = [
    ((70, 96), False, "rows"),
    ((3, 1000), False, "rows"),  # no divisor of 32 or more
    ((1, 5), False, "rows"),
    ((2, 96, 7, 5), True, "rows"),
    ((2, 10, 3, 3), True, "rows"),
    ((300, 4, 1, 1), False, "rows"),  # one pixel is both layouts
    ((2, 20, 13, 13), False, "planes"),
    ((3, 5, 27, 27), False, "planes"),
    ((2, 6, 1025), False, "planes"),
    ((1, 3, 40, 41), False, "planes"),  # a program takes two planes, and two steps of each
]


def name(value: object) -> str:
    return "-".join(map(str, value)).replace(" ", "") if isinstance(value, tuple) else str(value).removeprefix("torch.")


def tensor(shape: tuple[int, ...], last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results start as NaN, so that an element that no program writes shows."""
    monkeypatch.setattr(torch, "empty_like", lambda t, **kw: torch.full_like(t, float("nan"), **kw))
    empty = torch.empty
    fill = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: fill(empty(*a, **kw)))


def over_channels(t: Tensor) -> tuple[int, ...]:
    return tuple(d for d in range(t.dim()) if d != 1)


def masked(grad: Tensor, y: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    d = torch.where(y.double() <= 0, 0.0, grad.double() * scale)
    return d, d.sum(over_channels(d))


@pytest.mark.parametrize("dtype", EPS, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_gradient(case: tuple[tuple[int, ...], bool, str], dtype: torch.dtype) -> None:
    shape, last, form = case
    y, grad = tensor(shape, last, dtype).relu(), tensor(shape, last, dtype)
    assert kernel.plan_backward(grad, y, y, 1.0, True)[0].name == f"{form}_backward"
    dz, db = kernel.backward(grad, y, True)
    exact, exact_sum = masked(grad, y)
    assert (dz.dtype, dz.shape, dz.stride()) == (dtype, y.shape, y.stride())
    assert torch.equal(dz.double(), exact)  # a value of the dtype, or 0
    # n fp32 additions, each of at most eps of the sum of magnitudes; then one rounding
    bound = exact.abs().sum(over_channels(exact)) * 2.0**-23 * (y.numel() // shape[1]) + exact_sum.abs() * EPS[dtype]
    assert db is not None and db.dtype == dtype and bool(((db.double() - exact_sum).abs() <= bound).all())
    again, nothing = kernel.backward(grad, y, False)
    assert nothing is None and torch.equal(again, dz)
    assert all(torch.equal(db, kernel.backward(grad, y, True)[1]) for _ in range(2))


@pytest.mark.parametrize("case", CASES[::3], ids=name)
def test_sums_of_integers_are_exact(case: tuple[tuple[int, ...], bool, str]) -> None:
    shape, last, _ = case
    y, grad = tensor(shape, last).relu(), tensor(shape, last).mul(8).round()
    dz, db = kernel.backward(grad, y, True, 2.0)
    exact, exact_sum = masked(grad, y, 2.0)
    assert torch.equal(dz.double(), exact) and torch.equal(db.double(), exact_sum)


@pytest.mark.parametrize(("shape", "last"), [((40, 64), False), ((2, 32, 3, 5), True), ((2, 4, 3, 5), False)])
def test_several_tiles_to_a_program(shape: tuple[int, ...], last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the large maps of the network, but small: few programs, low tiles, an end that nothing divides."""
    monkeypatch.setattr(kernel, "_PROGRAMS", 3)
    monkeypatch.setattr(kernel, "CONFIGS", {n: kernel.Config(block=256) for n in kernel.CONFIGS})
    y, grad = tensor(shape, last).relu(), tensor(shape, last).mul(8).round()
    if kernel._in_rows(y):
        assert kernel.plan_backward(grad, y, y, 1.0, True)[0].args[6] > 1
    dz, db = kernel.backward(grad, y, True)
    exact, exact_sum = masked(grad, y)
    assert torch.equal(dz.double(), exact) and torch.equal(db.double(), exact_sum)


def test_a_few_images_more_are_no_other_kernel() -> None:
    """What Triton compiles by is the same for every batch large enough to fill the programs."""
    kinds = set()
    for images in (65, 129, 257):
        y = torch.empty((images, 96, 55, 55), dtype=torch.bfloat16, device="meta")
        y = y.contiguous(memory_format=torch.channels_last)
        launch, _ = kernel.plan_backward(y, y, y, 1.0, True)
        kinds.add(handle_key(launch))
    assert len(kinds) == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns of every NaN
@pytest.mark.parametrize("last", [False, True])
def test_nan_inf_and_the_kink_as_torch(last: bool) -> None:
    y, grad = tensor((2, 32, 3, 3), last).relu(), tensor((2, 32, 3, 3), last)
    for place, value in enumerate((float("nan"), float("inf"), 0.0, -0.0)):
        y[0, place, 1, 1] = value
        grad[1, place, 2, 0] = value
        grad[0, place, 1, 1] = float("nan")
    dz, db = kernel.backward(grad, y, True)
    expected = torch.ops.aten.threshold_backward(grad, y, 0)
    torch.testing.assert_close(dz, expected, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(db, expected.sum((0, 2, 3)), equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", EPS, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_forward(case: tuple[tuple[int, ...], bool, str], dtype: torch.dtype) -> None:
    shape, last, form = case
    x, bias = tensor(shape, last, dtype), torch.randn(shape[1]).to(DEVICE, dtype)
    wide = bias.view(1, -1, *[1] * (len(shape) - 2)).double()
    assert kernel.plan_forward(x, bias, x, True).name == f"{form}_forward"
    for add, relu in ((bias, True), (bias, False), (None, True)):
        exact = x.double() + (0 if add is None else wide)
        exact = exact.relu() if relu else exact
        y = kernel.bias_relu(x, add, relu)
        assert (y.dtype, y.stride()) == (dtype, x.stride())
        assert bool(((y.double() - exact).abs() <= EPS[dtype] * exact.abs()).all())
        assert add is not None or torch.equal(y, x.relu())
        inplace = x.clone()
        assert kernel.bias_relu(inplace, add, relu, inplace=True) is inplace and torch.equal(inplace, y)


def test_any_strides() -> None:
    """Copied once where neither layout fits; the gradient follows the result's layout."""
    y, grad = tensor((2, 32, 6, 6), True).relu(), tensor((2, 32, 6, 6), False)
    assert kernel.backward(grad, y, False)[0].is_contiguous(memory_format=torch.channels_last)
    for view in (y[:, 3:9, 1:5], y[:1].expand(3, 32, 6, 6), y.transpose(2, 3)[:, ::2]):
        g = torch.randn(view.shape, device=DEVICE)
        dz, db = kernel.backward(g, view, True)
        exact, exact_sum = masked(g, view)
        assert torch.equal(dz.double(), exact)
        torch.testing.assert_close(db.double(), exact_sum, rtol=1e-5, atol=1e-5)
        assert torch.equal(kernel.bias_relu(view, None, True), view.relu())
    with pytest.raises(ValueError, match=r"x with shape \(2, 6, 4, 6\).*is not dense; pass inplace=False"):
        kernel.bias_relu(y[:, 3:9, 1:5], None, True, inplace=True)


@pytest.mark.parametrize("last", [False, True])
def test_a_bias_with_gaps(last: bool) -> None:
    x, bias = tensor((2, 16, 3, 5), last), torch.randn(32, device=DEVICE)[::2]
    expected = kernel.bias_relu(x, bias.contiguous(), True)
    assert torch.equal(kernel.bias_relu(x, bias, True), expected) and bool((expected > 0).any())


@pytest.mark.parametrize("shape", [(0, 16), (0, 16, 3, 5), (2, 16, 0, 5)], ids=name)
def test_empty(shape: tuple[int, ...]) -> None:
    x = tensor(shape, False)
    dz, db = kernel.backward(x, x, True)
    assert dz.shape == shape and torch.equal(db, torch.zeros(16, device=DEVICE))
    assert kernel.bias_relu(x, torch.zeros(16, device=DEVICE), True).shape == shape


# --------------------------------------------------------------------------------------------------------------- dropout


def seed(value: int) -> Tensor:
    return torch.tensor([value], device=DEVICE)


@pytest.mark.parametrize("dtype", EPS, ids=name)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_as_many_and_scales(p: float, dtype: torch.dtype) -> None:
    x = torch.rand(37, 111).add(0.5).to(DEVICE, dtype)
    y = kernel.dropout(x, seed(3), p)
    kept = y != 0
    exact = torch.where(kept, x.double() / (1 - p), 0)
    # the factor is rounded to fp32, the result to its dtype
    assert bool(((y.double() - exact).abs() <= (EPS[dtype] + 2.0**-24) * exact).all())
    count, n = int(kept.sum()), x.numel()
    assert abs(count - n * (1 - p)) <= 5 * (n * p * (1 - p)) ** 0.5  # binomial: five standard deviations


def test_dropout_depends_on_the_seed_alone() -> None:
    x = torch.ones(3, 1000, device=DEVICE)
    one, again, other = (kernel.dropout(x, seed(s), 0.5) for s in (2**40 + 1, 2**40 + 1, 1))
    assert (
        torch.equal(one, again) and 0.4 < float((one == other).float().mean()) < 0.6
    )  # the seed's upper half counts too
    assert torch.equal(kernel.dropout(x[:2].contiguous(), seed(1), 0.5), other[:2])
    inplace = x.clone()
    assert kernel.dropout(inplace, seed(1), 0.5, inplace=True) is inplace and torch.equal(inplace, other)
    neighbours = (one.flatten()[1:] == one.flatten()[:-1]).float().mean()
    assert abs(float(neighbours) - 0.5) < 5 * 0.5 / 3000**0.5


def test_the_result_of_dropout_is_the_mask_of_relu_and_dropout() -> None:
    """Through torch's autograd with the same mask."""
    z = torch.randn(40, 96, device=DEVICE, requires_grad=True)
    grad = torch.randn(40, 96, device=DEVICE)
    d = kernel.dropout(z.detach().relu(), seed(5), 0.5)
    kept = kernel.dropout(torch.ones_like(d), seed(5), 0.5)
    dz, _ = kernel.backward(grad, d, True, 2.0)
    assert torch.equal(dz, torch.autograd.grad(z.relu() * kept, z, grad)[0])


# ------------------------------------------------------------------------------------------- more than 2^31 elements


@pytest.mark.skipif(not INTERPRETED, reason="records the addresses that the interpreter forms")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("last", [False, True])
def test_addresses_beyond_int32(last: bool, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program touches just what it should in a tensor of 2^31 elements and more, without that tensor."""
    x = torch.empty((8193, 96, 55, 55), dtype=torch.bfloat16, device="meta")
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    bias = torch.empty(96, dtype=torch.bfloat16, device="meta")
    launch = kernel.plan_backward(x, x, x, 1.0, False)[0] if backward else kernel.plan_forward(x, bias, x, True)
    touched = addresses(launch, launch.grid[0] - 1, monkeypatch)
    first, second = touched[:2] if backward else touched[::2]
    assert first == second and min(first) > 2**31
    if last:  # the first 32 channels of the rows that are left
        rows = x.numel() // 96
        begin = (launch.grid[0] - 1) * launch.constants["ROWS"]
        width = launch.constants["COLUMNS"]
        assert first == {r * 96 + c for r in range(begin, rows) for c in range(width)}
    else:  # all pixels, forward a block of them, of the planes that are left
        planes, plane = 8193 * 96, 3025
        begin = (launch.grid[0] - 1) * launch.constants["PLANES"]
        pixels = plane if backward else launch.constants["BLOCK"]
        assert first == {p * plane + i for p in range(begin, planes) for i in range(pixels)}


# --------------------------------------------------------------------------------------------------------- compiled

ACTIVATION = "alexnet_kernels.kernels.activation"
# registers, a little above what docs/kernels/linear.md states
REGISTERS = {
    "rows_forward": 64,
    "rows_backward": 120,
    "planes_forward": 64,
    "planes_backward": 64,
    "sums": 64,
    "dropout": 64,
}


def fits(compiled: Compiled) -> None:
    assert compiled.spill_bytes == 0, compiled
    assert compiled.count("STL") == compiled.count("LDL") == 0, compiled
    assert compiled.shared_bytes <= 16_384, compiled  # only what turns the sums
    if compiled.kernel.startswith("rows"):  # 16 bytes a thread, whatever the type
        assert compiled.opcodes["LDG.E.128"] and compiled.opcodes["STG.E.128"], compiled


def test_on_sm_90() -> None:
    """conv3's map and fc6's rows in bf16, in one process."""
    compiled = compile_shipped(
        ACTIVATION, 90, r"bfloat16 .* 256x384x13x13( bias)?$|^(rows_backward|dropout) bfloat16 .* 256x4096"
    )
    assert {c.kernel for c in compiled.values()} == set(REGISTERS)
    for one in compiled.values():
        fits(one)
        assert one.registers <= REGISTERS[one.kernel], one


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_everywhere(arch: int) -> None:
    compiled = compile_shipped(ACTIVATION, arch)
    assert len(compiled) > 60 and any(re.search("8192", label) for label in compiled)
    for one in compiled.values():
        fits(one)
