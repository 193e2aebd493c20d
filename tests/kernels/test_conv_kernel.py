"""The Triton convolution against fp64 and against exact integers: every form, in the interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nowhere import addresses
from torch import Tensor

from alexnet_kernels.kernels import _conv_choice as choice
from alexnet_kernels.kernels import conv as kernel
from alexnet_kernels.kernels._conv_geometry import Problem, depths, halves
from alexnet_kernels.kernels._launch import Tile, resident

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = (torch.float16, torch.bfloat16)
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of the result's rounding
# Of one product: both operands may lose 2^-10 in tf32; three products lose what two low parts would have given. In the
# interpreter every precision is exact.
PRODUCT = {"tf32": 2.0**-9, "tf32x3": 2.0**-19, "ieee": 0.0}


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    """Tests put other configurations in the place of the built-in ones."""
    kernel.tile_of.cache_clear()
    yield
    kernel.tile_of.cache_clear()


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the interpreter gets through, of one part and of two; results start as NaN."""
    small = {
        "batch_tile": [Tile("batch_tile", 16, 32, 32), Tile("batch_tile", 16, 48, 32)],
        "group_major": [Tile("group_major", 16, 32, 64)],
        "pixel_pair": [Tile("pixel_pair", 16, 32, 16)],
        "pointer_rows": [Tile("pointer_rows", 32, 32, 32)],
        "pointer_rows small": [Tile("pointer_rows", 32, 16, 16)],
    }
    for form, tiles in small.items():
        monkeypatch.setitem(choice.CONFIGS, form, tuple(tiles))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))


Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups
SAME: Geometry = ((1, 1), (1, 1), (1, 1), 1)


