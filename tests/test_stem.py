"""AlexNet's first block on images through every seam, on a stand-in for the compiled kernels that has their schemas."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import stand_in
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import alexnet_kernels as ak
from alexnet_kernels import _extension, dispatch, nn, reference
from alexnet_kernels import functional as F
from alexnet_kernels._fusion import steps
from alexnet_kernels.convert import convert, revert
from alexnet_kernels.ops import _stem_arguments, _stem_ways, fused, stem

tnn = torch.nn
LAYOUTS = (torch.contiguous_format, torch.channels_last)
MEAN, SCALE = (122.679, 116.669, 104.007), (1.0, 0.5, 0.25)
NORM, POOL = (5, 1e-4, 0.75, 2.0), (3, 2, 0, 1, False)
BLOCK = (5, 2e-5, 0.75, 2.0, 1, (3, 3, 2, 2, 0, 0, 1, 1), False)  # size, scale, beta, k, groups, window, ceil_mode
UNEVEN = (0, 3, 2, 1)  # top, bottom, left, right

# What the compiled library registers: the operations are called by position, so their schemas are a contract.
IMAGE = "Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? scale, int[] padding"
CONTRACT = {
    "conv1": f"({IMAGE}, bool relu) -> Tensor",
    "stem": f"({IMAGE}, bool relu, int size, float lrn_scale, float beta, float k, int groups, int[] window, "
    "bool ceil_mode, bool pool_first, bool keep) -> (Tensor y, Tensor a, Tensor place)",
    "conv1_backward": "(Tensor grad, Tensor? a, Tensor x, Tensor weight, Tensor? mean, Tensor? scale, int[] padding, "
    "bool[] mask) -> (Tensor dx, Tensor dw, Tensor db)",
}


def _image(x: Tensor, mean: Tensor | None, scale: Tensor | None, dtype: torch.dtype, padding) -> Tensor:
    """The prepared image, rounded to the dtype, inside its zeros, in fp64."""
    if mean is not None:
        x = torch.stack([(x[:, c].float() - mean[c]) * scale[c] for c in range(3)], 1)
    top, bottom, left, right = padding
    padded = torch.zeros(len(x), 3, top + x.shape[2] + bottom, left + x.shape[3] + right, dtype=torch.double)
    padded[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x.to(dtype).double()
    return padded


def _places(image: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [OH, 11, 1, 1] and columns [OW, 11] that each tap of each window reads."""
    rows, columns = (4 * torch.arange((side - 11) // 4 + 1)[:, None] + torch.arange(11) for side in image.shape[2:])
    return rows[:, :, None, None], columns


def conv1(x, weight, bias, mean, scale, padding, relu) -> Tensor:
    image = _image(x, mean, scale, weight.dtype, padding)
    rows, columns = _places(image)
    a = torch.einsum("nchiwj,ocij->nohw", image[:, :, rows, columns], weight.double())
    a = a if bias is None else a + bias.double().view(1, -1, 1, 1)
    return (a.clamp_min(0) if relu else a).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def stem_by_two(x, weight, bias, mean, scale, padding, relu, *block) -> tuple[Tensor, Tensor, Tensor]:
    *norm, window, ceil_mode, pool_first, keep = block
    a = conv1(x, weight, bias, mean, scale, padding, relu)
    y, place = stand_in.lrn_pool(a, None, False, *norm, window, ceil_mode, pool_first, keep)
    return y.contiguous(memory_format=torch.channels_last), a if keep else a.new_empty(0), place


def conv1_backward(grad, a, x, weight, mean, scale, padding, mask) -> tuple[Tensor, Tensor, Tensor]:
    assert all(t is None or t.is_contiguous(memory_format=torch.channels_last) for t in (grad, a))
    g = grad.double() if a is None else grad.double().where(~(a <= 0), 0)
    image = _image(x, mean, scale, weight.dtype, padding)
    rows, columns = _places(image)
    dw = torch.einsum("nohw,nchiwj->ocij", g, image[:, :, rows, columns])
    dx = torch.zeros_like(image)
    if mask[0]:
        n, c = (torch.arange(image.shape[axis]).view(-1, *[1] * (5 - axis)) for axis in (0, 1))
        spread = torch.einsum("nohw,ocij->nchiwj", g, weight.double())
        dx.index_put_((n, c, rows, columns), spread, accumulate=True)
    top, _, left, _ = padding
    dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]].to(x.dtype)
    found = (dx, dw.to(weight.dtype), g.sum((0, 2, 3)).to(weight.dtype))
    parts = [part if wanted else part.new_empty(0) for part, wanted in zip(found, mask, strict=True)]
    for i, like in enumerate((x, weight)):
        if mask[i] and not like.is_contiguous():
            parts[i] = parts[i].contiguous(memory_format=torch.channels_last)
    return tuple(parts)


_STAND_INS = torch.library.Library("alexnet_kernels_contract", "DEF")
for _name, _run in (("conv1", conv1), ("stem", stem_by_two), ("conv1_backward", conv1_backward)):
    _STAND_INS.define(_name + CONTRACT[_name])
    _STAND_INS.impl(_name, _run, "CompositeExplicitAutograd")


def _stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stem_ways, "_DEVICE", "cpu")
    monkeypatch.setattr(_stem_ways, "_CHANNELS", (8, 16, 48))
    monkeypatch.setattr(_stem_ways, "_DTYPES", (*_stem_ways._DTYPES, torch.float64))
    monkeypatch.setattr(_stem_ways, "_library_why_not", lambda *_: None)
    monkeypatch.setattr(_stem_ways, "_compiled", lambda op: getattr(torch.ops.alexnet_kernels_contract, op).default)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled operations run, on CPUs, in fp64 too, and for few channels."""
    _stand(monkeypatch)


@pytest.fixture(params=["kernel", "parts"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel, and as separate operations, as on a machine without it."""
    if request.param == "kernel":
        _stand(monkeypatch)
    return request.param


def ran(call: Callable[[], object]) -> set[str]:
    with dispatch.recording() as used:
        call()
    return used


def relative(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm().clamp_min(1e-300))


def pixels(n: int = 2, height: int = 27, width: int = 31, layout: torch.memory_format = LAYOUTS[1]) -> Tensor:
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8).contiguous(memory_format=layout)


def weights(out: int = 16, dtype: torch.dtype = torch.float32, size: int = 11) -> tuple[Tensor, Tensor]:
    return (torch.randn(out, 3, size, size) / 200).to(dtype), torch.randn(out).to(dtype)


