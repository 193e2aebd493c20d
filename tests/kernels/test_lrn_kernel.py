"""The Triton response normalisation against the reference in fp64: every form, in the interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nowhere import addresses
from torch import Tensor

from alexnet_kernels import reference
from alexnet_kernels.kernels import _launch
from alexnet_kernels.kernels import lrn as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if DEVICE == "cpu" and not INTERPRETED:
    raise RuntimeError("without a GPU, tests/conftest.py must set TRITON_INTERPRET=1 before anything imports Triton")

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
APPROXIMATE = 2.0**-22  # two ulp of fp32: rsqrt.approx and sqrt.approx are allowed about one each
SCALE, K = 2e-2, 2.0  # the norm does something: s is between 2 and about 5

# form, shape, channels innermost, size, groups
CASES = [
    ("vector", (2, 16, 3, 5), True, 5, 1),
    ("vector", (2, 48, 7, 7), True, 5, 2),  # 588 vectors: neither block divides them
    ("vector", (1, 24, 4, 3), True, 5, 3),  # one vector a group: no neighbours at all
    ("vector", (3, 24, 1, 1), False, 5, 1),  # one pixel is both layouts
    ("vector", (5, 16, 1), False, 5, 2),
    ("vector", (1, 8, 2, 3, 2), True, 5, 1),
    ("ring", (2, 16, 3, 5), False, 5, 1),
    ("ring", (2, 48, 3, 3), False, 5, 2),  # each group takes three steps of 8 channels
    ("ring", (1, 5, 13, 11), False, 5, 1),  # 143 pixels: two blocks
    ("ring", (2, 6, 7), False, 5, 2),
    ("ring", (1, 2, 4), False, 5, 2),  # one channel a group
    ("ring", (1, 10, 2, 3, 2), False, 5, 1),
    ("general", (2, 5, 3, 5), True, 5, 1),
    ("general", (2, 6, 7, 7), True, 5, 2),  # 588 elements: neither block divides them
    ("general", (1, 16, 3, 5), False, 4, 2),
    ("general", (1, 16, 3, 5), True, 4, 2),
    ("general", (2, 6, 3, 5), False, 7, 1),
    ("general", (1, 6, 3, 5), True, 3, 1),
    ("general", (1, 24, 7), False, 2, 1),
    ("general", (1, 6, 2, 2), False, 1, 3),
    ("general", (1, 5, 3), False, 31, 1),  # wider than the channels
    ("general", (1, 6, 2, 1, 2), True, 12, 2),
]
ONE_OF_EACH = [CASES[1], CASES[7], CASES[13], CASES[14]]


def name(value: object) -> str:
    return "-".join(map(str, value)).replace(" ", "") if isinstance(value, tuple) else str(value).removeprefix("torch.")


def dense(x: Tensor, innermost: bool) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if innermost else x.contiguous()


def inputs(shape: tuple[int, ...], innermost: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, grad = (torch.randn(shape).mul(5).to(DEVICE, dtype) for _ in range(2))
    return dense(x, innermost), dense(grad, innermost)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results start as NaN, so that an element that no program writes shows."""
    monkeypatch.setattr(torch, "empty_like", lambda t, **kw: torch.full_like(t, float("nan"), **kw))


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """What rounding to ``dtype`` alone does to the relative error (L2), in all but about one draw of a million.

    An element's error is uniform within half a unit u in the last place either way: its square is u²/12 on average with a
    variance of u⁴/180, and u²/4 at most. The sum of many squares stays within five standard deviations of its mean.
    """
    squares = (EPS[dtype] * exact.abs().log2().floor().exp2()) ** 2
    bound = torch.minimum(squares.sum() / 12 + 5 * (squares.square().sum() / 180).sqrt(), squares.sum() / 4)
    return float(bound.sqrt() / exact.norm())


def check(x: Tensor, grad: Tensor, *args: Any, slack: float = APPROXIMATE) -> None:
    """Both directions: an error at most 1.5 times that of the reference in this dtype, and right element by element.

    The reference may have rounded a few elements by luck: what rounding alone may do is allowed in any case.
    """
    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (kernel.forward, reference.lrn, (x,)),
        (kernel.backward, reference.lrn_backward, (grad, x)),
    ]
    for ours, theirs, tensors in pairs:
        result = ours(*tensors, *args)
        exact = theirs(*(t.double() for t in tensors), *args)
        assert (result.dtype, result.shape, result.stride()) == (x.dtype, x.shape, x.stride())
        allowed = max(1.5 * relative(theirs(*tensors, *args), exact), rounding(exact, x.dtype))
        assert relative(result, exact) <= allowed + slack
        tolerance = EPS[x.dtype] + 8 * slack
        torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_form(case: tuple[str, tuple[int, ...], bool, int, int]) -> None:
    form, shape, innermost, size, groups = case
    x, grad = inputs(shape, innermost)
    assert kernel.plan((x, x), size, SCALE, 0.75, K, groups).name == f"{form}_forward"
    assert kernel.plan((grad, x, x), size, SCALE, 0.75, K, groups).name == f"{form}_backward"
    check(x, grad, size, SCALE, 0.75, K, groups)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=name)
