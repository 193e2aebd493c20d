"""The Triton gradients of a convolution against fp64 and against exact integers, in the interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nowhere import addresses
from torch import Tensor

from alexnet_kernels.kernels import _conv_backward_choice as choice
from alexnet_kernels.kernels import conv_backward as kernel
from alexnet_kernels.kernels._conv_geometry import Problem, halves
from alexnet_kernels.kernels._launch import Tile, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = (torch.float16, torch.bfloat16)
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of rounding a result
# Of one product: tf32 keeps 10 bits of both operands, three of its products nearly all of fp32's. Exact in the interpreter.
PRODUCT = {"tf32": 2.0**-9, "tf32x3": 2.0**-19, "ieee": 0.0}
# (stride, padding, dilation), groups
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
SAME: Geometry = ((1, 1), (1, 1), (1, 1), 1)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and partial sums start as NaN, so that an element that no program writes shows."""
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: real(*a, **kw).fill_(float("nan")))


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has both gradients computed in given tiles, which the interpreter gets through, and K split into ``splits``."""

    def use(dx: Tile, dw: Tile, splits: int) -> None:
        monkeypatch.setattr(kernel, "choose", lambda kind, *_: dx if kind == "input" else dw)
        monkeypatch.setattr(kernel, "splits_of", lambda *_: splits)

    return use


def laid_out(t: Tensor, innermost: bool) -> Tensor:
    return t.to(DEVICE).contiguous(memory_format=torch.channels_last if innermost else torch.contiguous_format)


def drawn(shape: tuple[int, ...], weight: tuple[int, ...], g: Geometry, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``x``, ``w`` and ``dy`` in fp64; ``exact``, integers so few and small that no sum is rounded in any type."""
    make = (lambda s: torch.randint(-1, 2, s) * (torch.rand(s) < 0.4)) if exact else torch.randn
    x, w = make(shape).double(), make(weight).double()
    return x, w, make(tuple(F.conv2d(x, w, None, *g).shape)).double()