def numbers(**options: object) -> dict[str, object]:
    return {"mean": MEAN, "scale": SCALE} | options


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.bfloat16])
def test_is_its_definition_in_fp64(
    either: str, dtype: torch.dtype, layout: torch.memory_format, kind: torch.dtype
) -> None:
    """Convolution alone, with ReLU, and the block in both orders, with and without ReLU. Sums of 363 products in fp32 may
    err by their number's root; whatever is rounded to the dtype once more adds its half unit: image, map, norm and result."""
    x, (w, b), options = pixels(layout=layout), weights(dtype=dtype), numbers()
    if kind != torch.uint8:
        x, options = ((x.float() - 120) / 60).to(kind), {}
    exact = x.double() if not options else torch.stack([(x[:, c].double() - MEAN[c]) * SCALE[c] for c in range(3)], 1)
    wd, bd = w.double(), b.double()
    z = TF.conv2d(TF.pad(exact, (2, 1, 0, 3)), wd, bd, 4)
    a = z.relu()
    unit = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}[dtype]
    allowed = 4 * unit + math.sqrt(363) * max(2.0**-24 if options else 0, min(unit, 2.0**-24))
    cases = {
        "conv1": (F.conv1(x, w, b, 4, UNEVEN, **options), z),
        "conv1_relu": (F.conv1_relu(x, w, b, 4, UNEVEN, **options), a),
        "paper": (
            F.alexnet_stem(x, w, b, (4, UNEVEN, False), NORM, POOL, **options),
            TF.max_pool2d(TF.local_response_norm(a, *NORM), 3, 2),
        ),
        "caffenet": (
            F.alexnet_stem(x, w, b, (4, UNEVEN, False), NORM, POOL, pool_first=True, **options),
            TF.local_response_norm(TF.max_pool2d(a, 3, 2), *NORM),
        ),
        "source2012": (
            F.alexnet_stem(x, w, b, (4, UNEVEN, False), NORM, POOL, relu=False, **options),
            TF.max_pool2d(TF.local_response_norm(z, *NORM), 3, 2),
        ),
        "pool first, no ReLU": (
            F.alexnet_stem(x, w, b, (4, UNEVEN, False), NORM, POOL, relu=False, pool_first=True, **options),
            TF.local_response_norm(TF.max_pool2d(z, 3, 2), *NORM),
        ),
    }
    assert min(cases["source2012"][0].min(), cases["pool first, no ReLU"][0].min()) < 0
    wanted = LAYOUTS[1] if kind == torch.uint8 else layout
    for name, (y, expected) in cases.items():
        assert (y.dtype, y.shape) == (dtype, expected.shape), name
        assert y.is_contiguous(memory_format=wanted), name
        assert relative(y, expected) <= allowed, name


def test_pixels_give_what_prepared_images_give(either: str) -> None:
    """The same arithmetic in the same order: equal to the bit."""
    (w, b), image = weights(), pixels()
    prepared = reference.pixels(image, torch.tensor(MEAN), torch.tensor(SCALE), torch.float32)
    assert torch.equal(F.alexnet_stem(image, w, b, **numbers()), F.alexnet_stem(prepared, w, b))
    assert torch.equal(F.conv1_relu(image, w, b, 4, 2, **numbers()), F.conv1_relu(prepared, w, b, 4, 2))
    by_channel = [(image[:, c].float() - MEAN[c]) * SCALE[c] for c in range(3)]
    assert torch.equal(prepared, torch.stack(by_channel, 1))


def test_a_padded_pixel_is_zero_not_black(either: str) -> None:
    """Zeros stand around the prepared image: black pixels, prepared, do not."""
    black, (w, _) = torch.zeros(1, 3, 11, 11, dtype=torch.uint8), weights()
    y = F.conv1(black, w, None, 4, 8, **numbers())
    prepared = (torch.zeros(3) - torch.tensor(MEAN)) * torch.tensor(SCALE)
    expected = TF.conv2d(prepared[None, :, None, None].expand(1, 3, 11, 11), w, None, 4, 8)
    assert relative(y, expected) < 1e-5


@pytest.mark.parametrize("height", range(20, 28))
def test_ceil_mode_hangs_over_as_the_2012_source(either: str, height: int) -> None:
    x, (w, b) = torch.randn(1, 3, height, 27), weights()
    theirs = nn.CeilConv2d(3, 16, 11, 4)
    theirs.weight.data, theirs.bias.data = w, b
    y = F.conv1(x, w, b, ceil_mode=True)
    assert y.shape[2:] == (math.ceil((height - 11) / 4) + 1, 5)
    over = (11 - height) % 4
    expected = TF.conv2d(TF.pad(x, (0, 0, 0, over)), w, b, 4)
    assert relative(y, expected) < 1e-6 and relative(theirs(x), expected) < 1e-6


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (7, 2, (3, 2)), (11, (4, 2), 2), (5, 4, UNEVEN)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_convolution_is_torchs(either: str, size: int, stride, padding, channels: int) -> None:
    x, w = torch.randn(2, channels, 17, 19), torch.randn(6, channels, size, size)
    around = (
        padding if len(_stem_arguments.sides(padding)) == len(padding if isinstance(padding, tuple) else ()) else None
    )
    padded = TF.pad(x, (2, 1, 0, 3)) if around else x
    expected = TF.conv2d(padded, w, None, stride, 0 if around else padding)
    assert relative(F.conv1(x, w, None, stride, padding), expected) < 1e-6
    assert relative(F.conv1_relu(x[0], w, None, stride, padding), expected[0].relu()) < 1e-6
    y = F.alexnet_stem(x, w, None, (stride, padding, False), NORM, (2, 1, 0, 1, False))
    assert relative(y, TF.max_pool2d(TF.local_response_norm(expected.relu(), *NORM), 2, 1)) < 1e-6


