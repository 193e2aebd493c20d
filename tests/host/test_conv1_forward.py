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

from alexnet_kernels import _extension, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of ElementType
WAYS = [*((dtype, False) for dtype in DTYPES), (torch.float16, True), (torch.bfloat16, True)]  # dtype, by wgmma or not
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
        ("weight_strides", ctypes.c_int * 4),
        *((name, ctypes.c_int) for name in ("channels", "groups")),
        *((name, ctypes.c_float) for name in ("lrn_scale", "beta", "k")),
        *((name, ctypes.c_bool) for name in ("relu", "pool_first", "warpgroups")),
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
    warpgroups: bool = False


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
    weight = (torch.randn(case.channels, 3, 11, 11, generator=generator) / 8).to(case.dtype)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
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
        *(*out, *(pooled_shape(case, out) if case.stem else (0, 0))),
        *((ctypes.c_int * 4)(*inputs.weight.stride()), case.channels, case.groups),
        *(LRN[1], case.beta, LRN[3], case.relu, case.pool_first, case.warpgroups),
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


def by(case: Case, warpgroups: bool) -> Case:
    """The case as wgmma can do it: 16 bits, and a device that has it."""
    dtype = torch.bfloat16 if case.dtype == torch.float32 else case.dtype
    return dataclasses.replace(case, warpgroups=True, dtype=dtype, shared=LARGE) if warpgroups else case


@pytest.mark.parametrize("warpgroups", [False, True])
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(case=cases, seed=st.integers(0, 99))
def test_convolution_against_fp64(host: ctypes.CDLL, warpgroups: bool, case: Case, seed: int) -> None:
    check(host, by(case, warpgroups), seed)


@pytest.mark.parametrize("warpgroups", [False, True])
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
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
def test_stem_against_fp64(host: ctypes.CDLL, warpgroups: bool, case: Case, seed: int, **rest: Any) -> None:
    check(host, dataclasses.replace(by(case, warpgroups), stem=True, **rest), seed)


SHAPES = {  # what the launch has to do: height, width, images
    "two tiles across": (19, 251, 1),
    "an odd rest across": (23, 239, 1),
    "walks that begin inside the image": (91, 20, 1),
    "exactly one window": (11, 11, 2),
    "images that follow each other": (19, 19, 3),
}


@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warpgroups", [False, True])
def test_shapes(host: ctypes.CDLL, shape: str, stem: bool, warpgroups: bool) -> None:
    height, width, images = SHAPES[shape]
    if stem and height < 19:
        height, width = 19, 19  # three pixels, one window of the pool
    case = Case(height, width, images, 48, stem=stem, channels_last=True, source=torch.float16)
    check(host, by(case, warpgroups))