def oracle(x: Tensor, w: Tensor, dy: Tensor, g: Geometry) -> tuple[Tensor, Tensor]:
    """``dx`` and ``dw`` in fp64, or of whatever the operands are."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, w, None, *g), (x, w), dy)


def both(x: Tensor, w: Tensor, dy: Tensor, g: Geometry, precision: str = "tf32") -> tuple[Tensor, Tensor]:
    dx, nothing = kernel.input_gradient(dy, w, x.shape, *g, precision)
    assert nothing is None
    return dx, kernel.weight_gradient(dy, x, w.shape, *g, precision)


def check_exact(shape: Any, weight: Any, g: Geometry, dtype: torch.dtype, innermost: bool) -> None:
    x, w, dy = drawn(shape, weight, g, True)
    expected = oracle(x, w, dy, g)
    x, dy = (laid_out(t.to(dtype), innermost) for t in (x, dy))
    results = both(x, laid_out(w.to(dtype), innermost), dy, g)
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == dtype and torch.equal(result.double().cpu(), exact)
    layout = torch.channels_last if innermost else torch.contiguous_format
    assert results[0].is_contiguous(memory_format=layout) or dy.shape[2:].numel() == 1  # which has both layouts
    assert results[1].is_contiguous()


IMAGES = Tile("tile", 32, 32, 16)
PIXELS = Tile("rows", 64, 32, 16)
# shape of x, of the weight, geometry, tiles of dx and dw, splits
TILED = [
    ((34, 32, 3, 3), (32, 32, 3, 3), SAME, IMAGES, replace(IMAGES, block_k=32), 3),
    (
        (16, 96, 1, 3),
        (64, 48, 3, 5),
        ((1, 1), (1, 2), (1, 1), 2),
        replace(IMAGES, block_n=48),
        Tile("tile", 32, 240, 16),
        2,
    ),
    (
        (20, 32, 3, 2),
        (48, 32, 3, 2),
        ((1, 1), (1, 0), (1, 1), 1),
        IMAGES,
        Tile("tile", 48, 48, 32),
        2,
    ),  # four accumulators
    (
        (16, 48, 5, 4),
        (48, 16, 3, 2),
        ((2, 1), (1, 1), (1, 2), 3),
        IMAGES,
        Tile("tile", 16, 32, 16),
        2,
    ),  # strides, dilation
    (
        (17, 16, 5, 3),
        (16, 16, 2, 3),
        ((3, 2), (0, 1), (2, 1), 1),
        replace(IMAGES, block_m=16),
        Tile("tile", 16, 32, 16),
        1,
    ),
    (
        (16, 16, 6, 4),
        (16, 16, 1, 1),
        ((4, 2), (0, 0), (1, 1), 1),
        IMAGES,
        IMAGES,
        8,
    ),  # most pixels have no tap, shares no step
    (
        (8, 24, 3, 2),
        (32, 24, 1, 1),
        ((1, 1), (0, 0), (1, 1), 1),
        IMAGES,
        Tile("tile", 16, 16, 16),
        2,
    ),  # channels fill no tile
    (
        (16, 16, 2, 3),
        (16, 16, 3, 3),
        ((1, 1), (4, 4), (4, 1), 1),
        IMAGES,
        Tile("tile", 16, 48, 16),
        1,
    ),  # taps only in padding
    ((33, 16, 1, 1), (32, 16, 1, 1), ((1, 1), (0, 0), (1, 1), 1), IMAGES, IMAGES, 2),  # a linear layer
]


@pytest.mark.parametrize("case", range(len(TILED)))
def test_tiles_of_images_are_exact(case: int, tiles: Callable[..., None]) -> None:
    shape, weight, g, dx, dw, splits = TILED[case]
    tiles(dx, dw, splits)
    check_exact(shape, weight, g, HALF[case % 2], True)  # both types in turn: the kernels do not ask which


ROWED = [
    ((2, 7, 4, 5), (20, 7, 3, 3), SAME),
    ((1, 9, 6, 5), (6, 3, 3, 2), ((1, 2), (1, 0), (1, 1), 3)),  # odd channels, which fill no step
    ((3, 5, 7, 8), (3, 5, 3, 2), ((2, 3), (1, 0), (3, 2), 1)),
    ((2, 6, 5, 6), (40, 3, 2, 2), ((4, 2), (0, 1), (2, 2), 2)),  # a common divisor: classes that no tap reaches
    ((1, 3, 9, 11), (8, 3, 7, 11), ((4, 4), (2, 2), (1, 1), 1)),
    ((5, 7, 2, 1), (4, 7, 1, 1), ((3, 3), (0, 0), (1, 1), 1)),  # a map that is smaller than the stride
    ((2, 4, 3, 3), (4, 4, 3, 3), ((1, 1), (4, 4), (4, 1), 1)),
    ((2, 6, 3, 2), (6, 1, 2, 2), ((1, 1), (1, 1), (1, 1), 6)),  # depthwise
]


@pytest.mark.parametrize("innermost", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("case", range(len(ROWED)))
def test_rows_of_pixels_are_exact(case: int, innermost: bool, tiles: Callable[..., None]) -> None:
    tiles(PIXELS, PIXELS, 2)
    check_exact(*ROWED[case], (torch.float32, *HALF)[case % 3], innermost)


@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize(
    ("shape", "weight", "padding"),
    [((2, 3, 1, 1), (4, 3, 1, 1), (0, 1)), ((2, 1, 3, 2), (4, 1, 2, 2), (1, 1)), ((2, 4, 3, 3), (1, 4, 3, 3), (0, 0))],
)
def test_a_tensor_of_both_layouts(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    padding: tuple[int, int],
    innermost: bool,
    tiles: Callable[..., None],
) -> None:
    """Maps of one pixel, or one channel, lie in both orders, and do not say in which the other tensor lies."""
    tiles(Tile("rows", 64, 16, 16), Tile("rows", 16, 64, 32), 1)
    for seed in range(4):
        torch.manual_seed(seed)
        check_exact(shape, weight, ((1, 1), padding, (1, 1), 1), torch.float16, innermost)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data: st.DataObject, tiles: Callable[..., None]) -> None:
    """Whatever the geometry, either form: at most a few hundred steps of small tiles."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    groups, form = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(["tile", "rows"]))
    taps, size = pair(1, 4), pair(1, 7)
    g: Geometry = pair(1, 4), pair(0, 3), pair(1, 3), groups
    assume(all(size[i] + 2 * g[1][i] > g[2][i] * (taps[i] - 1) for i in (0, 1)))
    channels = st.sampled_from([8, 16, 24]) if form == "tile" else st.integers(1, 9)
    width = 16 if form == "tile" else data.draw(channels)
    depth, images = data.draw(channels), data.draw(st.sampled_from([1, 3, 16, 19]))
    rows = Tile("rows", 64, 16, 16), Tile("rows", 16, 64, 32)
    dx, dw = (
        (Tile("tile", 16, 16, 16), Tile("tile", 16, 16 * data.draw(st.integers(1, 3)), 16)) if form == "tile" else rows
    )
    tiles(dx, dw, data.draw(st.integers(1, 3)))
    innermost = form == "tile" or data.draw(st.booleans())
    problem = Problem.of((images, groups * depth, *size), (groups * width, depth, *taps), *g, 2)
    steps = sum(choice.issued(k, problem, t) / (t.block_m * 16 * t.block_k) for k, t in (("input", dx), ("weight", dw)))
    assume(steps <= 60)
    torch.manual_seed(data.draw(st.integers(0, 2**16)))  # so that a failing case fails again
    check_exact((images, groups * depth, *size), (groups * width, depth, *taps), g, torch.float16, innermost)


