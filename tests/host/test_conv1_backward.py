"""The first convolution's backward in CUDA on the CPU, against autograd in fp64 of the operands as they are rounded."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import _extension

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of ElementType
SOURCES = [*DTYPES, torch.uint8]  # and of Conv1Source
MIDDLE, SMALL = (163 << 10, 99 << 10)  # shared memory of a block: sm_80, sm_86
MEAN, SCALE = torch.tensor([110.25, 3.0, -20.5]), torch.tensor([0.0625, 0.75, 0.03])


class Images(ctypes.Structure):
    """``Conv1Images`` of ``csrc/conv1.h``."""

    _fields_ = [
        *(("x", ctypes.c_void_p), ("source", ctypes.c_int)),
        *((name, ctypes.c_void_p) for name in ("mean", "scale")),
        *((name, ctypes.c_int64) for name in ("images", "image_stride")),
        *((name, ctypes.c_int) for name in ("height", "width", "row_stride", "column_stride", "plane_stride")),
        *((name, ctypes.c_int) for name in ("pad_top", "pad_left")),
    ]


class Problem(ctypes.Structure):
    """``Conv1Backward`` of ``csrc/conv1_backward.h``."""

    _fields_ = [
        ("images", Images),
        *((name, ctypes.c_void_p) for name in ("grad", "a", "weight", "dx", "dw", "db", "workspace")),
        ("weight_strides", ctypes.c_int * 4),
        *((name, ctypes.c_int) for name in ("out_height", "out_width", "channels", "multiprocessors")),
    ]


class Launch(ctypes.Structure):
    """``Conv1BackwardLaunch``."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("blocks", "threads", "shared_bytes")),
        *((name, ctypes.c_int64) for name in ("issued", "useful")),
    ]


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int] = (2, 27, 31)  # images, height, width
    channels: int = 48
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    dtype: torch.dtype = torch.bfloat16
    source: torch.dtype = torch.float32
    channels_last: bool = False
    weight_channels_last: bool = False
    masked: bool = True
    normalised: bool = False
    multiprocessors: int = 3
    order: int = 0
    shared: int = MIDDLE


@dataclass
class Data:
    x: Tensor
    weight: Tensor
    grad: Tensor
    a: Tensor | None


Gradients = dict[str, Tensor]  # dx, dw, db


@pytest.fixture(scope="module")
def host(conv1_backward: Path) -> ctypes.CDLL:
    return loaded(conv1_backward)