def test_walks_and_tiles_are_what_the_shapes_are_for(host: ctypes.CDLL) -> None:
    launches = {}
    for name, (height, width, images) in SHAPES.items():
        case = Case(height, width, images, 48)
        described = host.describe_conv1_forward(problem(case, draw(case), None, None, None), 2, LARGE)
        launches[name] = described.blocks // images
        same = dataclasses.replace(case, warpgroups=True)
        assert (
            host.describe_conv1_forward(problem(same, draw(same), None, None, None), 2, LARGE).blocks
            == described.blocks
        )
    assert launches == dict(zip(SHAPES, (2, 2, 2, 1, 1), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [LARGE, MIDDLE, SMALL])
@pytest.mark.parametrize("stem", [False, True])
def test_orders_of_the_threads_give_the_same_bits(
    host: ctypes.CDLL, dtype: torch.dtype, shared: int, stem: bool
) -> None:
    if dtype == torch.float32 and shared == SMALL:
        shared = MIDDLE  # 99 KB do not hold half of the fp32 weights: test_refusals
    results = []
    for order in (0, 1, 2, 3):
        case = Case(27, 23, dtype=dtype, stem=stem, shared=shared, order=order, padding=(1, 0, 2, 0))
        results.append(run(host, case, draw(case)))
    for result in results[1:]:
        assert all(torch.equal(one, first) for one, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("dtype", "warpgroups"), WAYS)
@pytest.mark.parametrize("special", [NAN, INF, -INF, 1e6])  # the last becomes infinite as fp16
def test_nan_and_infinity_stay_in_their_windows(
    host: ctypes.CDLL, dtype: torch.dtype, warpgroups: bool, special: float
) -> None:
    """What windows are padded to, a twelfth column, a 34th line, has weight zero, and zero times infinity is NaN."""
    for column in (7, 11, 12, 15):  # 11 and 15: beside one window, inside the next
        case = Case(15, 27, channels=48, dtype=dtype, relu=False, warpgroups=warpgroups)
        inputs = draw(case)
        inputs.x[0, 1, 3, column] = special
        inputs.x[0, 0, 11, 3] = special  # below the windows of the first row
        inputs.x[0, 2, 14, 26] = special  # the last that a window reads
        a, _, _ = run(host, case, inputs)
        check_activation(case, inputs, a)
        x, _ = multiplied(case, inputs)
        reached = F.max_pool2d((~x.isfinite()).double().amax(1, keepdim=True), 11, 4) > 0
        assert torch.equal((~a.isfinite()).any(1, keepdim=True), reached)


@pytest.mark.parametrize(("dtype", "warpgroups"), WAYS)
@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_nan_through_the_whole(
    host: ctypes.CDLL, dtype: torch.dtype, warpgroups: bool, pool_first: bool, keep: bool
) -> None:
    case = Case(43, 35, channels=48, dtype=dtype, stem=True, pool_first=pool_first, keep=keep, relu=pool_first)
    case = dataclasses.replace(case, warpgroups=warpgroups)
    inputs = draw(case)
    inputs.x[0, 1, 20, 20] = NAN
    inputs.x[0, 0, 2, 2] = INF
    _, y, _ = run(host, case, inputs)
    a, _, place = run(host, dataclasses.replace(case, keep=True), inputs)
    want, want_place = reference.lrn_pool(
        a.double(), None, False, LRN[0], LRN[1], 0.75, LRN[3], 1, WINDOW, False, pool_first
    )
    assert torch.equal(y.isnan(), want.isnan())
    unsure = want.isnan() if pool_first else torch.zeros_like(want, dtype=torch.bool)
    assert torch.equal(place[want.isnan() & ~unsure], want_place[want.isnan() & ~unsure])


@pytest.mark.parametrize("pool_first", [False, True])
def test_the_first_of_equal_ones_wins(host: ctypes.CDLL, pool_first: bool) -> None:
    """Images of two values, weights of one tap: most of a window's numbers are equal."""
    case = Case(35, 43, channels=48, stem=True, pool_first=pool_first, with_bias=False, relu=False)
    inputs = draw(case)
    inputs.weight.zero_()
    inputs.weight[:, 0, 5, 5] = 1
    inputs.x.copy_((inputs.x > 0.5).float())
    a, _, place = run(host, case, inputs)
    _, want = reference.lrn_pool(a.double(), None, False, LRN[0], LRN[1], 0.75, LRN[3], 1, WINDOW, False, pool_first)
    assert torch.equal(place, want)
    assert len(place.unique()) > 4


@pytest.mark.parametrize(("dtype", "warpgroups"), WAYS)
def test_integers_are_exact(host: ctypes.CDLL, dtype: torch.dtype, warpgroups: bool) -> None:
    case = Case(31, 27, dtype=dtype, source=torch.uint8, normalised=True, relu=False, warpgroups=warpgroups)
    inputs = draw(case)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 2, inputs.x.shape, generator=generator).to(torch.uint8)
    weight = torch.randint(0, 2, inputs.weight.shape, generator=generator).to(dtype)
    weight[:, :, ::2] = 0  # 165 ones at most: bf16 holds integers to 256
    one = torch.ones(3)
    a, _, _ = run(host, case, Inputs(x, weight, torch.ones_like(inputs.bias), one * 0, one))
    assert torch.equal(a.double(), F.conv2d(x.double(), weight.double(), stride=4) + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("channels", [48, 96])
def test_orders_of_the_threads_give_the_same_bits_by_wgmma(
    host: ctypes.CDLL, dtype: torch.dtype, stem: bool, channels: int
) -> None:
    case = Case(27, 23, channels=channels, dtype=dtype, stem=stem, warpgroups=True, padding=(1, 0, 2, 0))
    first, *others = (run(host, dataclasses.replace(case, order=order), draw(case)) for order in (0, 1, 2, 3))
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(other, first, strict=True))