def within(result: Tensor, exact: Tensor, terms: Tensor, length: int, dtype: torch.dtype, precision: str) -> None:
    """``|result - exact|`` is at most the error of the products, of ``length`` additions in fp32, and of one rounding.

    ``terms`` is the sum of the products' magnitudes. Additions may be in any order.
    """
    product = PRODUCT[precision] if dtype == torch.float32 and not INTERPRETED else 0.0
    bound = (product + length * EPS[torch.float32]) * terms + EPS[dtype] * exact.abs() + 2.0**-24
    error = (result.double().cpu() - exact).abs()
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "tf32"), (torch.bfloat16, "tf32"), *((torch.float32, p) for p in PRODUCT)],
)
@pytest.mark.parametrize("form", ["tile", "rows"])
def test_error_is_what_the_types_cost(
    form: str, dtype: torch.dtype, precision: str, tiles: Callable[..., None]
) -> None:
    if form == "tile" and dtype == torch.float32:
        pytest.skip("tiles of images take 16-bit types: wgmma reads tf32 operands in one order only")
    tiles(*((IMAGES, Tile("tile", 32, 96, 16)) if form == "tile" else (PIXELS, PIXELS)), 2)
    x, w, dy = (t.to(dtype) for t in drawn((20, 32, 3, 3), (32, 32, 3, 3), SAME, False))
    exact = oracle(x.double(), w.double(), dy.double(), SAME)
    terms = oracle(x.double().abs(), w.double().abs(), dy.double().abs(), SAME)
    results = both(laid_out(x, True), laid_out(w, True), laid_out(dy, True), SAME, precision)
    for result, value, size, length in zip(results, exact, terms, (9 * 32, 20 * 9), strict=True):
        within(result, value, size, length, dtype, precision)


@pytest.mark.parametrize("form", ["tile", "rows", "planes"])
@pytest.mark.parametrize("masked", [True, False])
def test_mask_and_bias_gradient(form: str, masked: bool, tiles: Callable[..., None]) -> None:
    """Zero where the activation is, also where the gradient is NaN; NaN of the activation lets the gradient through."""
    tiles(*((replace(IMAGES, block_n=48), IMAGES) if form == "tile" else (PIXELS, PIXELS)), 1)
    channels = 44 if form == "planes" else 48  # 8·m channels would be copied to channels_last
    x, w, dy = drawn((18, channels, 3, 4), (16, channels, 3, 3), SAME, True)
    dx, _ = oracle(x, w, dy, SAME)
    x[:, 0], x[:, 1], x[0, 2] = float("nan"), -0.0, float("inf")
    expected = torch.where(x <= 0, 0.0, dx) if masked else dx
    innermost = form != "planes"
    x, w, dy = (laid_out(t.half(), innermost) for t in (x, w, dy))
    mask = x if masked else None
    result, bias = kernel.input_gradient(dy, w, x.shape, *SAME, "tf32", mask, True)
    assert torch.equal(result.double().cpu(), expected)
    assert bias is not None and (bias.dtype, bias.shape) == (torch.float16, (channels,))
    assert torch.equal(bias.double().cpu(), expected.sum((0, 2, 3)))
    alone, nothing = kernel.input_gradient(dy, w, x.shape, *SAME, "tf32", mask)
    assert nothing is None and torch.equal(alone, result)
    dy[3, 5, 1, 1] = float("nan")
    result, bias = kernel.input_gradient(dy, w, x.shape, *SAME, "tf32", mask, True)
    reached = torch.zeros(x.shape, dtype=torch.bool)
    reached[3, :, 0:3, 0:3] = True  # a NaN of dy times a zero weight is NaN too
    unmasked = ~(x <= 0).cpu() if masked else torch.ones_like(reached)
    assert torch.equal(result.isnan().cpu(), reached & unmasked)
    assert torch.equal(bias.isnan().cpu(), (reached & unmasked).any(3).any(2).any(0))