@pytest.mark.parametrize("arrange", ["slice", "expand", "transpose", "stride"])
def test_any_strides(either: str, arrange: str) -> None:
    x = {
        "slice": lambda: pixels(2, 40, 40)[:, :, 3:34, 1:30],
        "expand": lambda: pixels(1).expand(3, 3, 27, 31),
        "transpose": lambda: pixels(2, 31, 27).transpose(2, 3),
        "stride": lambda: pixels(2, 54, 62)[:, :, ::2, ::2],
    }[arrange]()
    w, b = (t.requires_grad_() for t in weights())
    results = []
    for image in (x, x.clone(memory_format=torch.contiguous_format)):
        y = F.alexnet_stem(image, w, b, **numbers())
        results.append((y, *torch.autograd.grad(y.sin().sum(), (w, b))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_as_torch(either: str, value: float) -> None:
    x, (w, b) = torch.randn(2, 3, 27, 31), weights()
    x[0, 1, 4, 5] = value
    torch.testing.assert_close(F.conv1_relu(x, w, b), TF.conv2d(x, w, b, 4).relu(), equal_nan=True)


def test_empty_batch(either: str) -> None:
    w, b = (t.requires_grad_() for t in weights())
    y = F.alexnet_stem(pixels(2)[:0], w, b, **numbers())
    assert y.shape == (0, 16, 2, 2)
    y.sum().backward()
    assert not w.grad.any() and not b.grad.any()
    assert stem.stem(pixels()[:0], w, b, None, None, (0,) * 4, True, *BLOCK, False, True)[0].shape == (0, 16, 2, 2)
    found = stem.conv1_backward(
        y.new_zeros(0, 16, 5, 6), None, torch.zeros(0, 3, 27, 31), w, None, None, (0,) * 4, [True] * 3
    )
    assert [t.shape for t in found] == [(0, 3, 27, 31), w.shape, (16,)]


def test_more_than_two_to_the_31_elements() -> None:
    """Sizes are Python's: shapes come out right where an index would not fit 32 bits."""
    x = torch.empty(20000, 3, 227, 227, dtype=torch.uint8, device="meta")
    w = torch.empty(96, 3, 11, 11, device="meta")
    assert x.numel() > 2**31
    for op in (F.conv1_relu, F.alexnet_stem):
        y = op(x, w, **numbers())
        assert y.shape[:2] == (20000, 96)


# ------------------------------------------------------------------------------------------------------------- gradients


def _calls(order: bool) -> dict[str, Callable[..., Tensor]]:
    around, norm = (0, 1, 1, 0), (5, 0.5, 0.75, 2.0)
    return {
        "conv1": lambda x, w, b, **o: F.conv1(x, w, b, 4, around, **o),
        "conv1_relu": lambda x, w, b, **o: F.conv1_relu(x, w, b, 4, around, **o),
        "stem": lambda x, w, b, **o: F.alexnet_stem(x, w, b, (4, around, False), norm, POOL, pool_first=order, **o),
        "no relu": lambda x, w, b, **o: F.alexnet_stem(
            x, w, b, (4, around, False), norm, POOL, relu=False, pool_first=order, **o
        ),
    }


@pytest.mark.parametrize(
    ("name", "order", "kind", "direct"),
    [
        ("conv1", False, "image", False),
        ("conv1_relu", False, "pixels", True),
        ("stem", False, "image", True),
        ("stem", True, "image", False),
        ("stem", True, "pixels", True),
        ("no relu", False, "pixels", True),
        ("no relu", False, "image", False),
        ("no relu", True, "image", True),
    ],
)
def test_gradients_to_any_order(either: str, name: str, order: bool, kind: str, direct: bool, monkeypatch) -> None:
    """Directly and through torch's dispatcher; by pixels' weights, and by images too."""
    if not direct:
        monkeypatch.setattr(stem, "is_direct", lambda *_: False)
    call = _calls(order)[name]
    w, b = (t.double().requires_grad_() for t in weights(8))
    image = pixels(1, 18, 19)
    if kind == "pixels":
        check = lambda w, b: call(image, w, b, mean=MEAN, scale=(0.05,) * 3)  # noqa: E731
        inputs = (w, b)
    else:
        check, inputs = call, (((image.double() - 120) / 20).requires_grad_(), w, b)
    assert ran(lambda: check(*inputs)) >= ({"cuda"} if either == "kernel" else set())
    assert torch.autograd.gradcheck(check, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(check, inputs, fast_mode=True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("order", [False, True])
def test_the_kept_map_is_differentiable_too(order: bool) -> None:
    """``a`` is a result of the operation: alone, and beside the pooled one."""
    w, b = (t.double().requires_grad_() for t in weights(8))
    x = ((pixels(1, 19, 19).double() - 120) / 20).requires_grad_()

    def call(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return stem.stem(x, w, b, None, None, (0, 0, 0, 0), True, *BLOCK, order, True)[:2]

    assert torch.autograd.gradcheck(call, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, w, b), fast_mode=True)
    together = torch.autograd.grad(sum(t.square().sum() for t in call(x, w, b)), w)[0]
    apart = [torch.autograd.grad(call(x, w, b)[i].square().sum(), w)[0] for i in (0, 1)]
    torch.testing.assert_close(together, apart[0] + apart[1])
    (dw,) = torch.autograd.grad(call(x, w, b)[1].sum(), w)
    torch.testing.assert_close(dw, torch.autograd.grad(TF.conv2d(x, w, b, 4).relu().sum(), w)[0])


@pytest.mark.usefixtures("kernel")
def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[list[bool]] = []
    kept: list[bool] = []
    run = dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda op, *a: (op == "conv1_backward" and masks.append(a[-1])) or run(op, *a))
    perform = dispatch.perform
    monkeypatch.setattr(dispatch, "perform", lambda c, *a: (len(a) == 16 and kept.append(a[-1])) or perform(c, *a))
    (w, b), x = weights(), torch.randn(1, 3, 27, 27)
    F.alexnet_stem(x, w, b)
    F.alexnet_stem(x.requires_grad_(), w, b).sum().backward()
    F.alexnet_stem(pixels(), w.requires_grad_(), b, **numbers()).sum().backward()
    with torch.no_grad():
        F.alexnet_stem(x, w, b)
    assert kept == [False, True, True, False]
    assert masks == [[True, False, False], [False, True, False]]
    with pytest.raises(RuntimeError, match="keep=False keeps nothing for backward; call the operation with keep=True"):
        stem.stem(x, w, b, None, None, (0,) * 4, True, *BLOCK, False, False)[0].sum().backward()


def test_mean_and_scale_are_differentiated_where_they_are_parameters(either: str) -> None:
    mean, scale = (torch.tensor(v).requires_grad_() for v in (MEAN, SCALE))
    w, b = weights()
    F.conv1(pixels(), w, b, mean=mean, scale=scale).sum().backward()
    assert mean.grad.abs().min() > 0 and scale.grad.abs().min() > 0


def test_a_floating_point_image_is_prepared_too_where_asked(either: str) -> None:
    image, (w, b) = pixels(), weights()
    x = image.float().requires_grad_()
    y = F.conv1_relu(x, w, b, **numbers())
    assert torch.equal(y, F.conv1_relu(image, w, b, **numbers()))
    y.sum().backward()
    assert x.grad.abs().max() > 0


# ------------------------------------------------------------------------------------- torch.library, compilers, autocast


def _op_arguments(order: bool, layout: torch.memory_format) -> dict[str, tuple[object, tuple[object, ...]]]:
    w, b = (t.requires_grad_() for t in weights())
    x = torch.randn(2, 3, 21, 27).contiguous(memory_format=layout).requires_grad_()
    m, s = torch.tensor(MEAN), torch.tensor(SCALE)
    image = pixels(2, 21, 27, layout)
    grad = torch.randn(2, 16, 4, 5).requires_grad_()
    a = torch.randn(2, 16, 4, 5).relu()
    return {
        "conv1": (stem.conv1, (x, w, b, None, None, UNEVEN, True)),
        "conv1 of pixels": (stem.conv1, (image, w.detach(), None, m, s, UNEVEN, False)),
        "stem": (stem.stem, (x, w, b, None, None, UNEVEN, True, *BLOCK, order, True)),
        "stem of pixels": (stem.stem, (image, w, b, m, s, UNEVEN, True, *BLOCK, order, True)),
        "stem without ReLU": (stem.stem, (image, w, b, m, s, UNEVEN, False, *BLOCK, order, True)),
        "stem of a slice": (
            stem.stem,
            (image[:, :, 2:, 1:], w.detach(), None, m, s, UNEVEN, True, *BLOCK, order, False),
        ),
        "backward": (stem.conv1_backward, (grad, a, x, w, None, None, (0, 3, 2, 1), [True, True, True])),
        "backward of pixels": (stem.conv1_backward, (grad, None, image, w, m, s, (0, 3, 2, 1), [False, True, True])),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(_op_arguments(False, LAYOUTS[0])))
def test_opcheck(either: str, name: str, layout: torch.memory_format) -> None:
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    op, arguments = _op_arguments(layout is LAYOUTS[1], layout)[name]
    # The fourth check compiles, which the tests below do; once for each operation it runs here too.
    full = layout is LAYOUTS[1] and either == "parts" and "backward" not in name
    torch.library.opcheck(op, arguments, **({} if full else {"test_utils": quick}))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["pixels", "image"])
def test_compiled(either: str, dynamic: bool, kind: str) -> None:
    torch._dynamo.reset()
    module = nn.AlexNetStem(16, mean=MEAN, scale=(0.01,) * 3, ceil_mode=True, relu=not dynamic)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter)
    for n, side in ((2, 25), (3, 28)):
        x = pixels(n, side, side, LAYOUTS[0])
        x = x if kind == "pixels" else ((x.float() - 120) / 60).requires_grad_()
        leaves = tuple(t for t in (x, *module.parameters()) if t.requires_grad)
        results = [(y, *torch.autograd.grad(y.sin().sum(), leaves)) for y in (compiled(x), module(x))]
        torch.testing.assert_close(*results)
        assert results[0][0].stride() == results[1][0].stride()
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert any("alexnet_kernels.stem" in target for target in targets) == (either == "kernel")


def test_exported_and_traced(either: str) -> None:
    module, x = nn.AlexNetStem(16, mean=MEAN, scale=SCALE).eval(), pixels()
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)).module()
    for n in (2, 3):
        torch.testing.assert_close(exported(pixels(n)), module(pixels(n)), rtol=1e10, atol=1e10)  # shapes and dtypes
    torch.testing.assert_close(exported(x), module(x))
    torch.testing.assert_close(torch.jit.trace(module, (x,))(x), module(x))