def test_fp32_goes_the_same_way_with_wgmma_asked_for(host: ctypes.CDLL) -> None:
    case = Case(27, 31, dtype=torch.float32, stem=True)
    inputs = draw(case)
    for asked, not_asked in zip(
        run(host, dataclasses.replace(case, warpgroups=True), inputs), run(host, case, inputs), strict=True
    ):
        assert torch.equal(asked, not_asked)


def test_a_device_with_less_shared_memory_gives_the_same_bits(host: ctypes.CDLL) -> None:
    """Half of the weights at a time: no sum is formed in another order."""
    for dtype, shared in ((torch.bfloat16, SMALL), (torch.float32, MIDDLE)):
        case = Case(27, 31, dtype=dtype, stem=True)
        inputs = draw(case)
        few = run(host, dataclasses.replace(case, shared=shared), inputs)
        for all_at_once, halves in zip(run(host, case, inputs), few, strict=True):
            assert torch.equal(all_at_once, halves)


def test_useful_products(host: ctypes.CDLL) -> None:
    """AlexNet's own sizes: at least 80% of what the tensor cores multiply are taps of pixels."""
    for stem in (False, True):
        for images in (1, 32, 256):
            case = Case(227, 227, images, stem=stem)
            described = host.describe_conv1_forward(
                problem(case, draw(dataclasses.replace(case, images=1)), None, torch.empty(1) if stem else None, None),
                2,
                LARGE,
            )
            useful = images * 55 * 55 * described.used_depth / (described.products * 16 * described.depth)
            assert (described.depth - described.used_depth) / described.depth <= 0.16
            assert useful >= (0.88 if images == 256 else 0.80), (stem, images, useful)


def test_useful_products_of_wgmma(host: ctypes.CDLL) -> None:
    """Rows of 64 pixels for 55, 416 of K for 363: 75%, at the batch that is measured; docs/kernels/conv1.md says why not more."""
    useful = {}
    for stem in (False, True):
        for images in (1, 256):
            case = Case(227, 227, images, stem=stem, warpgroups=True)
            pointers = (None, torch.empty(1) if stem else None, None)
            one = problem(case, draw(dataclasses.replace(case, images=1)), *pointers)
            described = host.describe_conv1_forward(one, 2, LARGE)
            assert (described.depth, described.used_depth) == (416, 363)
            done = described.products * 16 * described.depth
            useful[stem, images] = round(images * 55 * 55 * described.used_depth / done, 3)
    assert useful == {(False, 1): 0.75, (False, 256): 0.75, (True, 1): 0.687, (True, 256): 0.75}


def test_shared_memory(host: ctypes.CDLL) -> None:
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        for warpgroups in (False, True):
            for stem in (False, True):
                case = Case(27, 27, dtype=dtype, stem=stem, warpgroups=warpgroups)
                one = problem(case, draw(case), None, torch.empty(1) if stem else None, None)
                sizes.append(host.describe_conv1_forward(one, DTYPES.index(dtype), LARGE).shared_bytes)
    assert sizes == [*[198_784, 219_984] * 2, 100_480, 111_504, 103_552, 114_576]  # as test_nvcc_conv1.py has them


def test_a_batch_of_nothing_is_no_launch_and_no_crash(host: ctypes.CDLL) -> None:
    """The bindings ask whether a call is refused before they look at the number of images."""
    case = Case(images=0)
    described = host.describe_conv1_forward(problem(case, draw(case), None, None, None), 2, LARGE)
    assert described.blocks == 0 and described.products == 0