def test_bias_gradient_is_summed_before_rounding(tiles: Callable[..., None]) -> None:
    """1/3 and many of it: the sum of rounded values would be off by far more than one rounding of the sum."""
    tiles(IMAGES, IMAGES, 1)
    dy, w = torch.full((32, 16, 4, 4), 1 / 3).half(), torch.full((16, 16, 1, 1), 0.1).half()
    _, bias = kernel.input_gradient(
        laid_out(dy, True), laid_out(w, True), (32, 16, 4, 4), (1, 1), (0, 0), (1, 1), 1, "tf32", None, True
    )
    exact = dy[0, 0, 0, 0].double() * w[0, 0, 0, 0].double() * 16 * 512
    assert bias is not None
    assert (bias.double().cpu() - exact).abs().max() <= (EPS[torch.float16] + 528 * EPS[torch.float32]) * exact


@pytest.mark.parametrize("form", ["tile", "rows"])
def test_equal_inputs_give_equal_bits(form: str, tiles: Callable[..., None]) -> None:
    tiles(*((IMAGES, Tile("tile", 32, 96, 16)) if form == "tile" else (PIXELS, PIXELS)), 3)
    x, w, dy = (laid_out(t.half(), True) for t in drawn((36, 32, 2, 3), (32, 32, 3, 3), SAME, False))
    runs = [
        (
            *kernel.input_gradient(dy, w, x.shape, *SAME, "tf32", x, True),
            kernel.weight_gradient(dy, x, w.shape, *SAME, "tf32"),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_no_images() -> None:
    x, w, dy = (torch.zeros(s, device=DEVICE) for s in ((0, 6, 5, 5), (4, 6, 3, 3), (0, 4, 5, 5)))
    for last in (True, False):
        x, dy = laid_out(x, last), laid_out(dy, last)
        dx, bias = kernel.input_gradient(dy, w, x.shape, *SAME, "tf32", x, True)
        assert bias is not None and dx.shape == x.shape and torch.equal(bias, torch.zeros(6, device=DEVICE))
        assert torch.equal(kernel.weight_gradient(dy, x, w.shape, *SAME, "tf32"), torch.zeros_like(w))


def test_a_pixel_that_no_tap_reaches_is_zero_whatever_the_weights(tiles: Callable[..., None]) -> None:
    """Not zero times a weight, which may be infinite."""
    w = laid_out(torch.full((16, 16, 1, 1), float("inf")).half(), True)
    for tile in (IMAGES, PIXELS):
        tiles(tile, tile, 1)
        dy = laid_out(torch.ones(16, 16, 2, 2).half(), True)
        dx, _ = kernel.input_gradient(dy, w, (16, 16, 4, 3), (2, 2), (0, 0), (1, 1), 1, "tf32")
        hit = torch.zeros(4, 3, dtype=torch.bool)
        hit[::2, ::2] = True
        assert dx[:, :, hit].isinf().all() and not dx[:, :, ~hit].any()


def test_other_layouts_and_addresses() -> None:
    """A slice is copied, planes of 8·m channels too; what does not begin at 16 bytes is not described; layouts may differ
    between the operands."""
    g: Geometry = ((1, 1), (0, 0), (1, 1), 1)
    x, w, dy = (t.half() for t in drawn((16, 16, 2, 3), (16, 16, 1, 1), g, True))
    exact = oracle(x.double(), w.double(), dy.double(), g)
    wide = torch.cat([dy, dy], 3)[..., :3].to(DEVICE)
    shifted = torch.empty(dy.numel() + 1, dtype=torch.float16, device=DEVICE)[1:]
    shifted = shifted.view(16, 2, 3, 16).permute(0, 3, 1, 2).copy_(dy)
    assert not wide.is_contiguous() and shifted.data_ptr() % 16
    for grad in (wide, shifted, laid_out(dy, True), laid_out(dy, False)):
        for last in (True, False):
            results = both(laid_out(x, last), laid_out(w, not last), grad, g)
            assert results[0].is_contiguous() == (not grad.is_contiguous(memory_format=torch.channels_last))
            assert all(torch.equal(a.double().cpu(), b) for a, b in zip(results, exact, strict=True))


LAYERS = {
    "conv2": ((96, 27, 27), (256, 48, 5, 5), 2),
    "conv3": ((256, 13, 13), (384, 256, 3, 3), 1),
    "conv4": ((384, 13, 13), (384, 192, 3, 3), 2),
    "conv5": ((384, 13, 13), (256, 192, 3, 3), 2),
}


def layer(name: str, images: int) -> Problem:
    shape, weight, groups = LAYERS[name]
    half = weight[2] // 2
    return Problem.of((images, *shape), weight, (1, 1), (half, half), (1, 1), groups, 2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("images", [128, 256])
@pytest.mark.parametrize("kind", ["input", "weight"])
def test_no_product_is_wasted_on_alexnet(kind: str, images: int, name: str) -> None:
    """Padding is never multiplied: fewer products than the usual count. In halves of a batch, and of rows, a few more."""
    problem = layer(name, images)
    tile = choice.choose(kind, problem, True, True, True)
    splits = choice.splits_of(problem, tile) if kind == "weight" else 1
    assert tile.form == "tile" and choice.issued(kind, problem, tile, splits) <= problem.nominal
    if kind == "weight":  # whole waves of programs: at least nine tenths of the multiprocessors have one at any time
        programs = choice.weight_tiles(problem, tile) * splits
        assert programs / (-(-programs // choice.MULTIPROCESSORS) * choice.MULTIPROCESSORS) >= 0.9


def test_the_form_follows_images_and_memory() -> None:
    def form(kind: str, images: int, described: bool = True, innermost: bool = True, name: str = "conv3") -> Tile:
        return choice.choose(kind, layer(name, images), described, innermost, True)

    for kind in ("input", "weight"):
        assert form(kind, 4).form == "rows"  # four images do not make a tile
        assert form(kind, 256, described=False).form == form(kind, 256, False, False).form == "rows"
        assert form(kind, 256, False, True) != form(kind, 256, False, False)  # planes are read an element at a time
        assert {form(kind, n).form for n in (64, 128, 192, 256, 1024, 8192)} == {"tile"}
    assert form("input", 128).block_m == 128 and form("input", 64).block_m == 64
    assert form("weight", 32).block_k == 32
    odd = Problem.of((128, 9, 5, 5), (24, 9, 3, 3), (1, 1), (1, 1), (1, 1), 1, 2)
    assert choice.choose("input", odd, True, True, True).form == "rows"  # no step of 16 divides 24 output channels


@pytest.mark.parametrize("kind", ["input", "weight"])
def test_tiles_for_any_channels_fit(kind: str) -> None:
    """In shared memory, in registers, in whole rows of wgmma; no channels are computed twice over for a wider tile."""
    for width, depth, taps in product((16, 48, 64, 96, 192, 320), (16, 24, 48, 80, 128, 512), (1, 3, 11)):
        problem = Problem.of((128, depth, 12, 12), (width, depth, taps, taps), (1, 1), (5, 5), (1, 1), 1, 2)
        tile = choice.choose(kind, problem, True, True, True)
        assert tile.form == "tile"
        assert tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * 2 < 230_000, (problem, tile)
        assert tile.block_m * tile.block_n <= 192 * 32 * tile.num_warps, (problem, tile)
        parts = (halves(tile.block_m), halves(choice.taps_of(problem, tile)[1] if kind == "weight" else tile.block_n))
        assert all(size == 0 or size & (size - 1) == 0 for pair in parts for size in pair)
        assert all(size == 0 or size >= 64 for size in parts[0]) and min(parts[1][0], depth) >= 16
        columns = sum(parts[1])
        assert -(-depth // columns) * columns <= max(1.25 * (-(-depth // 16) * 16), 32), (problem, tile)


def test_tuned_tiles_are_taken() -> None:
    tile = Tile("tile", 64, 64, 32)
    for kind in ("input", "weight"):
        assert choice.choose(kind, layer("conv4", 256), True, True, True, tile) == tile


@pytest.mark.skipif(not INTERPRETED, reason="counts the products that the interpreter makes")
@pytest.mark.parametrize("case", [TILED[i] for i in (2, 4, 5, 7)] + [(*c, PIXELS, PIXELS, 2) for c in ROWED[1:3]])
def test_products_issued_are_those_counted(
    case: Any, tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import interpreter_builder

    shape, weight, g, dx, dw, splits = case
    tiles(dx, dw, splits)
    made = [0]
    dot = interpreter_builder.create_dot

    def counted(a: Any, b: Any, *c: Any) -> Any:
        made[0] += a.data.size * b.data.shape[1]
        return dot(a, b, *c)

    monkeypatch.setattr(interpreter_builder, "create_dot", counted)
    x, w, dy = (laid_out(t.half(), True) for t in drawn(shape, weight, g, True))
    problem = Problem.of(shape, weight, *g, 2)
    kernel.input_gradient(dy, w, shape, *g, "tf32")
    assert made[0] == choice.issued("input", problem, dx)
    made[0] = 0
    kernel.weight_gradient(dy, x, weight, *g, "tf32")
    assert made[0] == choice.issued("weight", problem, dw, splits)


MANY = (8192, 96, 55, 55)


@pytest.mark.skipif(not INTERPRETED, reason="records the addresses that the interpreter forms")
@pytest.mark.parametrize("form", ["tile", "rows"])
@pytest.mark.parametrize("innermost", [True, False], ids=["channels_last", "contiguous"])
def test_addresses_beyond_int32(
    form: str, innermost: bool, tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program of each gradient touches the end of tensors of more than 2^31 elements, and nothing that it must not."""
    if form == "tile" and not innermost:
        pytest.skip("descriptors read channels_last maps only")
    image, pixels = 96 * 55 * 55, 55 * 55
    x = torch.empty(MANY, dtype=torch.bfloat16, device="meta").contiguous(
        memory_format=torch.channels_last if innermost else torch.contiguous_format
    )
    w = torch.empty(96, 96, 1, 1, dtype=torch.bfloat16, device="meta")
    problem = Problem.of(MANY, w.shape, (1, 1), (0, 0), (1, 1), 1, 2)
    tiles(Tile(form, 16, 16, 16), Tile(form, 16, 16, 16), MANY[0] * pixels // 16)

    def elements(images: range, places: range, channels: range) -> set[int]:
        pixel, channel = (96, 1) if innermost else (1, pixels)
        return {n * image + p * pixel + c * channel for n in images for p in places for c in channels}

    launch, _ = kernel.plan_input(x, kernel.pack(w), x, x, problem, "tf32", False)
    touched = addresses(launch, launch.grid[0] - 1, monkeypatch)
    if form == "tile":
        mask, written, _, read = touched[:4]
        where = range(MANY[0] - 16, MANY[0]), range(pixels - 1, pixels)
    else:
        read, _, mask, written = touched[:4]
        where = range(MANY[0] - 1, MANY[0]), range(pixels - 16, pixels)
    assert written == mask == elements(*where, range(80, 96))
    assert read == elements(*where, range(96)) and max(read) == x.numel() - 1 > 2**31

    shares, _ = kernel.plan_weight(x, x, w, problem, "tf32")
    touched = addresses(shares, shares.grid[0] - 1, monkeypatch)
    read_y, read_x = (touched[1], touched[3]) if form == "tile" else touched[:2]
    partial = touched[0 if form == "tile" else 2]
    assert read_y == read_x == elements(*where, range(80, 96))
    last = MANY[0] * pixels // 16 * 96 * 96
    assert partial == {last - 96 * 96 + o * 96 + c for o in range(80, 96) for c in range(80, 96)} and last > 2**31


def test_shares_are_added_in_order() -> None:
    """The second kernel alone: it writes the parameter's layout from many shares, and 1e8 + 1 - 1e8 is 0 in fp32."""
    problem = Problem.of((1, 3, 4, 4), (5, 3, 2, 2), (1, 1), (0, 0), (1, 1), 1, 4)
    partial = torch.zeros(4, 5, 12, device=DEVICE)
    partial[0], partial[1], partial[2] = 1e8, 1.0, -1e8
    partial[3] = torch.arange(60.0, device=DEVICE).view(5, 12)
    dw = torch.empty(5, 3, 2, 2, device=DEVICE)
    run(kernel.plan_sum(partial, dw, problem))
    assert torch.equal(dw, torch.arange(60.0, device=DEVICE).view(5, 2, 2, 3).permute(0, 3, 1, 2))