def test_half_types(case: tuple[str, tuple[int, ...], bool, int, int], dtype: torch.dtype) -> None:
    _, shape, innermost, size, groups = case
    check(*inputs(shape, innermost, dtype), size, SCALE, 0.75, K, groups)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    groups, spatial = (
        data.draw(st.integers(1, 3)),
        tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))),
    )
    shape = (data.draw(st.integers(1, 3)), groups * data.draw(st.sampled_from([1, 2, 3, 7, 8, 16])), *spatial)
    innermost = len(spatial) > 1 and data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(list(EPS)))
    size, beta = data.draw(st.sampled_from([5, 5, 5, 1, 4, 9])), data.draw(st.sampled_from([0.75, 0.75, 0.5, 1.0]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    check(*inputs(shape, innermost, dtype), size, SCALE, beta, K, groups)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1, 0.6, 2.5])
@pytest.mark.parametrize("case", [CASES[0], CASES[9], CASES[12]], ids=name)
def test_powers(case: tuple[str, tuple[int, ...], bool, int, int], beta: float) -> None:
    _, shape, innermost, size, groups = case
    closed = beta in (0, 0.5, 1)
    # s < 8 here, so |log2 s| < 3; the gradient divides by s once more
    check(*inputs(shape, innermost), size, SCALE, beta, K, groups, slack=(1 if closed else 2 + 3 * beta) * APPROXIMATE)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns of every NaN
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=name)
@pytest.mark.parametrize(("beta", "k"), [(0.75, 2.0), (0.6, 2.0), (0.75, 0.0), (1.0, 0.0)])
def test_not_finite_where_the_reference_is_not(
    case: tuple[str, tuple[int, ...], bool, int, int], beta: float, k: float
) -> None:
    """NaN, infinities and overflowing squares, at the edges of groups too; with k = 0 an empty window is 0 · inf."""
    _, shape, innermost, size, groups = case
    x, grad = inputs(shape, innermost)
    width, last = shape[1] // groups, shape[-1] - 1
    for place, value in enumerate([float("nan"), float("inf"), -float("inf"), 1e25]):
        channel = (place % 2 * (width - 1) + place // 2 * width) % shape[1]  # first and last channel of a group
        x.select(1, channel).flatten(1)[0, place] = value
        grad.select(1, channel).flatten(1)[-1, place + 4] = value
    x[..., last].narrow(1, width - 2, 2).zero_()  # the last two channels of a group,
    x[..., 0].narrow(1, shape[1] - width, 2).zero_()  # the first two of one,
    x[..., 1].narrow(1, 0, 3).zero_()  # and all that a window sees
    arguments = (size, SCALE, beta, k, groups)
    for result, expected in (
        (kernel.forward(x, *arguments), reference.lrn(x, *arguments)),
        (kernel.backward(grad, x, *arguments), reference.lrn_backward(grad, x, *arguments)),
    ):
        assert bool(expected.isnan().any())
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize("shape", [(0, 16, 3, 5), (2, 16, 0, 5), (0, 5, 1, 1)], ids=name)
def test_empty(shape: tuple[int, ...], innermost: bool) -> None:
    x, grad = inputs(shape, innermost)
    assert kernel.forward(x, 5, SCALE, 0.75, K, 1).shape == shape
    assert kernel.backward(grad, x, 5, SCALE, 0.75, K, 1).shape == shape


def test_unaligned_memory() -> None:
    """A view that starts two bytes into its storage: vectors are then not 16-byte loads, and still right."""
    x, grad = (torch.randn(1 + 2 * 16 * 3, device=DEVICE).bfloat16()[1:].view(2, 16, 3) for _ in range(2))
    check(x, grad, 5, SCALE, 0.75, K, 1)
    check(x.reshape(6, 16, 1), grad.reshape(6, 16, 1), 5, SCALE, 0.75, K, 1)


# ------------------------------------------------------------------------------------------------------------ the launch


def launch_of(grid: tuple[int, ...]) -> _launch.Launch:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("launched")

    class Kernel:
        fn = staticmethod(never)

        def __getitem__(self, _: object) -> Callable[..., None]:
            return never

    return _launch.Launch(Kernel(), grid, (torch.empty(0, device=DEVICE),), {}, 4, 1)


def test_an_empty_grid_is_not_launched() -> None:
    _launch.run(launch_of((0,)))
    _launch.run(launch_of((3, 0, 2)))
    with pytest.raises(AssertionError, match="launched"):
        _launch.run(launch_of((3, 1, 2)))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((2**31,), r"never: grid x = 2147483648 is over CUDA's limit of 2147483647; split the batch"),
        ((1, 65536), r"grid y = 65536 is over CUDA's limit of 65535"),
        ((0, 1, 70000), r"grid z = 70000 is over"),
    ],
)
def test_grid_limits(grid: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _launch.run(launch_of(grid))


@pytest.mark.gpu
@pytest.mark.two_gpu
def test_the_tensors_device_is_the_one_that_runs() -> None:
    x = torch.randn(1, 16, 3, 5, device="cuda:1")
    assert relative(kernel.forward(x, 5, SCALE, 0.75, K, 1), reference.lrn(x.double(), 5, SCALE, 0.75, K, 1)) < 1e-6
    assert torch.cuda.current_device() == 0


# ------------------------------------------------------------------------------------------- more than 2^31 elements

MANY, HUGE = (8192, 96, 55, 55), (1, 96, 4800, 4801)  # by images, and inside one image
FAR_CASES = [(shape, innermost, size) for shape in (MANY, HUGE) for innermost in (False, True) for size in (5, 4)]


@pytest.mark.skipif(not INTERPRETED, reason="records the addresses that the interpreter forms")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("shape", "innermost", "size"), FAR_CASES, ids=name)
def test_addresses_beyond_int32(
    shape: tuple[int, ...], innermost: bool, size: int, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last programs touch just what they should in a tensor of 2^31 elements and more, without that tensor."""
    x = dense(torch.empty(shape, dtype=torch.bfloat16, device="meta"), innermost)
    groups = 2 if shape is MANY else 1
    launch = kernel.plan((x, x, x) if backward else (x, x), size, SCALE, 0.75, K, groups)
    pixels, width = shape[2] * shape[3], shape[1] // groups
    stride = 1 if innermost else pixels

    def windows(elements: set[int], before: int, after: int) -> set[int]:
        reach = range(-before, after + 1)
        return {e + d * stride for e in elements for d in reach if 0 <= e // stride % width + d < width}

    *reads, written = addresses(launch, launch.grid[0] - 1, monkeypatch)
    assert max(written) == x.numel() - 1
    assert min(written) > 2**31 or launch.name.startswith("ring")
    if launch.name.startswith("ring"):  # the rest of the pixels, in all channels of the last group
        left = pixels % launch.constants["BLOCK"]
        first = x.numel() - width * pixels
        assert written == {first + c * pixels + p for c in range(width) for p in range(pixels - left, pixels)}
    else:
        assert written == set(range(min(written), x.numel()))
        assert min(written) == (launch.grid[0] - 1) * launch.elements
    before, after = size // 2, (size - 1) // 2
    summed = windows(written, after, before) if backward else written
    assert reads[-1] == windows(summed, before, after)
    assert not backward or reads[0] == summed


def test_flat_indices_are_int64_when_they_must_be() -> None:
    import triton.language as tl

    assert _launch.index_type(2**31) == tl.int32
    assert _launch.index_type(2**31 + 1) == tl.int64
    near, far = (torch.empty(shape, device="meta") for shape in ((64, 96, 55, 55), MANY))
    assert kernel.plan((near, near), 4, SCALE, 0.75, K, 1).constants["INDEX"] == tl.int32
    assert kernel.plan((far, far), 4, SCALE, 0.75, K, 1).constants["INDEX"] == tl.int64


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("shape", "innermost", "size"), FAR_CASES, ids=name)
def test_values_beyond_int32(shape: tuple[int, ...], innermost: bool, size: int) -> None:
    """The same in memory, 20 GB in all: the first row of the first image and the last of the last against the reference."""
    layout = torch.channels_last if innermost else torch.contiguous_format
    x, grad = (
        torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=layout).normal_() for _ in range(2)
    )
    arguments = (size, SCALE, 0.75, K, 2 if shape is MANY else 1)
    y, dx = kernel.forward(x, *arguments), kernel.backward(grad, x, *arguments)
    for image, row in ((slice(0, 1), slice(0, 1)), (slice(-1, None), slice(-1, None))):
        corner = (image, slice(None), row)
        exact_x, exact_grad = x[corner].double(), grad[corner].double()
        assert relative(y[corner], reference.lrn(exact_x, *arguments)) < EPS[torch.bfloat16] / 2
        assert relative(dx[corner], reference.lrn_backward(exact_grad, exact_x, *arguments)) < EPS[torch.bfloat16] / 2