def test_refusals(host: ctypes.CDLL) -> None:
    def refusal(case: Case, shared: int = LARGE, **changes: Any) -> bytes:
        inputs = draw(dataclasses.replace(case, channels=48, images=1))
        one = problem(case, inputs, None, inputs.x if case.stem else None, None)
        for name, value in changes.items():
            setattr(one if hasattr(one, name) else one.images, name, value)
        return bytes(host.run_conv1_forward(one, DTYPES.index(case.dtype), 0, shared))

    assert refusal(Case(channels=32)) == b"the weights are for 48, 64 or 96 channels, no other number"
    assert refusal(Case(), height=0) == b"an empty image"
    assert refusal(Case(), out_height=0) == b"the padded image is smaller than the kernel of 11 x 11"
    assert refusal(Case(stem=True), pooled_height=0) == b"no window of the pool fits into the picture"
    assert refusal(Case(stem=True), pooled_height=3) == b"the pool has padding"
    assert refusal(Case(stem=True, channels=96), groups=5) == b"a group is not a multiple of 8 channels"
    assert refusal(Case(images=1 << 31)) == b"2^31 blocks or more"
    assert (
        refusal(Case(), out_height=1 << 20, out_width=1 << 10) == b"an image of 2^31 numbers or a result of 2^31 bytes"
    )
    assert (
        refusal(Case(warpgroups=True), MIDDLE)
        == b"wgmma is for devices of compute capability 9.0, and this one is another"
    )
    few = b"the device has too little shared memory for a block"
    assert refusal(Case(dtype=torch.float32), SMALL) == few


def test_sanitizers_and_orders(conv1_sanitized: Path) -> None:
    done = subprocess.run([conv1_sanitized], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def operations() -> Any:
    reason = _extension.why_not("cuda")
    if reason is not None:
        pytest.skip(reason)
    return torch.ops.alexnet_kernels_cuda


def on_gpu(operations: Any, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, mean, scale = (
        None if t is None else t.cuda() for t in (inputs.x, inputs.weight, inputs.bias, inputs.mean, inputs.scale)
    )
    image = (x, weight, bias, mean, scale, list(case.padding), case.relu)
    if not case.stem:
        return operations.conv1(*image).cpu(), torch.empty(0), torch.empty(0)
    normalise = (LRN[0], LRN[1], case.beta, LRN[3], case.groups)
    y, a, place = operations.stem(*image, *normalise, list(WINDOW), case.ceil_mode, case.pool_first, case.keep)
    return a.cpu(), y.cpu(), place.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "warpgroups"), WAYS)
@pytest.mark.parametrize(
    ("source", "channels"),
    [*zip(SOURCES, (96, 48, 64, 96), strict=True)],  # they do not meet: one loads, one multiplies
)
@pytest.mark.parametrize("pool_first", [None, False, True])
def test_gpu_against_fp64(
    operations: Any,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    warpgroups: bool,
    source: torch.dtype,
    channels: int,
    pool_first: bool | None,
) -> None:
    if warpgroups and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is for devices of compute capability 9.0")
    monkeypatch.setenv("ALEXNET_KERNELS_CONV1", "wgmma" if warpgroups else "mma")
    case = Case(
        *(227, 240, 2, channels, (2, 1, 0, 3), dtype, source),
        channels_last=channels == 64,
        normalised=source == torch.uint8,
        stem=pool_first is not None,
        pool_first=bool(pool_first),
        groups=2,
        ceil_mode=channels == 48,
    )
    inputs = draw(case)
    a, y, place = on_gpu(operations, case, inputs)
    check_activation(case, inputs, a)
    if case.stem:
        check_pooled(case, a, y, place)
        nothing, alone, _ = on_gpu(operations, dataclasses.replace(case, keep=False), inputs)
        assert nothing.shape == (0,) and torch.equal(alone, y)
        for _ in range(3):
            assert all(
                torch.equal(one, two) for one, two in zip(on_gpu(operations, case, inputs), (a, y, place), strict=True)
            )