def laid_out(t: Tensor, last: bool) -> Tensor:
    return t.to(DEVICE).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def integers(shape: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse enough that every sum, and so every rounding, is exact in any of the types."""
    x = torch.randint(-2, 3, shape) * (torch.rand(shape) < 0.3)
    w = torch.randint(-1, 2, weight)
    bias = torch.randint(-9, 10, weight[:1])
    return x.to(dtype), w.to(DEVICE, dtype), bias.to(DEVICE, dtype)


def reference(x: Tensor, w: Tensor, bias: Tensor | None, relu: bool, geometry: Geometry) -> Tensor:
    y = F.conv2d(x.double().cpu(), w.double().cpu(), None if bias is None else bias.double().cpu(), *geometry)
    return (y.relu() if relu else y).to(x.device)


def exactly(x: Tensor, w: Tensor, bias: Tensor | None, relu: bool, geometry: Geometry, form: str | None = None) -> None:
    y = kernel.forward(
        x, w, bias, relu, *geometry, "ieee" if x.dtype == torch.float32 and form is None else "tf32", form
    )
    assert y.dtype == x.dtype
    assert torch.equal(y.double(), reference(x, w, bias, relu, geometry))


def nearly(
    x: Tensor, w: Tensor, bias: Tensor | None, relu: bool, geometry: Geometry, precision: str, form: str | None
) -> None:
    """Each result within one rounding, and within what sums of that length of such products can lose."""
    y = kernel.forward(x, w, bias, relu, *geometry, precision, form)
    exact = reference(x, w, bias, relu, geometry)
    size = reference(x.abs(), w.abs(), None if bias is None else bias.abs(), False, geometry)
    product = PRODUCT[precision] if x.dtype == torch.float32 and not INTERPRETED else 0.0
    lost = (w[0].numel() + 2) * 2.0**-24 + product
    tiny = torch.finfo(x.dtype).tiny
    assert bool(((y.double() - exact).abs() <= EPS[x.dtype] * exact.abs() + lost * size + tiny).all())


# form, shape, weight, geometry
CASES: list[tuple[str, tuple[int, ...], tuple[int, ...], Geometry]] = [
    ("batch_tile", (18, 32, 3, 3), (32, 32, 3, 3), SAME),  # two images past a tile
    ("batch_tile", (5, 96, 2, 3), (64, 48, 3, 5), ((1, 1), (1, 2), (1, 1), 2)),  # 32 of 48 channels, then 16
    ("batch_tile", (3, 16, 4, 4), (48, 16, 3, 3), SAME),  # 32 output channels and 16, a step shorter than asked for
    ("batch_tile", (2, 48, 3, 4), (21, 16, 2, 3), ((2, 2), (3, 3), (1, 2), 3)),  # rows that see padding only; 7 of 32
    ("batch_tile", (16, 80, 1, 1), (40, 80, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    ("group_major", (17, 48, 3, 3), (32, 48, 3, 3), SAME),
    ("group_major", (2, 16, 4, 4), (24, 16, 3, 3), ((2, 2), (4, 4), (1, 1), 1)),  # rows too short for a step
    ("pixel_pair", (18, 32, 3, 5), (32, 32, 3, 3), SAME),  # the last pair is one pixel
    ("pixel_pair", (2, 32, 4, 4), (20, 16, 2, 5), ((2, 1), (1, 2), (1, 1), 2)),
    ("pixel_pair", (1, 16, 3, 7), (16, 16, 1, 2), ((1, 2), (2, 3), (1, 2), 1)),  # rows and columns of padding only
    ("pointer_rows", (3, 32, 5, 4), (40, 32, 3, 3), SAME),
    ("pointer_rows", (2, 96, 3, 4), (32, 48, 3, 3), ((1, 1), (1, 1), (1, 1), 2)),
    ("pointer_rows", (1, 24, 5, 5), (12, 8, 2, 3), ((2, 1), (2, 2), (1, 2), 3)),
    ("pointer_rows", (2, 3, 13, 12), (8, 3, 5, 4), ((4, 4), (0, 1), (1, 1), 1)),
    ("pointer_rows", (2, 7, 4, 4), (5, 7, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    ("pointer_rows", (2, 2, 3, 3), (4, 1, 2, 2), ((1, 1), (3, 3), (1, 1), 2)),
]


def name(case: Any) -> str:
    return "-".join(map(str, case)).replace(" ", "") if isinstance(case, tuple) else str(case).removeprefix("torch.")


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("case", CASES, ids=name)
def test_integers_are_exact(case: Any) -> None:
    """Every form, in fp32 and a 16-bit type, with and without bias and ReLU: not one bit is wrong."""
    form, shape, weight, geometry = case
    turn = CASES.index(case) % 2
    for i, dtype in enumerate((torch.float32, HALF[turn])):
        x, w, bias = integers(shape, weight, dtype)
        exactly(laid_out(x, True), w, bias if i == turn else None, i == 0, geometry, form)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[7], CASES[11]], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
def test_random_numbers(case: Any, dtype: torch.dtype) -> None:
    form, shape, weight, geometry = case
    x, w = laid_out(torch.randn(shape), True).to(dtype), torch.randn(weight, device=DEVICE).to(dtype)
    nearly(x, w, torch.randn(weight[0], device=DEVICE).to(dtype), True, geometry, "tf32", form)


# form, output channels: the built-in tiles, with what two of them leave for a third
WHOLE = [("batch_tile", 128), ("batch_tile", 192), ("group_major", 128), ("pixel_pair", 128), ("pointer_rows", 128)]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "outputs"), WHOLE)
def test_built_in_tiles(form: str, outputs: int) -> None:
    shape, weight = (130, 48, 2, 2), (outputs, 48, 3, 3)
    x, w, bias = integers(shape, weight, torch.float16)
    exactly(laid_out(x, True), w, bias, True, SAME, form)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name)
@pytest.mark.parametrize("label", kernel.LAYERS)
def test_every_layer_on_a_gpu(label: str, dtype: torch.dtype) -> None:
    """In its real size, by each form that can take it, at a batch of whole tiles and a ragged one; integers, bit by bit."""
    channels, size, outputs, taps, padding, groups = kernel.LAYERS[label]
    geometry: Geometry = ((1, 1), (padding, padding), (1, 1), groups)
    for images in (128, 97, 1):
        shape, weight = (images, channels, size, size), (outputs, channels // groups, taps, taps)
        x, w, bias = integers(shape, weight, dtype)
        problem = Problem.of(shape, weight, *geometry, dtype.itemsize)
        for form in (None, "batch_tile", "group_major", "pixel_pair", "pointer_rows"):
            if form == "group_major" and groups > 1:
                continue  # an ordinary map is not group-major then
            try:
                choice.choose(problem, "tf32", form)
            except ValueError:
                continue
            # the sums are exact in fp32, and rounded once, to the nearest even
            y = kernel.forward(laid_out(x, True), w, bias, True, *geometry, "tf32", form)
            assert torch.equal(y, reference(x.to(DEVICE), w, bias, True, geometry).to(dtype))


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("precision", kernel.PRECISIONS)
def test_precisions(precision: str) -> None:
    x, w = laid_out(torch.randn(2, 24, 4, 4), True), torch.randn(16, 24, 3, 3, device=DEVICE)
    problem = Problem.of(x.shape, w.shape, *SAME, 4)
    y = torch.empty(2, 16, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    assert kernel.plan(x, kernel.pack(w), None, y, problem, False, precision).constants["PRECISION"] == precision
    nearly(x, w, None, False, SAME, precision, None)


@pytest.mark.usefixtures("_small")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 3]))
    depth, width = data.draw(st.sampled_from([1, 2, 3, 5, 8, 12, 16, 24, 48])), data.draw(st.integers(1, 20))
    taps, stride, padding, dilation = (
        (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))
        for low, high in ((1, 4), (1, 3), (0, 4), (1, 2))
    )
    size = tuple(dilation[i] * (taps[i] - 1) + 1 + data.draw(st.integers(-1, 4)) for i in (0, 1))
    assume(all(size[i] > 0 and size[i] + 2 * padding[i] >= dilation[i] * (taps[i] - 1) + 1 for i in (0, 1)))
    shape = (data.draw(st.integers(0, 18)), groups * depth, *size)
    weight = (groups * width, depth, *taps)
    dtype, last = data.draw(st.sampled_from([torch.float32, *HALF])), data.draw(st.booleans())
    form = data.draw(st.sampled_from([None, None, *(f for f in choice.CONFIGS if " " not in f)]))
    geometry = (stride, padding, dilation, groups)
    problem = Problem.of(shape, weight, *geometry, dtype.itemsize)
    described = last and shape[0] > 0 and groups * depth * size[0] * size[1] * dtype.itemsize % 16 == 0
    try:
        tile = choice.choose(problem, "tf32", form, described and problem.reduction * dtype.itemsize % 16 == 0)
    except ValueError:
        assume(False)
    steps = problem.issued(tile) // (tile.block_m * tile.block_n * 16)
    assume(steps <= 100)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, w, bias = integers(shape, weight, dtype)
    exactly(laid_out(x, last), w, bias if data.draw(st.booleans()) else None, data.draw(st.booleans()), geometry, form)


# ------------------------------------------------------------------------------------------------ layouts and batches


def views() -> dict[str, Tensor]:
    """One map [2, 16, 4, 5] in every way it may lie in memory."""
    x = torch.randn(2, 16, 4, 5)
    last = {"memory_format": torch.channels_last}
    wide = torch.randn(2, 40, 6, 9)
    every = torch.randn(4, 16, 4, 5)
    wide[:, 8:24, 1:5, 2:7], every[::2] = x, x
    shifted = torch.empty(1 + x.numel())[1:].as_strided(x.shape, x.contiguous(**last).stride()).copy_(x)
    views = {
        "contiguous": x,
        "channels_last": x.contiguous(**last),
        "window of contiguous": wide[:, 8:24, 1:5, 2:7],
        "window of channels_last": wide.contiguous(**last)[:, 8:24, 1:5, 2:7],
        "every second image": every.contiguous(**last)[::2],
        "every second image, contiguous": every[::2],
        "expanded": x[:1, :, :1].expand(2, 16, 4, 5),
        "rows and columns exchanged": x.transpose(2, 3).contiguous(**last).transpose(2, 3),
        "not aligned": shifted,
    }
    return {name: view.to(DEVICE) if DEVICE == "cpu" else _same_strides(view) for name, view in views.items()}


def _same_strides(view: Tensor) -> Tensor:
    memory = view.as_strided((view.untyped_storage().nbytes() // 4,), (1,), 0).to(DEVICE)
    return memory.as_strided(view.shape, view.stride(), view.storage_offset())


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("depth", [16, 4], ids=["whole vectors", "single elements"])
@pytest.mark.parametrize("view", views())
def test_a_view_is_read_as_what_it_is(view: str, depth: int) -> None:
    x = views()[view]
    groups = 16 // depth
    w = torch.randn(16, depth, 3, 3, device=DEVICE)
    geometry: Geometry = ((1, 1), (1, 1), (1, 1), groups)
    y = kernel.forward(x, w, None, True, *geometry, "ieee")
    last = view in ("channels_last", "every second image", "not aligned")
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    nearly(x, w, None, True, geometry, "ieee", None)
    if depth == 16:
        nearly(x, w, None, True, geometry, "tf32", None)


@pytest.mark.usefixtures("_small")
def test_a_weight_that_is_not_aligned() -> None:
    """A channels_last weight is read where it lies, which a descriptor cannot if that is no multiple of 16 bytes."""
    x = laid_out(torch.randn(16, 16, 2, 2), True)
    w = torch.randn(1 + 16 * 9 * 16, device=DEVICE)[1:].view(16, 3, 3, 16).permute(0, 3, 1, 2)
    nearly(x, w, None, False, SAME, "tf32", None)
    with pytest.raises(ValueError, match=r"not aligned to 16 bytes.*form='pointer_rows' takes any"):
        kernel.forward(x, w, None, False, *SAME, "tf32", "batch_tile")


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("form", ["batch_tile", "group_major", "pixel_pair", "pointer_rows"])
def test_an_image_does_not_depend_on_its_batch(form: str) -> None:
    """Bit by bit, at the end of a batch too, and from run to run; an empty batch is one."""
    w = torch.randn(16, 48, 3, 3, device=DEVICE)
    x = laid_out(torch.randn(18, 48, 2, 2), True)
    whole = kernel.forward(x, w, None, False, *SAME, "tf32", form)
    assert torch.equal(whole, kernel.forward(x, w, None, False, *SAME, "tf32", form))
    if INTERPRETED:  # which multiplies by BLAS, whose order of sums depends on the row
        x, w = x.round(), w.round()
        whole = kernel.forward(x, w, None, False, *SAME, "tf32", form)
    for images in (slice(0, 1), slice(3, 18, 3)):
        assert torch.equal(whole[images], kernel.forward(x[images], w, None, False, *SAME, "tf32", form))
    assert kernel.forward(x[:0], w, None, False, *SAME, "tf32", form).shape == (0, 16, 2, 2)


@pytest.mark.usefixtures("_small")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns of every NaN
@pytest.mark.parametrize("form", ["batch_tile", "group_major", "pixel_pair", "pointer_rows"])
def test_what_is_not_finite_stays_where_it_is_seen(form: str) -> None:
    """A NaN passes the ReLU; beside its windows, in other images and where all is padding, nothing notices it."""
    x = laid_out(torch.randn(17, 48, 1, 4).half(), True)  # in steps of 32 channels, the last of which is not whole
    w = torch.randn(16, 48, 3, 3, device=DEVICE).half()
    x[3, 47, 0, 0], x[16, 0, 0, 3], x[0, 5, 0, 0] = float("nan"), float("inf"), -float("inf")
    geometry: Geometry = ((1, 1), (3, 1), (1, 1), 1)  # the first and last row of y see padding only
    y = kernel.forward(x, w, None, True, *geometry, "tf32", form)
    exact = reference(x, w, None, True, geometry)
    assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())
    assert bool(exact.isnan().any()) and bool(exact.isinf().any())


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_a_buffer_of_towers(dtype: torch.dtype) -> None:
    """Group-major rows of two groups: the last tile of the first group's images ends in the second's, and stores none of them."""
    shape, weight, geometry = (18, 96, 2, 3), (32, 48, 3, 3), ((1, 1), (1, 1), (1, 1), 2)
    x, w, bias = integers(shape, weight, dtype)
    towers = x.to(DEVICE).unflatten(1, (2, 48)).permute(1, 0, 3, 4, 2).contiguous()
    y = kernel.forward_group_major(towers, w, bias, True, *geometry[:2], "tf32")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.double(), reference(x.to(DEVICE), w, bias, True, geometry))
    empty = kernel.forward_group_major(towers[:, :0].contiguous(), w, bias, True, *geometry[:2], "tf32")
    assert empty.shape == (0, 32, 2, 3)
    with pytest.raises(ValueError, match=r"strides .* must be contiguous and begin at a multiple of 16 bytes; copy it"):
        kernel.forward_group_major(towers[:, ::2], w, bias, True, *geometry[:2], "tf32")


def test_packing_a_channels_last_weight_is_free() -> None:
    w = torch.randn(8, 4, 3, 2)
    packed = kernel.pack(w)
    assert torch.equal(packed.view(8, 3, 2, 4).permute(0, 3, 1, 2), w) and packed.is_contiguous()
    last = w.contiguous(memory_format=torch.channels_last)
    assert torch.equal(kernel.pack(last), packed) and kernel.pack(last).data_ptr() == last.data_ptr()


def test_what_is_supported() -> None:
    x, w = torch.empty(1, 3, 4, 4), torch.empty(2, 3, 2, 2)
    assert kernel.supports(x, w) is None
    assert kernel.supports(x.double(), w.double()) == "the Triton kernels take fp32, fp16 and bf16, not torch.float64"
    assert kernel.supports(x.half(), w) == (
        "x is torch.float16 but weight is torch.float32; the Triton kernels multiply one dtype"
    )
    huge = torch.empty(1, 1, 2**16, 2**15, device="meta")
    assert kernel.supports(huge, w) == "an image of 2147483648 elements; the Triton kernels index an image by 31 bits"
    half, wide = torch.empty(1, 1, 2**15, 2**15, device="meta"), torch.empty(2, 1, 1, 1, device="meta")
    with pytest.raises(ValueError, match="a result of 2147483648 elements an image: it is indexed by 31 bits"):
        kernel.forward(half, wide, None, False, (1, 1), (0, 0), (1, 1), 1, "tf32")


# -------------------------------------------------------------------------------------------------------- which way runs


def layer(label: str, images: int, itemsize: int = 2) -> Problem:
    channels, size, outputs, taps, padding, groups = kernel.LAYERS[label]
    shape, weight = (images, channels, size, size), (outputs, channels // groups, taps, taps)
    return Problem.of(shape, weight, (1, 1), (padding, padding), (1, 1), groups, itemsize)


ODD = (1, 2, 3, 5, 31, 50, 63, 65, 96, 100, 127, 129, 160, 200, 300, 1000)
BATCHES = (*ODD, 64, 128, 192, 256, 512, 1024)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("label", kernel.LAYERS)
def test_few_multiplications_are_wasted(label: str, itemsize: int) -> None:
    """At most the usual count at batch 128 and 256, at most 1.18 times it at any other."""
    for images in BATCHES:
        problem = layer(label, images, itemsize)
        tile = choice.choose(problem)
        assert problem.issued(tile) <= (1.0 if images in (128, 256) else 1.18) * problem.nominal, (images, tile)
        assert images in ODD or tile.form in ("batch_tile", "group_major")


def test_the_count_of_multiplications_is_that_of_the_steps() -> None:
    """Against a count by hand: the taps of each output pixel, whole steps, whole tiles."""
    problem = Problem.of((70, 96, 7, 5), (80, 48, 3, 5), (2, 1), (1, 3), (1, 1), 2, 2)
    seen = [
        (sum(0 <= i * 2 - 1 + r < 7 for r in range(3)), sum(0 <= j - 3 + s < 5 for s in range(5)))
        for i in range(4)
        for j in range(7)
    ]
    tile = Tile("batch_tile", 64, 64, 64)
    assert problem.issued(tile) == 128 * 2 * 64 * sum(r * s * 48 for r, s in seen)  # 40 outputs in 64, 48 = 32 + 16
    merged = sum(max(r * (s * 48 // 64), 1) * 64 + max(r * (s * 48 % 64 // 16), 1) * 16 for r, s in seen)
    assert problem.issued(replace(tile, form="group_major")) == 128 * 2 * 64 * merged
    rows = Tile("pointer_rows", 64, 32, 64)
    assert problem.issued(rows) == 1984 * 2 * 64 * 768  # 70 · 28 pixels in 31 tiles, 3 · 5 · 48 products in 12 steps
    assert problem.issued(Tile("pixel_pair", 64, 64, 16)) == 128 * 2 * 64 * 2 * 4 * 5 * 48 * sum(
        sum(0 <= i * 2 - 1 + r < 7 for r in range(3)) for i in range(4)
    )
    assert problem.nominal == 70 * 28 * 80 * 15 * 48


def test_which_form_takes_what() -> None:
    def form(problem: Problem, **kw: Any) -> str:
        return choice.choose(problem, **kw).form

    assert form(layer("paper conv3", 256)) == form(layer("paper conv2", 64)) == "batch_tile"
    assert form(layer("tower conv2", 256)) == "group_major"  # 48 channels in one group
    assert form(layer("paper conv3", 1)) == "pointer_rows"
    assert form(layer("paper conv3", 96)) == "pointer_rows"  # three quarters of two tiles
    assert form(layer("paper conv3", 256), described=False) == "pointer_rows"
    assert form(layer("paper conv3", 256, 4)) == "batch_tile"
    assert form(layer("paper conv3", 256, 4), precision="tf32x3") == "pointer_rows"
    assert form(layer("paper conv3", 256, 4), precision="ieee") == "pointer_rows"
    assert form(layer("paper conv3", 256), form="pixel_pair") == "pixel_pair"
    assert form(Problem.of((256, 3, 227, 227), (96, 3, 11, 11), (4, 4), (0, 0), (1, 1), 1, 2)) == "pointer_rows"
    conv4 = choice.choose(layer("paper conv4", 256))
    assert (conv4.block_n, halves(conv4.block_n)) == (192, (128, 64))
    assert (depths(48, 32, False), depths(48, 64, False), depths(256, 64, False)) == ((32, 16), (32, 16), (64, 0))
    assert (depths(48, 64, True), depths(80, 64, False)) == ((64, 16), (64, 16))


@pytest.mark.parametrize(
    ("form", "case", "precision", "message"),
    [
        ("halo", ((64, 32, 5, 5), (32, 32, 3, 3), *SAME), "tf32", "form='halo' is none of batch_tile, pixel_pair, pointer_rows,"),
        ("batch_tile", ((64, 24, 5, 5), (32, 24, 3, 3), *SAME), "tf32", "24 channels a group are no multiple of 16"),
        ("batch_tile", ((64, 32, 5, 5), (32, 32, 3, 3), *SAME), "ieee", "precision ieee goes through registers"),
        ("pixel_pair", ((64, 32, 5, 5), (32, 32, 3, 3), (1, 2), (1, 1), (1, 1), 1), "tf32", "stride 2 is not dilation 1"),
        ("group_major", ((64, 32, 5, 5), (32, 32, 3, 3), (1, 1), (1, 1), (1, 2), 1), "tf32", "dilation 2 parts the taps"),
        ("pixel_pair", ((64, 32, 19, 40), (32, 32, 1, 39), *SAME), "tf32", "bytes of shared memory are too many"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_says_why(form: str, case: Any, precision: str, message: str) -> None:
    shape, weight, *geometry = case
    with pytest.raises(ValueError, match=message):
        choice.choose(Problem.of(shape, weight, *geometry, 4), precision, form)


def test_descriptors_need_dense_aligned_images() -> None:
    x = torch.empty(64, 32, 4, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"x is not dense with its channels innermost.*form='pointer_rows' takes any"):
        choice.choose(Problem.of(x.shape, (32, 32, 3, 3), *SAME, 4), "tf32", "batch_tile", described=False)


def test_the_tuned_table_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless its tile cannot do it, or wants another layout; another layer, or another type, is not meant."""
    x = torch.empty(256, 256, 13, 13, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    packed, y = torch.empty(384, 2304, dtype=x.dtype, device="meta"), torch.empty_like(x).repeat(1, 2, 1, 1)[:, :384]
    problem = layer("paper conv3", 256)
    pair, impossible = Tile("pixel_pair", 64, 128, 32, 4, 2), Tile("pixel_pair", 128, 128, 96)
    towers = Tile("group_major", 64, 128, 64, 8, 2)
    for tile, name in ((pair, "pixel_pair"), (impossible, "batch_tile"), (towers, "batch_tile")):
        monkeypatch.setattr(kernel, "tuned", lambda *_, tile=tile: {"many 256x3x3-384 16 bits": tile})
        kernel.tile_of.cache_clear()
        launch = kernel.plan(x, packed, None, y, problem, True, "tf32")
        assert launch.name == name
        assert (launch.num_warps, launch.num_stages) == ((4, 2) if tile is pair else (4, 3))
    few = layer("paper conv3", 1)
    assert choice.name_of(few, choice.choose(few), "tf32") == "few 256x3x3-384 16 bits"
    assert choice.name_of(layer("paper conv3", 256, 4), pair, "tf32") == "many 256x3x3-384 tf32"


def test_what_ships_can_be_described() -> None:
    rows = dict(kernel.tiles())
    assert len(rows) > 60
    conv3 = rows["batch_tile paper conv3 bfloat16 batch 256"]
    assert conv3 == {
        "form": "batch_tile", "block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 3,
        "shared bytes": 98304, "programs": 1014, "loops": 1, "issued / nominal": pytest.approx((37 / 39) ** 2),
    }  # fmt: skip
    assert all(row["shared bytes"] < choice.SHARED_BYTES for row in rows.values())


def test_whole_vectors_are_read_where_they_are_whole() -> None:
    """As many channels as 16 bytes hold, unless a stride, of a dimension that has one, parts them."""

    def vector(x: Tensor, groups: int = 1) -> int:
        weight = torch.empty(32, x.shape[1] // groups, 1, 1, dtype=x.dtype)
        y = torch.empty(x.shape[0], 32, *x.shape[2:], dtype=x.dtype)
        problem = Problem.of(x.shape, weight.shape, (1, 1), (0, 0), (1, 1), groups, x.element_size())
        launch = kernel.plan(x, kernel.pack(weight), None, y, problem, False, "tf32", "pointer_rows")
        return int(launch.constants["BLOCK"][3])

    x = torch.empty(2, 24, 3, 5).contiguous(memory_format=torch.channels_last)
    assert (vector(x), vector(x.half()), vector(x.half(), 2), vector(x.half(), 8)) == (4, 8, 4, 1)
    assert vector(x.contiguous()) == 1
    assert vector(torch.empty(1, 64, 1, 1).half()) == 8
    assert vector(torch.empty(2, 3, 5, 28).permute(0, 3, 1, 2)[:, :24]) == 4
    assert vector(torch.empty(2, 3, 5, 25).permute(0, 3, 1, 2)[:, :24]) == 1


def test_blocks_that_fit_on_a_multiprocessor() -> None:
    assert resident(154, 98_328, 4) == 2  # by shared memory
    assert resident(255, 98_328, 8) == 1  # by registers
    assert resident(32, 0, 1) == 32 and resident(32, 0, 16) == 4


# ------------------------------------------------------------------------------------------- more than 2^31 elements

# The last tile of images, or of pixels, lacks one; the second shape has more than 2^31 output pixels too.
MANY, PIXELS = (8191, 96, 55, 55), (2**23 - 1, 16, 16, 17)


@pytest.mark.skipif(not INTERPRETED, reason="records the addresses that the interpreter forms")
@pytest.mark.parametrize(
    ("form", "shape", "last"),
    [
        ("batch_tile", MANY, True),
        ("pixel_pair", MANY, True),
        ("pointer_rows", MANY, True),
        ("pointer_rows", MANY, False),
        ("pointer_rows", PIXELS, True),
    ],
    ids=name,
)
def test_addresses_beyond_int32(form: str, shape: tuple[int, ...], last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program reads and writes the end of tensors of 2^31 elements and more, and nothing that it must not."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=layout)
    images, channels = shape[:2]
    pixels = shape[2] * shape[3]
    packed = torch.empty(channels, channels, dtype=torch.bfloat16, device="meta")
    problem = Problem.of(shape, (channels, channels, 1, 1), (1, 1), (0, 0), (1, 1), 1, 2)
    rows = 16 if shape is MANY else 32
    launch = kernel.launch_of(x, packed, None, x, problem, False, "tf32", Tile(form, rows, 16, 16))
    written, _, *reads = addresses(launch, launch.grid[0] - 1, monkeypatch)

    def elements(images: range, places: range, channels: range) -> set[int]:
        step = (pixels * x.shape[1], *((x.shape[1], 1) if last else (1, pixels)))
        return {n * step[0] + p * step[1] + c * step[2] for n in images for p in places for c in channels}

    left = images * pixels % rows if form == "pointer_rows" else images % rows
    assert 0 < left < rows
    if form == "pointer_rows":
        ends = range(images - 1, images), range(pixels - left, pixels)
    else:
        ends = range(images - left, images), range(pixels - 1, pixels)
    assert written == elements(*ends, range(channels - 16, channels))
    assert reads[0] == elements(*ends, range(channels))
    assert reads[1] == set(range((channels - 16) * channels, channels * channels))
    assert max(reads[0]) == x.numel() - 1 > 2**31