@pytest.mark.parametrize("kind", ["pixels", "image"])
def test_autocast_is_torchs(either: str, kind: str) -> None:
    """Weights and floating-point images in the autocast's dtype, pixels straight into it; gradients in the weights' own."""
    w, b = (t.requires_grad_() for t in weights())
    image = pixels()
    prepared = reference.pixels(image, torch.tensor(MEAN), torch.tensor(SCALE), torch.float32)
    x, options = (image, numbers()) if kind == "pixels" else (prepared, {})
    with torch.autocast("cpu", torch.bfloat16):
        y = F.conv1_relu(x, w, b, **options)
        theirs = TF.conv2d(prepared, w, b, 4).relu()
        assert F.alexnet_stem(x, w, b, **options).dtype == torch.bfloat16
        double = F.conv1(prepared.double(), w.double())
    assert y.dtype == theirs.dtype == torch.bfloat16 and double.dtype == torch.float64
    exact = TF.conv2d(prepared.double(), w.double(), b.double(), 4).relu()
    assert relative(y, exact) <= 1.5 * relative(theirs, exact)
    y.sum().backward()
    assert w.grad.dtype == b.grad.dtype == torch.float32


def test_function_transforms_as_torch(either: str) -> None:
    w, b = weights()
    x = torch.randn(3, 1, 3, 19, 19)
    ours, theirs = (lambda x: F.conv1_relu(x, w, b)), (lambda x: TF.conv2d(x, w, b, 4).relu())
    torch.testing.assert_close(torch.vmap(ours)(x), torch.vmap(theirs)(x), rtol=1e-4, atol=1e-5)
    tangent = torch.randn_like(x[0])
    torch.testing.assert_close(*(torch.func.jvp(f, (x[0],), (tangent,)) for f in (ours, theirs)), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ which of them runs


@pytest.mark.usefixtures("kernel")
def test_what_the_kernel_runs_and_what_not() -> None:
    x, (w, b) = torch.randn(2, 3, 27, 31), weights()
    conv = (4, 0, 1, 1)
    for call in (
        lambda: F.conv1(x, w, b),
        lambda: F.conv1_relu(pixels(), w, b, ceil_mode=True, **numbers()),
        lambda: F.alexnet_stem(x, w, b),
        lambda: F.alexnet_stem(x, w, b, relu=False),
        lambda: F.conv2d_relu(x, w, b, (4, 4), "valid"),
        lambda: F.conv2d_relu_lrn_max_pool2d(x, w, b, conv, NORM, POOL),
        lambda: F.conv2d_relu_max_pool2d_lrn(x, w, b, ((4, 4), (2, 1), (1, 1), 1), NORM, POOL, groups=2),
    ):
        assert ran(call) == {"cuda"}
    for call in (
        lambda: F.conv1(x, w, b, 2),
        lambda: F.conv1(x[0], w, b),
        lambda: F.conv2d_relu(x, w, b, 4, 0, 2),
        lambda: F.conv1_relu(x, weights(7)[0]),
        lambda: F.conv1_relu(torch.randn(2, 4, 27, 27), torch.randn(6, 4, 11, 11)),
        lambda: F.conv2d_relu_lrn_max_pool2d(x, w[:4], b[:4], conv, NORM, POOL),
    ):
        assert "cuda" not in ran(call)
    for norm, pooling in (
        ((3, 1e-4, 0.75, 1.0), POOL),
        (NORM, (2, 2, 0, 1, False)),
        ((5, torch.tensor(0.1), 0.75, 1.0), POOL),
    ):
        assert "cuda" not in ran(
            lambda norm=norm, pooling=pooling: F.alexnet_stem(x, w, b, (4, 0, False), norm, pooling)
        )
    with ak.use_backend("reference"):
        assert ran(lambda: F.alexnet_stem(x, w, b)) == {"reference"}
    with ak.use_backend("cuda"):
        assert ran(lambda: F.alexnet_stem(x, w, b)) == {"cuda"}
        with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run stem: written for LRN over 5 channels"):
            F.alexnet_stem(x, w, b, norm=(3, 1e-4, 0.75, 1.0))


@pytest.mark.usefixtures("kernel")
def test_a_backward_runs_where_its_forward_ran() -> None:
    x, (w, b) = torch.randn(2, 3, 27, 31), weights()
    y = F.conv1_relu(x, w.requires_grad_(), b)
    assert ran(lambda: y.sum().backward()) == {"cuda"}
    with ak.use_backend("reference"):
        y = F.conv1_relu(x, w, b)
    assert "cuda" not in ran(lambda: y.sum().backward())


REASONS = [
    ("written for 11x11 windows over 3 channels with stride 4", {"stride": 2}),
    ("written for 48 or 64 or 96 output channels, not 16", {"out": 16}),
    ("no kernel for torch.float64", {"dtype": torch.float64}),
    ("no kernel for images in torch.float64", {"image": torch.float64}),
    ("no kernel for device 'cpu'", {}),
    ("written for images", {"sliced": True}),
]


@pytest.mark.parametrize(("reason", "change"), REASONS, ids=[r for r, _ in REASONS])
def test_every_reason_in_one_line(reason: str, change: dict) -> None:
    w, b = weights(change.get("out", 48), change.get("dtype", torch.float32))
    x = torch.randn(2, 3, 27, 31, dtype=change.get("image", torch.float32))
    x = x[0] if change.get("sliced") else x
    said = ak.explain("conv1_relu", x, w, b, change.get("stride", 4))
    assert reason in said.why_not["cuda"] and "\n" not in said.why_not["cuda"]
    assert f"not cuda: {said.why_not['cuda']}" in str(said)


@pytest.mark.usefixtures("kernel")
def test_explain_says_when_the_kernel_runs() -> None:
    x, (w, b) = torch.randn(2, 3, 27, 31), weights()
    conv = (4, 0, 1, 1)
    calls = {
        "conv1": (x, w, b),
        "conv1_relu": (x, w, b),
        "alexnet_stem": (x, w, b),
        "conv2d_relu": (x, w, b, 4),
        "conv2d_relu_lrn_max_pool2d": (x, w, b, conv, NORM, POOL),
        "conv2d_relu_max_pool2d_lrn": (x, w, b, conv, NORM, POOL),
    }
    for name, arguments in calls.items():
        said = ak.explain(name, *arguments)
        assert (said.op, said.backend, said.parts) == (name, "cuda", ()), name
        with ak.use_backend("reference"):
            said = ak.explain(name, *arguments)
        assert said.backend == "reference" and "can run; reference was asked for" in said.why_not["cuda"]
    said = ak.explain("alexnet_stem", pixels(), w, b, norm=(3, 1e-4, 0.75, 1.0), **numbers())
    assert "cuda" not in said.backend and "LRN over 5 channels" in said.why_not["cuda"]
    assert "not cuda in one: written for LRN over 5 channels" in str(said)
    assert ran(lambda: ak.explain("conv1", x, w, b, **numbers())) == set()
    with (
        ak.use_backend("cuda"),
        pytest.raises(RuntimeError, match="backend 'cuda' cannot run conv1: written for 11x11"),
    ):
        ak.explain("conv1", x, w, b, 3)


@pytest.mark.parametrize("order", [False, True])
def test_without_relu_the_parts_are_a_convolution_and_one_operation_more(order: bool) -> None:
    """On a CPU: torch's convolution, and LRN and pooling in one, without ReLU."""
    compiled = _extension.why_not("cpu") is None
    x, (w, b) = torch.randn(2, 3, 27, 31), weights()
    said = ak.explain("alexnet_stem", x, w, b, relu=False, pool_first=order)
    rest = ("max_pool2d_lrn",) if order else ("lrn_max_pool2d",)
    alone = ("max_pool2d", "lrn") if order else ("lrn", "max_pool2d")
    assert (said.op, said.parts[0].op) == ("alexnet_stem", "conv2d")
    assert tuple(part.op for part in said.parts[1:]) == (rest if compiled else alone)
    assert all(part.backend == "cpu" for part in said.parts[1:]) or not compiled
    assert ran(lambda: F.alexnet_stem(x, w, b, relu=False, pool_first=order)) == {p.backend for p in said.parts}
    asked: list[tuple[object, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        perform = dispatch.perform
        patch.setattr(dispatch, "perform", lambda chosen, *a: asked.append(a) or perform(chosen, *a))
        F.alexnet_stem(x, w, b, relu=False, pool_first=order)
    assert [a[1:3] for a in asked if len(a) == 12] == [(None, False)] * compiled  # bias and ReLU of lrn_pool


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("relu", [False, True])
def test_a_bias_that_is_added_after_the_convolution(backend: str, relu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without the kernel, where the operation that follows adds it, with ReLU or without."""
    monkeypatch.setattr(fused, "BIAS_APART", ("cpu",))
    x, (w, b) = torch.randn(2, 3, 27, 31), tuple(t.requires_grad_() for t in weights())
    z = TF.conv2d(x, w, b, 4)
    expected = TF.max_pool2d(TF.local_response_norm(z.relu() if relu else z, *NORM), 3, 2)
    with ak.use_backend(backend):
        y = F.alexnet_stem(x, w, b, norm=NORM, pooling=POOL, relu=relu)
        found = [y, *torch.autograd.grad(y.sin().sum(), (w, b))]
    theirs = [expected, *torch.autograd.grad(expected.sin().sum(), (w, b))]
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


def test_strict_fp32_is_torchs_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand(monkeypatch)
    x, (w, b) = torch.randn(2, 3, 27, 31), weights()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert "strict fp32" in ak.explain("conv1", x, w, b).why_not["cuda"]
        assert ran(lambda: F.conv1(x, w, b)) == {"reference"}
        assert ran(lambda: F.conv1(x, w.bfloat16(), b.bfloat16())) == {"cuda"}
    assert ran(lambda: F.conv1(x, w, b)) == {"cuda"}


# Words of csrc/ that tell these two from all other errors.
NO_CODE = "this library holds no code for sm_"
LITTLE_MEMORY = "the device has too little shared memory for a block"


@pytest.mark.parametrize(
    ("words", "files"),
    [(NO_CODE, ["bindings.h"]), (LITTLE_MEMORY, ["conv1_forward.cu", "conv1_backward.cu"])],
)
def test_the_kernels_say_it_in_these_words(words: str, files: list[str]) -> None:
    for file in files:
        assert words in (Path(__file__).parents[1] / "csrc" / file).read_text()


def test_a_library_for_another_arch_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Tensor:
        raise RuntimeError(f"check_launch, csrc/bindings.h:87, conv1: {NO_CODE}120, the architecture of cuda:0")

    def shrinks(*_: object) -> Tensor:
        raise RuntimeError(f"check, csrc/bindings_conv1.cpp:52, conv1: {LITTLE_MEMORY}\nException raised from ...")

    def breaks(*_: object) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    def library(run: Callable[..., Tensor] | None) -> str | None:
        monkeypatch.setattr(_stem_ways, "_compiled", lambda op: run)
        _stem_ways._library_why_not.cache_clear()
        return _stem_ways._library_why_not("conv1", 0, torch.float16, 48)

    operations = type("Operations", (), {"conv1": None})
    monkeypatch.setattr(_extension, "why_not", lambda name: None)
    monkeypatch.setattr(torch.ops, "alexnet_kernels_cuda", operations, raising=False)
    monkeypatch.setattr(dispatch, "old_gpu", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    monkeypatch.setattr(_stem_ways, "_DEVICE", "cpu")
    reason = library(fails)
    assert reason == f"the compiled library was built for another arch than sm_120 (cuda:0); {_extension.REBUILD}"
    assert library(lambda *_: torch.zeros(1)) is None
    assert library(shrinks) == f"conv1: {LITTLE_MEMORY}"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        library(breaks)
    assert "has no stem; pip install" in _stem_ways._library_why_not("stem", 0, torch.float16, 48)
    monkeypatch.setattr(dispatch, "old_gpu", lambda index: "cuda:1 is sm_75; the kernels need sm_80 or newer")
    assert (
        _stem_ways._library_why_not("conv1", 1, torch.float16, 48) == "cuda:1 is sm_75; the kernels need sm_80 or newer"
    )
    monkeypatch.setattr(_extension, "why_not", lambda name: "the compiled library is not there: it was not built")
    assert "not there" in _stem_ways._library_why_not("conv1", 2, torch.float16, 48)
    _stem_ways._library_why_not.cache_clear()


def test_the_library_is_tried_on_real_tensors_even_while_a_model_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type] = []

    def conv1(x: Tensor, *_: object) -> None:
        assert float(x.sum()) == 0
        seen.append(type(x))

    monkeypatch.setattr(_extension, "why_not", lambda name: None)
    monkeypatch.setattr(torch.ops, "alexnet_kernels_cuda", type("Operations", (), {"conv1": None}), raising=False)
    monkeypatch.setattr(dispatch, "old_gpu", lambda index: None)
    monkeypatch.setattr(_stem_ways, "_DEVICE", "cpu")
    monkeypatch.setattr(_stem_ways, "_compiled", lambda op: conv1)

    class Asks(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            _stem_ways._library_why_not.cache_clear()
            assert _stem_ways._library_why_not("conv1", 0, torch.float32, 48) is None
            return x + 1

    with FakeTensorMode():
        Asks()(torch.ones(1))
    program = torch.export.export(Asks(), (torch.ones(1),), strict=False)
    _stem_ways._library_why_not.cache_clear()
    assert set(seen) == {Tensor} and len(seen) >= 2
    assert [node.op for node in program.graph.nodes].count("call_function") == 1


@pytest.mark.parametrize("op", list(CONTRACT))
def test_the_smallest_call_is_one(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched to learn whether the library has code for a device runs, and has one window."""
    _stand(monkeypatch)
    arguments = _stem_ways._smallest(op, torch.device("cpu"), torch.float32, 48)
    found = _stem_ways._compiled(op)(*arguments)
    first = found if op == "conv1" else found[1 if op == "conv1_backward" else 0]
    assert first.shape == ((48, 3, 11, 11) if op == "conv1_backward" else (1, 48, 1, 1))


def test_the_compiled_operations_have_these_schemas() -> None:
    if _extension.why_not("cuda") is not None:
        pytest.skip(f"no compiled library: {_extension.why_not('cuda')}")
    operations = torch.ops.alexnet_kernels_cuda
    missing = [name for name in CONTRACT if not hasattr(operations, name)]
    if missing:
        pytest.skip(f"the compiled library has no {', '.join(missing)}")
    for name, schema in CONTRACT.items():
        theirs = getattr(operations, name).default._schema
        ours = torch._C.parse_schema(f"alexnet_kernels_cuda::{name}{schema}")
        assert [(a.name, str(a.type)) for a in theirs.arguments] == [(a.name, str(a.type)) for a in ours.arguments]
        assert len(theirs.returns) == len(ours.returns)


# ----------------------------------------------------------------------------------------------------------------- errors

X, W = torch.zeros(1, 3, 27, 27), torch.zeros(6, 3, 11, 11)
PIXELS = torch.zeros(1, 3, 27, 27, dtype=torch.uint8)
BAD = [
    (TypeError, "input must be a torch.Tensor, got list", lambda f: f([1.0], W)),
    (TypeError, "weight must be a torch.Tensor, got int", lambda f: f(X, 7)),
    (ValueError, r"input is torch.uint8.*mean and scale are missing: pass what.*mean=\(0, 0, 0\)", lambda f: f(PIXELS, W)),
    (ValueError, r"mean without scale.*scale=\(1, 1, 1\) changes nothing", lambda f: f(PIXELS, W, mean=MEAN)),
    (ValueError, r"scale without mean.*mean=\(0, 0, 0\) changes nothing", lambda f: f(PIXELS, W, scale=SCALE)),
    (ValueError, r"shape \(1, 27, 27, 3\) with its channels last.*input.permute\(0, 3, 1, 2\)",
     lambda f: f(torch.zeros(1, 27, 27, 3, dtype=torch.uint8), W, mean=MEAN, scale=SCALE)),
    (ValueError, r"mean has the shape \(2,\).*one number for each", lambda f: f(PIXELS, W, mean=(1, 2), scale=SCALE)),
    (ValueError, r"scale has the shape \(3, 1\)", lambda f: f(PIXELS, W, mean=MEAN, scale=torch.ones(3, 1))),
    (TypeError, r"mean=128 must be one number for each channel.*\* 3", lambda f: f(PIXELS, W, mean=128, scale=SCALE)),
    (
        ValueError,
        r"mean is on meta, input on cpu: pass numbers, or mean.to\(input.device\)",
        lambda f: f(PIXELS, W, mean=torch.ones(3, device="meta"), scale=SCALE),
    ),
    (ValueError, r"input is on cpu, weight on meta: move one", lambda f: f(X, W.to("meta"))),
    (TypeError, "input is torch.int64: images are floating point, or 8-bit pixels", lambda f: f(X.long(), W)),
    (RuntimeError, "Kernel size can't be greater than actual input size", lambda f: f(X[..., :9], W)),
    (RuntimeError, "to have 3 channels, but got 4 channels", lambda f: f(torch.zeros(1, 4, 27, 27), W)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), BAD, ids=[m for _, m, _ in BAD])
@pytest.mark.parametrize("function", [F.conv1, F.conv1_relu, F.alexnet_stem], ids=lambda f: f.__name__)
def test_errors_name_argument_value_and_remedy(either: str, function, kind, message: str, call) -> None:
    with pytest.raises(kind, match=message):
        call(function)
    if kind is not RuntimeError:  # which are torch's own, raised where it computes
        with pytest.raises(kind, match=message):
            call(lambda *args, **options: ak.explain(function, *args, **options))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"padding=\(1, 2, 3\) must be a number, \(rows, columns\)", lambda: F.conv1(X, W, padding=(1, 2, 3))),
        (r"padding=-1 must be a number", lambda: F.conv1_relu(X, W, padding=-1)),
        (r"input has 3 dimensions, shape \(3, 27, 27\).*unsqueeze", lambda: F.alexnet_stem(X[0], W)),
        ("groups=4 does not divide the 6 channels", lambda: F.alexnet_stem(X, W, groups=4)),
        (r"norm=\(5, 0.0001\) must be the 4 values \(size, alpha, beta, k\)", lambda: F.alexnet_stem(X, W, norm=(5, 1e-4))),
        (r"conv=\(4, 0\) must be the 3 values", lambda: F.alexnet_stem(X, W, None, (4, 0))),
        (r"pooling=3 must be the 5 values", lambda: F.alexnet_stem(X, W, pooling=3)),
        (r"conv=\(4, 0\) must be the 4 values \(stride, padding, dilation, groups\)",
         lambda: F.conv2d_relu_lrn_max_pool2d(X, W, None, (4, 0), (5, 1e-4, 0.75, 1.0), (3, 2, 0, 1, False))),
        ("size=0 must be at least 1", lambda: F.alexnet_stem(X, W, norm=(0, 1e-4, 0.75, 1.0))),
        ("alpha_mode='max' is unknown", lambda: F.alexnet_stem(X, W, alpha_mode="max")),
        ("channels='GBR' is no order", lambda: nn.PixelConv2d(3, 6, 11, channels="GBR")),
        ("must be 3 numbers each", lambda: nn.AlexNetStem(mean=(1, 2), scale=(1, 1))),
        (r"mean=\(1, 2, 3\), scale=None: .*needs both", lambda: nn.PixelConv2d(3, 6, 11, mean=(1, 2, 3))),
        (r"dilation=\(2, 2\): a stem cannot have that", lambda: nn.AlexNetStem.from_layers(
            tnn.Conv2d(3, 6, 11, 4, dilation=2), tnn.LocalResponseNorm(5), tnn.MaxPool2d(3, 2))),
        ("return_indices=True: a stem cannot have that", lambda: nn.AlexNetStem.from_layers(
            tnn.Conv2d(3, 6, 11, 4), tnn.LocalResponseNorm(5), tnn.MaxPool2d(3, 2, return_indices=True))),
    ],
)  # fmt: skip
def test_errors_of_the_rest(either: str, message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_stem_of_other_layers_is_refused() -> None:
    with pytest.raises(TypeError, match="pool is a AvgPool2d, a stem needs a MaxPool2d"):
        nn.AlexNetStem.from_layers(tnn.Conv2d(3, 6, 11, 4), tnn.LocalResponseNorm(5), tnn.AvgPool2d(3, 2))


def test_one_image_through_a_fused_block(either: str) -> None:
    """Its parts take it by itself, so the whole does."""
    layers = (nn.PixelConv2d(3, 6, 11, 4), tnn.ReLU(), tnn.LocalResponseNorm(3), tnn.MaxPool2d(3, 2))
    x = torch.randn(3, 43, 43)
    torch.testing.assert_close(nn.FusedSequential(*layers)(x), tnn.Sequential(*layers)(x))


@pytest.mark.parametrize("kind", [nn.PixelConv2d, nn.CeilConv2d])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_a_graph_of_fx_takes_pixels_and_images(kind, channels: str) -> None:
    conv = kind(3, 6, 11, 4, mean=MEAN, scale=SCALE, channels=channels)
    graph = torch.fx.symbolic_trace(conv)
    for x in (torch.randint(256, (1, 3, 28, 28), dtype=torch.uint8), torch.randn(1, 3, 28, 28)):
        torch.testing.assert_close(
            graph(x), conv(x), rtol=1e-4, atol=1e-3
        )  # images are turned round there, weights here


def test_means_follow_weights_that_are_assigned() -> None:
    """Made without memory, then given a checkpoint's tensors."""
    source = nn.PixelConv2d(3, 6, 11, 4, mean=MEAN, scale=SCALE)
    with torch.device("meta"):
        made = nn.PixelConv2d(3, 6, 11, 4, mean=MEAN, scale=SCALE)
    made.load_state_dict(source.state_dict(), assign=True)
    x = torch.randint(256, (1, 3, 27, 27), dtype=torch.uint8)
    assert torch.equal(made(x), source(x))


def test_errors_of_torchs_functions_stay_torchs(either: str) -> None:
    """conv2d_relu and its kin take what torch takes: no pixels, no second dtype."""
    for x in (PIXELS, X.double()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            F.conv2d_relu(x, W, None, 4)
        with pytest.raises((RuntimeError, NotImplementedError)):
            F.conv2d_relu_lrn_max_pool2d(x, W, None, (4, 0, 1, 1), NORM, POOL)


# ---------------------------------------------------------------------------------------------------------------- modules


def _layers(order: bool, groups: int = 1) -> list[tnn.Module]:
    norm, pool = nn.LocalResponseNorm(5, 0.02, k=2.0, groups=groups), tnn.MaxPool2d(3, 2)
    return [tnn.Conv2d(3, 16, 11, 4, 2), tnn.ReLU(inplace=True), *((pool, norm) if order else (norm, pool))]


@pytest.mark.parametrize("with_relu", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_the_module_is_its_layers(either: str, order: bool, with_relu: bool) -> None:
    conv, relu, *others = _layers(order, 2)
    relu = relu if with_relu else tnn.Identity()
    pool, norm = others if order else reversed(others)
    module = nn.AlexNetStem.from_layers(conv, norm, pool, MEAN, SCALE, relu=with_relu, pool_first=order)
    assert module.weight is conv.weight and module.bias is conv.bias and list(module.state_dict()) == ["weight", "bias"]
    x = (pixels().float() - 120) / 60
    theirs = others[1](others[0](relu(conv(x))))
    for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert relative(again(x), theirs) < 1e-6
    assert repr(module).startswith(
        "AlexNetStem(3, 16, kernel_size=(11, 11), stride=(4, 4), padding=(2, 2), mean=(122.679"
    )
    assert "norm_groups=2" in repr(module) and ("pool_first=True" in repr(module)) == order
    assert ("relu=False" in repr(module)) != with_relu


@pytest.mark.parametrize("order", [False, True])
def test_a_run_of_children_goes_to_the_kernel(either: str, order: bool) -> None:
    """Torch's convolution with prepared images; ours with pixels too; a watched member by itself."""
    theirs = tnn.Sequential(*_layers(order))
    ours = convert(copy.deepcopy(theirs))
    x = ((pixels().float() - 120) / 60).requires_grad_()
    results = [(net(x), *torch.autograd.grad(net(x).sin().sum(), (x, *net.parameters()))) for net in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert ("cuda" in ran(lambda: ours(x))) == (either == "kernel")
    pixelwise = nn.PixelConv2d(3, 16, 11, 4, 2, mean=MEAN, scale=SCALE)
    pixelwise.load_state_dict(theirs[0].state_dict())
    net = nn.FusedSequential(pixelwise, *theirs[1:])
    assert [step.op for step in steps(net)] == ["alexnet_stem"]
    image = pixels()
    prepared = reference.pixels(image, torch.tensor(MEAN), torch.tensor(SCALE), torch.float32)
    expected = net(image)
    assert relative(expected, theirs(prepared)) < 1e-6
    seen: list[Tensor] = []
    net[1].register_forward_hook(lambda module, args, out: seen.append(out))
    assert next(steps(net)).op is None
    torch.testing.assert_close(net(image), expected, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1
    bare = nn.FusedSequential(pixelwise, *theirs[2:])
    assert [step.op for step in steps(bare)] == ["alexnet_stem"]
    torch.testing.assert_close(bare(image), theirs[2:](pixelwise(image)), rtol=1e-5, atol=1e-6)
    assert ("cuda" in ran(lambda: bare(image))) == (either == "kernel")
    short = nn.FusedSequential(pixelwise, tnn.ReLU())
    assert [step.op for step in steps(short)] == ["conv1_relu"]
    torch.testing.assert_close(short(image), pixelwise(image).relu())


@pytest.mark.parametrize("kind", [nn.PixelConv2d, nn.CeilConv2d])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": "valid"}, {"padding": 2}, {"groups": 3}, {"padding_mode": "reflect", "padding": 1}],
    ids=str,
)
def test_pixels_through_the_convolution(either: str, kind, channels: str, options: dict) -> None:
    """In the order of channels that the weights were trained with; in the ways that only torch knows, too."""
    conv = kind(3, 48 if "groups" in options else 16, 11, 4, mean=MEAN, scale=SCALE, channels=channels, **options)
    image = pixels(2, 26, 28)
    prepared = reference.pixels(image, torch.tensor(MEAN), torch.tensor(SCALE), torch.float32)
    prepared = prepared.flip(1) if channels == "BGR" else prepared
    assert relative(conv(image), conv(prepared)) < 1e-6
    assert relative(conv(image[0]), conv(prepared)[0]) < 1e-6
    y = conv(image)
    y.sum().backward()
    (dw,) = torch.autograd.grad(conv(prepared).sum(), conv.weight)
    assert relative(conv.weight.grad, dw) < 1e-5


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_traced_by_fx(channels: str) -> None:
    """For floating-point images, as a tracer sees them: a proxy tells no dtype."""
    conv = nn.PixelConv2d(3, 16, 11, 4, mean=MEAN, scale=SCALE, channels=channels)
    block = nn.AlexNetStem.from_layers(conv, tnn.LocalResponseNorm(5), tnn.MaxPool2d(3, 2))
    x = torch.randn(1, 3, 27, 27)
    for module in (conv, block):
        assert torch.equal(torch.fx.symbolic_trace(module)(x), module(x))


def test_means_stay_fp32_and_follow_the_device() -> None:
    conv = nn.PixelConv2d(3, 6, 11, 4, mean=MEAN, scale=SCALE)
    assert list(conv.state_dict()) == ["weight", "bias"]
    for changed in (copy.deepcopy(conv).bfloat16(), copy.deepcopy(conv).double(), copy.deepcopy(conv).to("meta")):
        assert changed.mean.dtype == torch.float32 and changed.mean.device == changed.weight.device
    there = copy.deepcopy(conv).to("meta").to_empty(device="cpu")
    assert torch.equal(there.mean, torch.tensor(MEAN))
    assert conv.bfloat16()(pixels()).dtype == torch.bfloat16
    with torch.device("meta"):
        assert nn.AlexNetStem(mean=MEAN, scale=SCALE).mean.device.type == "meta"
    assert "mean=" not in repr(nn.PixelConv2d(3, 6, 11)) and "channels='BGR'" in repr(
        nn.PixelConv2d(3, 6, 11, mean=MEAN, scale=SCALE, channels="BGR")
    )


def test_reverted_it_is_torchs() -> None:
    conv = nn.PixelConv2d(3, 6, 11, 4, mean=MEAN, scale=SCALE)
    x = (pixels().float() - 120) / 60
    expected = conv(x)
    again = revert(conv)
    assert type(again) is tnn.Conv2d and set(vars(again)) == set(vars(tnn.Conv2d(3, 6, 11)))
    assert torch.equal(again(x), expected) and not list(again.buffers())
    assert relative(torch.jit.script(again)(x), expected) < 1e-6
    with pytest.raises(RuntimeError, match="PixelConv2d cannot be scripted: revert first"):
        torch.jit.script(nn.PixelConv2d(3, 6, 11))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [False, True])
def test_on_a_gpu(dtype: torch.dtype, order: bool) -> None:
    """Whatever runs there: values and gradients against fp64 on the CPU, pixels and prepared images."""
    w, b = (t.requires_grad_() for t in weights(96))
    image = pixels(3, 67, 71)
    exact = reference.pixels(image, torch.tensor(MEAN), torch.tensor(SCALE), torch.float64)
    truth = F.alexnet_stem(exact, w.double(), b.double(), norm=NORM, pooling=POOL, pool_first=order)
    grads = torch.autograd.grad(truth.sum(), (w, b))
    there = [t.detach().cuda().to(dtype).requires_grad_() for t in (w, b)]
    unit = {torch.float32: 2.0**-11, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}[dtype]  # tf32 rounds as fp16
    y = F.alexnet_stem(image.cuda(), *there, norm=NORM, pooling=POOL, pool_first=order, **numbers())
    assert relative(y.cpu(), truth) <= 6 * unit
    for ours, theirs in zip(torch.autograd.grad(y.sum(), there), grads, strict=True):
        assert relative(ours.cpu(), theirs) <= 12 * unit + math.sqrt(
            3 / y.numel()
        )  # three maxima that another tap wins