@pytest.mark.gpu
@pytest.mark.parametrize("special", [NAN, INF])
def test_gpu_nan_and_infinity_by_wgmma(operations: Any, monkeypatch: pytest.MonkeyPatch, special: float) -> None:
    """One step of many goes by mma.sync, from the same strip and weights: both ways in one image."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is for devices of compute capability 9.0")
    monkeypatch.setenv("ALEXNET_KERNELS_CONV1", "wgmma")
    case = Case(227, 227, relu=False)
    inputs = draw(case)
    inputs.x[0, 1, 103, 111] = special
    check_activation(case, inputs, on_gpu(operations, case, inputs)[0])


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_more_than_2_to_the_31_numbers(operations: Any) -> None:
    case = Case(227, 227, source=torch.uint8, normalised=True, channels_last=True)
    inputs = draw(case)
    x = torch.zeros(8192, 227, 227, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
    x[0] = x[-1] = inputs.x[0].cuda()
    a, _, _ = on_gpu(operations, case, inputs)
    rest = [t.cuda() for t in (inputs.weight, inputs.bias, inputs.mean, inputs.scale) if t is not None]
    many = operations.conv1(x, *rest, [0, 0, 0, 0], True)
    assert torch.equal(many[0].cpu(), a[0]) and torch.equal(many[-1].cpu(), a[0])


@pytest.mark.gpu
def test_gpu_errors(operations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1, 3, 27, 27, device="cuda"), torch.zeros(48, 3, 11, 11, device="cuda")
    rest: Any = (None, None, None, [0, 0, 0, 0], True)
    for arguments, says in [
        ((x[:, :2], weight, *rest), r"x must be \[N, 3, H, W\], got \[1, 2, 27, 27\]"),
        ((x[..., ::2], weight, *rest), r"x must be dense, contiguous or channels_last: call x.contiguous\(\)"),
        ((x.double(), weight, *rest), "x must be float32, float16, bfloat16 or uint8: convert it"),
        ((x.byte(), weight, *rest), "mean and scale are needed for an x of uint8: give both"),
        ((x, weight[:, :, 1:], *rest), r"weight must be \[O, 3, 11, 11\], got \[48, 3, 10, 11\]"),
        ((x, weight.double(), *rest), "weight must be float32, float16 or bfloat16: convert it"),
        ((x, weight.cpu(), *rest), "weight must be on x's device"),
        ((x, weight[:32], *rest), "conv1: the weights are for 48, 64 or 96 channels, no other number"),
        ((x, weight, None, x[0, :, 0, 0], None, [0] * 4, True), "mean and scale belong together: give both or neither"),
        ((x, weight, None, None, None, [0, 0], True), r"padding must be \[top, bottom, left, right\], got 2 numbers"),
        ((x, weight, None, None, None, [0, -1, 0, 0], True), "padding must be from 0 to 65535, got -1"),
        ((x[:, :, :9].contiguous(), weight, *rest), "the padded image is smaller than the kernel of 11 x 11"),
    ]:
        with pytest.raises(RuntimeError, match=says):
            operations.conv1(*arguments)
    monkeypatch.setenv("ALEXNET_KERNELS_CONV1", "tma")
    with pytest.raises(RuntimeError, match="ALEXNET_KERNELS_CONV1=tma is no way to multiply; use 'mma' or 'wgmma'"):
        operations.conv1(x, weight, *rest)
    monkeypatch.delenv("ALEXNET_KERNELS_CONV1")
    with pytest.raises(RuntimeError, match="size must be 5"):
        operations.stem(x, weight, *rest, 3, 1.0, 0.75, 1.0, 1, list(WINDOW), False, False, False)
    with pytest.raises(RuntimeError, match="window must be that of a pool of 3 x 3"):
        operations.stem(x, weight, *rest, 5, 1.0, 0.75, 1.0, 1, [2, 2, 2, 2, 0, 0, 1, 1], False, False, False)
    assert operations.conv1(x[:0], weight, *rest).shape == (0, 48, 5, 5)