def loaded(library: Path) -> ctypes.CDLL:
    host = ctypes.CDLL(str(library))
    host.run_conv1_backward.restype = ctypes.c_char_p
    host.run_conv1_backward.argtypes = [Problem, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    host.describe_conv1_backward.restype = Launch
    host.describe_conv1_backward.argtypes = [Problem, ctypes.c_int]
    return host


def out_size(case: Case) -> tuple[int, int]:
    (_, height, width), (top, bottom, left, right) = case.size, case.padding
    return (height + top + bottom - 11) // 4 + 1, (width + left + right - 11) // 4 + 1


def inputs(case: Case, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    n, height, width = case.size
    if case.source == torch.uint8:
        x = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    else:
        x = torch.randn((n, 3, height, width), generator=generator).to(case.source)
    shape = n, case.channels, *out_size(case)
    return Data(x, normal(case.channels, 3, 11, 11), normal(*shape), normal(*shape) if case.masked else None)


def integers(case: Case) -> Data:
    """Small enough for each number, product and sum to be exact in fp32, and the operands in each type."""
    data = inputs(case)
    for name in ("x", "weight", "grad"):
        value = getattr(data, name)
        if value.is_floating_point():
            setattr(data, name, (value.float() * 2).round().clamp(-4, 4).to(value.dtype))
    return data


def operand(values: Tensor, dtype: torch.dtype) -> Tensor:
    """As the tensor cores take them, in fp64: rounded to 16 bits, or to tf32 with ties away from zero."""
    values = values.float()
    if dtype == torch.float32:
        rounded = ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return torch.where(values.isfinite(), rounded, values).double()
    return values.to(dtype).double()


def masked_grad(data: Data) -> Tensor:
    return data.grad if data.a is None else torch.where(data.a <= 0, torch.zeros_like(data.grad), data.grad)


def convolved(case: Case, data: Data) -> tuple[Tensor, Tensor]:
    """The padded image and the scale of its planes, in fp64."""
    scale = SCALE.view(3, 1, 1) if case.normalised else torch.ones(3, 1, 1)
    values = (data.x.float() - MEAN.view(3, 1, 1)) * scale if case.normalised else data.x.float()
    top, bottom, left, right = case.padding
    return F.pad(operand(values, case.dtype), (left, right, top, bottom)), scale.double()


def expected(case: Case, data: Data, magnitudes: bool = False) -> Gradients:
    """In fp64; with ``magnitudes`` the sums of the terms' absolute values."""
    image, scale = convolved(case, data)
    weight, grad = operand(data.weight, case.dtype), masked_grad(data)
    terms = operand(grad, case.dtype)
    if magnitudes:
        image, scale, weight, grad, terms = image.abs(), scale.abs(), weight.abs(), grad.abs(), terms.abs()
    image.requires_grad_(), weight.requires_grad_()
    dimage, dw = torch.autograd.grad(F.conv2d(image, weight, stride=4), (image, weight), terms)
    (_, height, width), (top, _, left, _) = case.size, case.padding
    dx = dimage[:, :, top : top + height, left : left + width] * scale
    return {"dx": dx, "dw": dw, "db": grad.double().sum((0, 2, 3))}


def address(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.data_ptr()


def describe(case: Case, data: Data, results: Gradients) -> tuple[Problem, list[Tensor]]:
    """The problem, and the tensors that have to outlive it."""
    x = data.x.contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
    layout = torch.channels_last if case.weight_channels_last else torch.contiguous_format
    weight = data.weight.contiguous(memory_format=layout)
    grad = data.grad.contiguous(memory_format=torch.channels_last)
    a = None if data.a is None else data.a.contiguous(memory_format=torch.channels_last)
    # Both, or a tensor of one row or column would keep strides that say nothing.
    results.setdefault("dx", torch.empty(0)), results.setdefault("dw", torch.empty(0))
    (n, height, width), (top, _, left, _) = case.size, case.padding
    strides = (1, 3 * width, 3) if case.channels_last else (height * width, width, 1)
    mean, scale = MEAN.clone(), SCALE.clone()
    images = Images(
        *(address(x), SOURCES.index(case.source)),
        *((address(mean), address(scale)) if case.normalised else (None, None)),
        *(n, 3 * height * width, height, width, strides[1], strides[2], strides[0], top, left),
    )
    gradients = [address(results[name]) if results[name].numel() else None for name in ("dx", "dw", "db")]
    problem = Problem(
        *(images, address(grad), address(a), address(weight), *gradients, None),
        *((ctypes.c_int * 4)(*weight.stride()), *out_size(case), case.channels, case.multiprocessors),
    )
    return problem, [x, weight, grad, mean, scale, *([] if a is None else [a])]


def run(host: ctypes.CDLL, case: Case, data: Data, wanted: tuple[str, ...] = ("dx", "dw", "db")) -> Gradients:
    """NaN where nothing was written; nothing where nothing is wanted."""
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    weight_layout = torch.channels_last if case.weight_channels_last else torch.contiguous_format
    everything = {
        "dx": torch.empty(data.x.shape, dtype=case.dtype if case.source == torch.uint8 else case.source),
        "dw": torch.empty(data.weight.shape, dtype=case.dtype),
        "db": torch.empty(case.channels, dtype=case.dtype),
    }
    everything["dx"] = everything["dx"].to(memory_format=layout)
    everything["dw"] = everything["dw"].to(memory_format=weight_layout)
    if case.source == torch.uint8:
        wanted = tuple(name for name in wanted if name != "dx")
    results = {n: t.fill_(float("nan")) if n in wanted else torch.empty(0) for n, t in everything.items()}
    problem, kept = describe(case, data, results)
    message = host.run_conv1_backward(problem, DTYPES.index(case.dtype), case.order, case.shared)
    assert message is None, message
    assert kept
    return {name: results[name] for name in wanted}


def check_values(case: Case, data: Data, got: Gradients, errors: int = 1) -> None:
    """Each fp32 sum of n terms is off by at most n rounding errors (``errors`` times as much where a sum is not rounded to the
    nearest) of the sum of their magnitudes; the result is rounded once more."""
    want, magnitude = expected(case, data), expected(case, data, magnitudes=True)
    pixels = case.size[0] * out_size(case)[0] * out_size(case)[1]
    terms = {"dx": 9 * case.channels, "dw": pixels, "db": pixels}
    for name, value in got.items():
        info = torch.finfo(value.dtype)
        bound = (
            errors * terms[name] * 2.0**-24 * magnitude[name] + info.eps / 2 * want[name].abs() + info.smallest_normal
        )
        excess = ((value.double() - want[name]).abs() - bound).max()
        assert excess <= 0, (name, float(excess))


def check(host: ctypes.CDLL, case: Case, seed: int = 0) -> None:
    data = inputs(case, seed)
    check_values(case, data, run(host, case, data))


cases = st.builds(
    Case,
    size=st.tuples(st.integers(1, 3), st.integers(11, 31), st.integers(11, 43)),
    channels=st.sampled_from([48, 64, 96]),
    padding=st.tuples(*[st.integers(0, 4)] * 4),
    dtype=st.sampled_from(DTYPES),
    source=st.sampled_from(SOURCES),
    channels_last=st.booleans(),
    weight_channels_last=st.booleans(),
    masked=st.booleans(),
    normalised=st.booleans(),
    multiprocessors=st.sampled_from([1, 2, 5, 132]),
    order=st.sampled_from([0, 1, 5]),
)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(case=cases, seed=st.integers(0, 99))
def test_against_fp64(host: ctypes.CDLL, case: Case, seed: int) -> None:
    check(host, case, seed)


@pytest.mark.parametrize("channels", [48, 64, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(host: ctypes.CDLL, dtype: torch.dtype, channels: int) -> None:
    case = Case((2, 19, 31), channels, (2, 1, 2, 0), dtype, dtype, channels == 64, channels == 48)
    data = integers(case)
    want = expected(case, data)
    for name, value in run(host, case, data).items():
        torch.testing.assert_close(value, want[name].to(value.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("width", [227, 231, 235, 269], ids=lambda w: f"{(w - 7) // 4} columns")
def test_maps_wider_than_a_strip(host: ctypes.CDLL, width: int) -> None:
    """Up to 56 output pixels are one strip, 57 and more are two; 66 cells of the data gradient are two blocks."""
    check(host, Case((1, 15, width), 48, (0, 2, 0, 0), torch.float16, torch.float16, multiprocessors=2))


def test_images_taller_than_a_block(host: ctypes.CDLL) -> None:
    check(host, Case((1, 62, 13), 48, (3, 0, 1, 0), multiprocessors=4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_orders_of_the_threads_give_the_same_bits(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    case = Case((2, 15, 31), 96, (1, 1, 1, 1), dtype, dtype)
    results = [run(host, replace(case, order=order), inputs(case)) for order in (0, 1, 7)]
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("wanted", [("dx",), ("dw",), ("db",), ("dx", "db"), ("dw", "db")], ids="+".join)
def test_what_is_not_wanted_is_not_computed(host: ctypes.CDLL, wanted: tuple[str, ...]) -> None:
    case = Case((1, 15, 19), masked=False)
    everything, some = run(host, case, inputs(case)), run(host, case, inputs(case), wanted)
    assert all(torch.equal(some[name], everything[name]) for name in wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_special_pixel_reaches_its_taps_and_no_others(host: ctypes.CDLL, dtype: torch.dtype, special: float) -> None:
    """The last pixels: the map's width of 9 leaves 7 places of a product over, whose windows would reach them too."""
    case = Case((1, 15, 43), 48, dtype=dtype, source=dtype, masked=False)
    data = inputs(case)
    data.grad = data.grad.abs() + 0.125
    data.x[0, 1, 14, 42] = data.x[0, 2, 3, 0] = special
    got, want = run(host, case, data, ("dw",))["dw"], expected(case, data)["dw"]
    assert want.isfinite().any() and not want.isfinite().all()
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


def test_special_gradients(host: ctypes.CDLL) -> None:
    """Where the activation is NaN the gradient passes; where it is not above zero not even NaN does."""
    case = Case((1, 15, 23), 48, dtype=torch.float32, source=torch.float32)
    data = inputs(case)
    assert data.a is not None
    data.a[0, 3, 1, 2], data.grad[0, 3, 1, 2] = float("nan"), 5.0
    data.a[0, 5, 0, 1], data.grad[0, 5, 0, 1] = -0.0, float("nan")
    data.a[0, 7, 1, 0], data.grad[0, 7, 1, 0] = 1.0, float("nan")
    got, want = run(host, case, data), expected(case, data)
    assert want["db"].isnan().nonzero().tolist() == [[7]]
    for name, value in got.items():
        assert torch.equal(value.isnan(), want[name].isnan()) or name == "dx", name
    # Four by four pixels are multiplied at once, so a NaN reaches 12 x 12 of them where torch's reaches 11 x 11.
    wider = F.max_pool2d(want["dx"].isnan().float(), 2, 1, 1)[:, :, :-1, :-1].bool()
    assert torch.equal(got["dx"].isnan(), wider)
    finite = ~got["dx"].isnan()
    torch.testing.assert_close(got["dx"].double()[finite], want["dx"][finite], rtol=1e-4, atol=1e-4)


def test_refusals(host: ctypes.CDLL) -> None:
    images = Images(images=1, height=15, width=15)
    refused = {
        b"the channels are not 48, 64 or 96": Problem(images, channels=32, out_height=2, out_width=2),
        b"an empty image or an empty map": Problem(images, channels=48, out_height=0, out_width=2),
        b"negative padding": Problem(Images(height=9, width=9, pad_left=-1), channels=48, out_height=1, out_width=1),
        b"an image of 2^31 numbers or more, its padding counted": Problem(
            Images(height=40_000, width=40_000), channels=48, out_height=9_998, out_width=9_998
        ),
    }
    for message, problem in refused.items():
        assert host.run_conv1_backward(problem, 0, 0, MIDDLE) == message


def test_a_device_with_little_shared_memory(host: ctypes.CDLL) -> None:
    """99 KiB, as of sm_86, sm_89 and sm_120: what does not fit is refused before the launch, the rest is launched."""
    few = b"the device has too little shared memory for a block"
    for dtype in DTYPES:
        for channels in (48, 64, 96):
            if dtype == torch.float32 and channels == 96:
                problem = Problem(Images(images=1, height=11, width=15), channels=96, out_height=1, out_width=2)
                assert host.run_conv1_backward(problem, DTYPES.index(dtype), 0, SMALL) == few
            else:
                check(host, Case((1, 11, 15), channels, dtype=dtype, shared=SMALL))


@pytest.mark.parametrize("channels", [48, 64, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_launch(host: ctypes.CDLL, dtype: torch.dtype, channels: int) -> None:
    """Of the multiply-adds on a 227 x 227 image 363 of 408 taps and 55 of 56 pixels count; an sm_80 has the shared memory."""
    problem = Problem(Images(images=256, height=227, width=227), out_height=55, out_width=55, channels=channels)
    problem.multiprocessors = 132
    launch = host.describe_conv1_backward(problem, DTYPES.index(dtype))
    assert launch.useful == 256 * 55 * 55 * 363 * channels
    assert launch.useful / launch.issued == 363 / 408 * 55 / 56
    assert launch.blocks == 132 and launch.threads == 256
    pixel = (
        channels + 8,
        torch.finfo(dtype).bits // 8,
    )  # the ring, zeros, two rows of the gradient and one of the activation
    assert launch.shared_bytes == (6 * 4 * 64 * 8 + 2 * 56 * pixel[0] + 56 * channels) * pixel[1] + 128 <= 163 << 10
    problem.images.images = 1
    assert host.describe_conv1_backward(problem, DTYPES.index(dtype)).blocks == 27  # two rows each


PLANTS: dict[str, tuple[str, str, str]] = {  # file, what stands there, what is put in its place
    "missing barrier": ("conv1_backward.cu", "++step) {\n        __syncthreads();", "++step) {"),
    "missing wait": ("conv1_rows.h", "copy_async_wait<0>();", ""),
    "cells behind the row's end": ("conv1_backward.cu", "inside = !kEnd || at + lane", "inside = true || at + lane"),
    "no spare gradient": ("conv1_dgrad.cu", "const int other = (slice + 1) % 2;", "const int other = slice % 2;"),
    "a sum over blocks that forgets one": ("conv1_sums.h", "int block = row;", "int block = row + 1;"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTS)
def test_planted_bugs_are_caught(name: str, plant: Callable[[str, str, str], Path]) -> None:
    host = loaded(plant(*PLANTS[name]))
    failures = 0
    for order in (0, 1, 7):
        case = Case((1, 23, 31), 96, dtype=torch.bfloat16, order=order)
        try:
            check(host, case)
        except AssertionError:
            failures += 1
    assert failures


@pytest.mark.slow
def test_sanitizers_and_orders(conv1_backward_sanitized: Path) -> None:
    done = subprocess.run([conv1_backward_sanitized], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------ on a GPU

Arguments = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, list[int], list[bool]]


def call(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    if (reason := _extension.why_not("cuda")) is not None:
        pytest.skip(reason)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.alexnet_kernels_cuda.conv1_backward(*arguments)
    return found


def arguments_of(case: Case, data: Data, device: str) -> Arguments:
    def laid_out(t: Tensor, channels_last: bool) -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return t.to(device).contiguous(memory_format=layout)

    grad, a = laid_out(data.grad, True), None if data.a is None else laid_out(data.a, True)
    x, weight = laid_out(data.x, case.channels_last), laid_out(data.weight, case.weight_channels_last)
    mean, scale = (MEAN.to(device), SCALE.to(device)) if case.normalised else (None, None)
    return grad, a, x, weight, mean, scale, list(case.padding), [case.source != torch.uint8, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [48, 64, 96])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.uint8])
def test_on_a_gpu(source: torch.dtype, dtype: torch.dtype, channels: int) -> None:
    case = Case((5, 227, 239), channels, (0, 0, 2, 1), dtype, source, channels == 64, channels == 96, normalised=True)
    data = inputs(case)
    runs = [call(arguments_of(case, data, "cuda")) for _ in range(3)]
    got = {name: t.cpu() for name, t in zip(("dx", "dw", "db"), runs[0], strict=True) if t.numel()}
    assert ("dx" in got) == (source != torch.uint8)
    check_values(case, data, got, errors=2)  # a tensor core cuts off what an addition rounds
    assert runs[0][1].stride() == arguments_of(case, data, "cuda")[3].stride()
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_errors_of_the_op_on_a_gpu() -> None:
    case = Case((1, 15, 19))
    grad, a, x, weight, mean, scale, padding, mask = arguments_of(case, inputs(case), "cuda")
    few = grad[:, :32].contiguous(memory_format=torch.channels_last)
    wrong: dict[str, Arguments] = {
        "grad must be dense channels_last": (grad.contiguous(), a, x, weight, mean, scale, padding, mask),
        "grad must have weight's dtype": (grad.float(), a, x, weight, mean, scale, padding, mask),
        "grad must be \\[1, 48, 2, 3\\], got": (grad[:, :, :1], a, x, weight, mean, scale, padding, mask),
        "mask must be three bools": (grad, a, x, weight, mean, scale, padding, [True]),
        "x of uint8 has no gradient": (grad, a, x.byte(), weight, MEAN.cuda(), SCALE.cuda(), padding, mask),
        "the channels are not 48, 64 or 96": (few, None, x, weight[:32], mean, scale, padding, mask),
    }
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            call(arguments)


@pytest.mark.gpu
def test_an_empty_batch_on_a_gpu() -> None:
    case = Case((0, 15, 19))
    dx, dw, db = call(arguments_of(case, inputs(case), "cuda"))
    assert dx.shape == (0, 3, 15, 19) and not dw.any() and not db.any()
