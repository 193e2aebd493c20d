"""Convolution, bias and ReLU through every seam: values, gradients, layouts, autocast, transforms, compilation, errors."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import alexnet_kernels as ak
from alexnet_kernels import dispatch, reference
from alexnet_kernels import functional as F
from alexnet_kernels.ops import _conv_arguments, _conv_ways, conv, fused
from alexnet_kernels.ops.conv import conv2d, conv2d_backward

LAYOUTS = (torch.contiguous_format, torch.channels_last)
ARGS = ((1, 2), (2, 1), (1, 1), 2)  # stride, padding, dilation, groups
BOTH = list(itertools.product(LAYOUTS, repeat=2))


def problem(
    dtype: torch.dtype = torch.double, layouts=(torch.contiguous_format,) * 2, *, grad: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, 6, 7).to(dtype).contiguous(memory_format=layouts[0])
    w = torch.randn(6, 2, 3, 2).to(dtype).contiguous(memory_format=layouts[1])
    return tuple(t.requires_grad_(grad) for t in (x, w, torch.randn(6).to(dtype)))  # type: ignore[return-value]


def torchs(x: Tensor, w: Tensor, b: Tensor | None, relu: bool, *args: object) -> Tensor:
    y = TF.conv2d(x, w, b, *args[:4])
    return y.relu() if relu else y


def gradients(y: Tensor, g: Tensor, *inputs: Tensor, **options: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, g, **options)


def layout(t: Tensor) -> torch.memory_format:
    return torch.contiguous_format if t.is_contiguous() else torch.channels_last


class StandIn:
    """Triton's place on a CPU, taken by matrix products in fp64: it refuses what no kernel must be given, and keeps count."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _check(self, run: str, *tensors: Tensor, args: tuple) -> tuple:
        self.calls.append(run)
        *geometry, _ = args
        assert all(type(v) is tuple for v in geometry[:3]), "geometry is looked up by tuples"
        for t in tensors:
            assert t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last), "not dense"
        maps = [t for t in tensors if t.shape[0] == tensors[0].shape[0] and t is not tensors[-1]]
        assert len({layout(t) for t in maps}) == 1, "maps of several layouts"
        return tuple(geometry)

    @staticmethod
    def _columns(x: Tensor, w: tuple[int, ...], stride, padding, dilation, groups) -> Tensor:
        """[N, groups, C/g · KH · KW, pixels]"""
        return TF.unfold(x.double(), w[2:], dilation, padding, stride).unflatten(1, (groups, -1))

    def forward(self, x, w, b, relu, *args) -> Tensor:
        geometry = self._check("forward", x, w, args=args)
        columns = self._columns(x, w.shape, *geometry)
        y = torch.einsum("gok,ngkp->ngop", w.double().flatten(1).unflatten(0, (geometry[3], -1)), columns)
        sides = conv._fake(x.to("meta"), w.to("meta"), None, relu, *args).shape[2:]
        y = y.flatten(1, 2).unflatten(2, sides)
        y = y if b is None else y + b.double()[:, None, None]
        return (y.clamp_min(0) if relu else y).to(x.dtype).contiguous(memory_format=layout(x))

    def dgrad(self, dz, x, w, *args) -> Tensor:
        stride, padding, dilation, groups = self._check("dgrad", dz, x, w, args=args)
        g = dz.double().flatten(2).unflatten(1, (groups, -1))
        columns = torch.einsum("gok,ngop->ngkp", w.double().flatten(1).unflatten(0, (groups, -1)), g)
        dx = TF.fold(columns.flatten(1, 2), x.shape[2:], w.shape[2:], dilation, padding, stride)
        return dx.to(x.dtype).contiguous(memory_format=layout(x))

    def wgrad(self, dz, x, w, *args) -> Tensor:
        geometry = self._check("wgrad", dz, x, w, args=args)
        g = dz.double().flatten(2).unflatten(1, (geometry[3], -1))
        dw = torch.einsum("ngop,ngkp->gok", g, self._columns(x, w.shape, *geometry))
        return dw.flatten(0, 1).reshape(w.shape).to(w.dtype)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in as the backend "triton", asked for by name."""
    stand_in = StandIn()
    for op, run in (("conv2d", stand_in.forward), ("conv2d_dgrad", stand_in.dgrad), ("conv2d_wgrad", stand_in.wgrad)):
        rows = [dispatch.Implementation("triton", dispatch.never, run), *dispatch._table[op][1:]]
        monkeypatch.setitem(dispatch._table, op, rows)
    monkeypatch.setattr(conv, "_some_kernel", _always)
    with ak.use_backend("triton"):
        yield stand_in


def _always(device: torch.device, dtype: torch.dtype) -> bool:
    return dispatch.requested() == "triton"


_always._dynamo_marked_constant = True  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("relu", [False, True])
def test_the_reference_is_torchs_gradient(relu: bool) -> None:
    x, w, b = problem()
    y = reference.conv2d(x, w, b, relu, *ARGS)
    g = torch.randn_like(y)
    expected = gradients(torchs(x, w, b, relu, *ARGS), g, x, w, b)
    for mask in itertools.product([False, True], repeat=3):
        found = reference.conv2d_backward(g, x, w, y if relu else None, *ARGS, mask)
        for got, want, asked in zip(found, expected, mask, strict=True):
            assert got.shape == (want.shape if asked else (0,))
            assert not asked or torch.allclose(got, want)


def test_nan_passes_the_mask_and_a_zero_does_not() -> None:
    x, w, b = problem(torch.double)
    y = torch.relu(torchs(x, w, b, False, *ARGS)).detach()
    y[0, 0, 0, 0], y[0, 0, 0, 1], y[0, 0, 0, 2] = float("nan"), 0.0, 1e-300
    g = torch.ones_like(y)
    dz, db = _conv_ways.epilogue_backward(g, y, True)
    assert dz[0, 0, 0, :3].tolist() == [1.0, 0.0, 1.0]
    assert torch.equal(db, dz.sum((0, 2, 3)))


# --------------------------------------------------------------------------------------------------------- the operation


@pytest.mark.parametrize(("layouts", "relu"), list(itertools.product(BOTH, [False, True])))
@pytest.mark.parametrize("dtype", [torch.double, torch.float32, torch.bfloat16])
def test_the_operation_is_torchs(layouts, relu: bool, dtype: torch.dtype) -> None:
    """Values, gradients and memory formats; in half types the result may be rounded once less than torch's."""
    x, w, b = problem(dtype, layouts)
    y, expected = conv2d(x, w, b, relu, *ARGS), torchs(x, w, b, relu, *ARGS)
    g = torch.randn_like(expected)
    found, wanted = gradients(y, g, x, w, b), gradients(expected, g, x, w, b)
    for got, want in zip((y, *found), (expected, *wanted), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want)
    assert layout(y) == layout(expected)
    assert layout(found[0]) == layout(wanted[0])
    assert layout(found[1]) == layouts[1], "the weight's gradient is added to it without a copy"


@pytest.mark.parametrize(
    "layouts", [BOTH[0], BOTH[3], *(pytest.param(b, marks=pytest.mark.slow) for b in BOTH[1:3])]
)  # the mixed ones are slow
def test_opcheck(layouts) -> None:
    x, w, b = problem(torch.double, layouts)
    torch.library.opcheck(conv2d, (x, w, b, True, *ARGS))
    y = conv2d(x, w, b, True, *ARGS).detach()
    grad = torch.randn_like(y).requires_grad_()
    torch.library.opcheck(conv2d_backward, (grad, x, w, y, *ARGS, (True, True, True)))


@pytest.mark.slow
def test_a_map_of_one_pixel_that_grows() -> None:
    """It is in both layouts; the result is in the weight's, as the shape function says."""
    w = torch.randn(6, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    args = (torch.randn(3, 4, 1, 1), w, torch.randn(6), True, (1, 1), (2, 2), (1, 1), 2)
    y = conv2d(*args)
    assert y.shape[2:] == (3, 3) and y.stride() == conv._fake(*args).stride()
    torch.testing.assert_close(y, torchs(*args))


def test_opcheck_of_parts() -> None:
    x, w, b = problem(grad=False)
    y = conv2d(x, w, b, True, *ARGS)
    torch.library.opcheck(conv2d_backward, (y, x, w, y, *ARGS, (False, True, False)))
    torch.library.opcheck(conv2d_backward, (y, x, w, None, *ARGS, (True, False, True), "ieee"))


def test_opcheck_of_views() -> None:
    x, w, b = problem(grad=False)
    wide = torch.randn(3, 9, 8, 9, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(conv2d, (wide[:, 2:6, 1:7, 2:].requires_grad_(), w, b, True, *ARGS))
    torch.library.opcheck(conv2d, (x[:1].expand(3, 4, 6, 7), w, None, False, *ARGS, "tf32"))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,), (1, 2)])
def test_gradcheck_and_gradgradcheck(relu: bool, which: tuple[int, ...]) -> None:
    inputs = [torch.randn(shape, dtype=torch.double) for shape in ((1, 2, 3, 4), (4, 1, 2, 2), (4,))]

    def call(*chosen: Tensor) -> Tensor:
        given = list(inputs)
        for i, t in zip(which, chosen, strict=True):
            given[i] = t
        return conv2d(*given, relu, *ARGS)

    chosen = tuple(inputs[i].clone().requires_grad_() for i in which)
    assert torch.autograd.gradcheck(call, chosen, fast_mode=relu)
    assert torch.autograd.gradgradcheck(call, chosen, fast_mode=True)


def test_third_gradients() -> None:
    x, w, b = (t[:1] if t.dim() == 4 and t.shape[0] == 3 else t for t in problem(grad=False))
    x = x.requires_grad_()

    def third(call: Callable[..., Tensor]) -> Tensor:
        value = call(x.sin(), w, b, True, *ARGS).pow(4).sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = g.pow(2).sum()
        return torch.autograd.grad(value, x)[0]

    torch.testing.assert_close(third(conv2d), third(torchs))


def test_empty_batch() -> None:
    for memory_format in LAYOUTS:
        x = torch.zeros(0, 4, 6, 7).contiguous(memory_format=memory_format).requires_grad_()
        _, w, b = problem(torch.float32)
        y = conv2d(x, w, b, True, *ARGS)
        assert y.shape == torchs(x, w, b, True, *ARGS).shape
        found = gradients(y, torch.zeros_like(y), x, w, b)
        assert found[0].shape == x.shape and not found[1].any() and not found[2].any()


# ------------------------------------------------------------------------------------------ the way past the dispatcher


@pytest.mark.parametrize(("layouts", "relu"), list(itertools.product(BOTH, [False, True])))
def test_kernels_are_called_with_dense_tensors_of_one_layout(kernels: StandIn, layouts, relu: bool) -> None:
    x, w, b = problem(torch.double, layouts)
    direct = conv.apply("conv2d", x, w, b, relu, *ARGS)
    through = conv2d(x, w, b, relu, *ARGS)
    expected = torchs(x, w, b, relu, *ARGS)
    g = torch.randn_like(expected)
    wanted = gradients(expected, g, x, w, b)
    for y in (direct, through):
        found = gradients(y, g, x, w, b)
        for got, want in zip((y, *found), (expected, *wanted), strict=True):
            torch.testing.assert_close(got, want)
        assert (layout(y), layout(found[0]), layout(found[1])) == (layout(expected), layout(wanted[0]), layouts[1])
    assert kernels.calls == ["forward"] * 2 + ["dgrad", "wgrad"] * 2


@pytest.mark.parametrize("which", [s for n in (1, 2) for s in itertools.combinations(range(3), n)])
def test_only_the_passes_that_are_asked_for_run(kernels: StandIn, which: tuple[int, ...]) -> None:
    inputs = problem(grad=False)
    for i in which:
        inputs[i].requires_grad_()
    y = F.conv2d_relu(*inputs, *ARGS)
    y.sum().backward()
    runs = {0: ["dgrad"], 1: ["wgrad"], 2: []}
    assert kernels.calls == ["forward", *(run for i in which for run in runs[i])]
    assert [t.grad is not None for t in inputs] == [i in which for i in range(3)]


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_kept_for_backward(kernels: StandIn, relu: bool) -> None:
    """Input, weight and result, themselves: no copy, no mask."""
    x, w, b = problem()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = conv.apply("conv2d", x, w, b, relu, *ARGS)
    assert kept == [x.data_ptr(), w.data_ptr(), *[y.data_ptr()] * relu]


def test_a_result_may_be_overwritten_where_no_relu_needs_it(kernels: StandIn) -> None:
    """As the operation that takes bias and ReLU over does."""
    x, w, b = problem()
    a, left = fused.convolve(x, w, None, *ARGS)
    assert left is None
    y = fused.activate(a, b)
    g = torch.randn_like(y)
    for got, want in zip(gradients(y, g, x, w, b), gradients(torchs(x, w, b, True, *ARGS), g, x, w, b), strict=True):
        torch.testing.assert_close(got, want)


def test_double_backward_is_plain_torch_and_says_so(kernels: StandIn) -> None:
    x, w, b = problem()
    y = F.conv2d_relu(x, w, b, *ARGS)
    (dx,) = gradients(y, torch.ones_like(y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of conv2d_backward: double backward runs in plain torch"):
        dx.sum().backward()


def test_double_backward_of_the_direct_way(kernels: StandIn) -> None:
    rows = {op: dispatch._table[op] for op in ("conv2d", "conv2d_dgrad", "conv2d_wgrad")}
    assert all(r[0].backend == "triton" for r in rows.values())
    x, w, b = problem()
    with ak.use_backend("auto"):  # the stand-in comes first there too; only the call on a CPU's quick way does not ask
        y = conv._on_kernel(x, w, b, True, (*ARGS, None))
        assert kernels.calls == ["forward"]
        (dx,) = gradients(y, torch.ones_like(y), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.square().sum(), w)
    expected = torchs(x, w, b, True, *ARGS)
    (want,) = gradients(expected, torch.ones_like(y), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(want.square().sum(), w)[0])


def test_a_backward_in_another_thread_runs_where_its_forward_did(kernels: StandIn) -> None:
    x, w, b = problem()
    y = F.conv2d_relu(x, w, b, *ARGS)
    thread = threading.Thread(target=lambda: y.sum().backward())
    with ak.use_backend("reference"):
        thread.start()
        thread.join()
    assert kernels.calls == ["forward", "dgrad", "wgrad"]


def test_a_call_that_nobody_forced_is_torchs_on_a_cpu() -> None:
    x, w, b = problem()
    with dispatch.recording() as used:
        y = F.conv2d_relu(x, w, b, *ARGS)
    assert used == {"reference"}
    assert type(y.grad_fn).__name__ == "ReluBackward0"
    assert ak.explain(F.conv2d_relu, x, w, b, *ARGS).backend == "reference"


# ------------------------------------------------------------------------------------------------------------ odd strides


def _nan_in_the_gap(shape: tuple[int, ...], memory_format: torch.memory_format, gap: str) -> Tensor:
    """A view of ordinary numbers; the elements between its rows, channels or images are NaN."""
    n, c, h, w = shape
    more = {"rows and columns": (n, c, h + 1, w + 1), "channels": (n, c + 8, h, w), "images": (2 * n, c, h, w)}[gap]
    whole = torch.full(more, float("nan"), dtype=torch.double).contiguous(memory_format=memory_format)
    view = {
        "rows and columns": whole[:, :, :h, :w],
        "channels": whole[:, :c],
        "images": whole[::2],
    }[gap]
    return view.copy_(torch.randn(shape))


@pytest.mark.parametrize("gap", ["rows and columns", "channels", "images"])
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("compiler")
def test_nothing_is_inferred_from_strides(kernels: StandIn, memory_format, gap: str, compiled: bool) -> None:
    """A slice may have shape and strides of a padded buffer, and anything at all where its zeros would be."""
    x = _nan_in_the_gap((3, 4, 6, 7), memory_format, gap).requires_grad_()
    w = _nan_in_the_gap((6, 2, 3, 2), memory_format, gap).requires_grad_()
    b = torch.randn(12, dtype=torch.double)[::2].requires_grad_()
    call = lambda x, w, b: F.conv2d_relu(x, w, b, *ARGS)  # noqa: E731
    y = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(x, w, b)
    expected = torchs(x, w, b, True, *ARGS)
    g = _nan_in_the_gap(tuple(y.shape), memory_format, gap)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, g, x, w, b), gradients(expected, g, x, w, b))
    assert "forward" in kernels.calls and "wgrad" in kernels.calls


@pytest.mark.parametrize("shape", [(1, 4, 6, 7), (3, 1, 6, 7), (3, 4, 1, 7), (3, 4, 6, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_sides_of_one(kernels: StandIn, shape: tuple[int, ...], memory_format) -> None:
    """Their strides mean nothing, and a tensor can be in both layouts at once."""
    x = torch.randn(shape, dtype=torch.double).contiguous(memory_format=memory_format).requires_grad_()
    w = torch.randn(2, shape[1], 1, 1, dtype=torch.double).requires_grad_()
    y, expected = F.conv2d_relu(x, w, padding=1), TF.conv2d(x, w, padding=1).relu()
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(gradients(y, g, x, w), gradients(expected, g, x, w))
    torch.library.opcheck(conv2d, (x, w, None, True, (1, 1), (1, 1), (1, 1), 1), test_utils="test_faketensor")


# ---------------------------------------------------------------------------------------------------- compiled, autocast


@pytest.fixture
def compiler() -> Iterator[None]:
    """Forgets what it compiled: one function compiled for many cases is soon one too many."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graph_of(call: Callable[..., Tensor], *inputs: Tensor, dynamic: bool = False) -> tuple[list[str], Tensor]:
    """The operations that ``torch.compile`` finds in a call, and its result."""
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    return seen, torch.compile(call, fullgraph=True, dynamic=dynamic, backend=backend)(*inputs)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_holds_plain_torch_where_no_kernel_can_run(dynamic: bool) -> None:
    x, w, b = problem(torch.float32)
    names, y = graph_of(lambda *t: F.conv2d_relu(*t, *ARGS), x, w, b, dynamic=dynamic)
    assert any("conv2d" in name for name in names) and not any("alexnet" in name for name in names)
    torch.testing.assert_close(y, torchs(x, w, b, True, *ARGS))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("memory_format", "dynamic"), list(zip(LAYOUTS, [False, True], strict=True)))
def test_a_graph_holds_the_operation_where_one_can(kernels: StandIn, memory_format, dynamic: bool) -> None:
    call = lambda x, w, b: F.conv2d_relu(x * 2, w, b, *ARGS) + 1  # noqa: E731
    x, w, b = problem(torch.double, (memory_format, memory_format))
    names, _ = graph_of(call, x, w, b, dynamic=dynamic)
    assert "alexnet_kernels.conv2d.default" in names
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (3, 2):
        y, expected = compiled(x[:n], w, b), torchs(x[:n] * 2, w, b, True, *ARGS) + 1
        g = torch.randn_like(expected)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(gradients(y, g, x, w, b), gradients(expected, g, x, w, b))
    assert {"forward", "dgrad", "wgrad"} == set(kernels.calls)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_by_inductor(kernels: StandIn) -> None:
    """Which plans memory and strides for itself: the operation's shape function is taken at its word."""
    call = lambda x, w, b: F.conv2d_relu(x * 2, w, b, *ARGS).sin()  # noqa: E731
    x, w, b = problem(torch.double, (torch.channels_last, torch.contiguous_format))
    y, expected = torch.compile(call, fullgraph=True)(x, w, b), torchs(x * 2, w, b, True, *ARGS).sin()
    g = torch.randn_like(expected)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, g, x, w, b), gradients(expected, g, x, w, b))


@pytest.mark.parametrize("way", ["direct", "operation", "compiled"])
def test_autocast_casts_as_torch_does(kernels: StandIn, way: str) -> None:
    call = {
        "direct": lambda x, w, b: F.conv2d_relu(x, w, b, *ARGS),
        "operation": lambda x, w, b: conv2d(x, w, b, True, *ARGS),
        "compiled": torch.compile(lambda x, w, b: F.conv2d_relu(x, w, b, *ARGS), fullgraph=True, backend="aot_eager"),
    }[way]
    x, w, b = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = call(x, w, b), torchs(x, w, b, True, *ARGS)
        assert y.dtype == expected.dtype == torch.bfloat16
        assert call(*(t.detach().double() for t in (x, w, b))).dtype == torch.double
    torch.testing.assert_close(y, expected)
    with ak.use_backend(
        "reference"
    ):  # the kernel around a convolution is another part's; its mask is compared elsewhere
        grad = torch.ones_like(y)
        found = conv2d_backward(
            grad, x.detach().bfloat16(), w.detach().bfloat16(), y.detach(), *ARGS, (True, True, True)
        )
    for got, want in zip(found, gradients(expected, grad, x, w, b), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2**-6, atol=2**-6)


def test_fake_tensors_of_a_gpu_that_is_not_there() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 4, 6, 7, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
        w = torch.empty(6, 2, 3, 2, device="cuda", requires_grad=True)
        y = F.conv2d_relu(x, w, None, *ARGS)
        dx, dw, db = conv2d_backward(
            y.detach(), x, w, y, *ARGS, (True, True, False)
        )  # autograd itself wants the device
    assert y.device.type == "cuda" and layout(y) == torch.channels_last
    assert y.shape == F.conv2d_relu(torch.empty(3, 4, 6, 7), torch.empty(6, 2, 3, 2), None, *ARGS).shape
    assert (dx.shape, dw.shape, db.shape) == (x.shape, w.shape, (0,))
    assert (layout(dx), layout(dw)) == (torch.channels_last, torch.contiguous_format)


def test_an_image_that_31_bits_do_not_count_is_torchs() -> None:
    """2^31 elements are one too many: a descriptor's sizes are signed."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        few, many = (torch.empty(2, 2**15, 2**8, 2**8 - less, device="cuda") for less in (1, 0))
    assert "31 bits" not in str(_conv_ways._triton_cannot(few))
    assert _conv_ways._triton_cannot(many) == f"an image has {2**31} elements: kernels count them by 31 bits"


def test_meta_tensors() -> None:
    x, w, b = (t.detach().to("meta").requires_grad_() for t in problem(torch.float32))
    y = conv2d(x, w, b, True, *ARGS)
    y.sum().backward()
    assert y.is_meta and y.shape == F.conv2d_relu(x, w, b, *ARGS).shape and w.grad.shape == w.shape


# --------------------------------------------------------------------------------------------- arguments, as torch's are


def test_function_transforms_are_plain_torch(kernels: StandIn) -> None:
    x, w, b = problem(grad=False)
    for transform in (
        lambda f: torch.vmap(f)(x[None]),
        lambda f: torch.func.jvp(f, (x,), (x.cos(),)),
        lambda f: torch.func.grad(lambda t: f(t).sum())(x),
    ):
        with pytest.raises(RuntimeError, match="'triton' cannot run conv2d_relu: a function transform"):
            transform(lambda t: F.conv2d_relu(t, w, b, *ARGS))
        with ak.use_backend("auto"):
            got = transform(lambda t: F.conv2d_relu(t, w, b, *ARGS))
        torch.testing.assert_close(got, transform(lambda t: torchs(t, w, b, True, *ARGS)))
    assert kernels.calls == []


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": "same", "dilation": 2},
        {"padding": [1, 0], "stride": [2]},
        {"stride": (1,), "padding": 1, "groups": 2},
    ],
    ids=str,
)
def test_every_way_to_write_a_geometry(kernels: StandIn, options: dict) -> None:
    x, w = torch.randn(2, 4, 8, 9, dtype=torch.double), torch.randn(6, 4, 3, 3, dtype=torch.double)
    w = w[:, : 4 // options.get("groups", 1)]
    torch.testing.assert_close(F.conv2d_relu(x, w, **options), TF.conv2d(x, w, **options).relu())
    torch.testing.assert_close(F.conv2d_relu(x[0], w, **options), TF.conv2d(x[0], w, **options).relu())
    assert kernels.calls == ["forward"] * 2


def test_same_padding_of_an_even_kernel_is_torchs(kernels: StandIn) -> None:
    """One zero more behind than before, which no pair of numbers says."""
    x, w = torch.randn(2, 4, 8, 9, dtype=torch.double), torch.randn(6, 4, 2, 3, dtype=torch.double)
    with pytest.raises(
        RuntimeError, match="'triton' cannot run conv2d_relu: torch's own convolution runs for, or refuses"
    ):
        F.conv2d_relu(x, w, padding="same")
    with ak.use_backend("auto"), pytest.warns(UserWarning, match="padding='same'"):
        assert torch.equal(F.conv2d_relu(x, w, padding="same"), TF.conv2d(x, w, padding="same").relu())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(0, 5)] * 4),
    weight=st.tuples(*[st.integers(0, 4)] * 4),
    numbers=st.tuples(*[st.tuples(st.integers(-1, 3), st.integers(-1, 3))] * 3),
    groups=st.integers(-1, 3),
)
def test_a_geometry_is_numbers_exactly_where_torch_takes_it(shape, weight, numbers, groups) -> None:
    """What a kernel is given, torch would not have refused, and its result has the shape that the operation says."""
    found = _conv_arguments._geometry(shape, weight, *numbers, groups)
    x, w = torch.empty(shape, device="meta"), torch.empty(weight, device="meta")
    if found is not None:
        assert conv._fake(x, w, None, True, *found).shape == TF.conv2d(x, w, None, *numbers, groups).shape
        return
    if all(shape) and all(weight):
        with pytest.raises((RuntimeError, ValueError)):
            TF.conv2d(torch.empty(shape), torch.empty(weight), None, *numbers, groups)


WRONG: list[Callable[[Callable], object]] = [
    lambda f: f(torch.ones(1, 4, 5, 5), torch.ones(2, 3, 3, 3)),
    lambda f: f(torch.ones(1, 4, 2, 2), torch.ones(2, 4, 3, 3)),
    lambda f: f(torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3), torch.ones(3)),
    lambda f: f(torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3).double()),
    lambda f: f(torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3), None, 0),
    lambda f: f(torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3), None, 1, -1),
    lambda f: f(torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3), None, 2, "same"),
    lambda f: f(torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3), None, 1, "around"),
    lambda f: f(torch.ones(4, 5), torch.ones(2, 4, 3, 3)),
    lambda f: f(torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3), None, 1, 0, 1, 0),
    lambda f: f(torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3), None, "1"),
]


@pytest.mark.parametrize("call", WRONG)
def test_errors_are_torchs_with_and_without_a_kernel(kernels: StandIn, call: Callable) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as theirs:
        call(TF.conv2d)
    with ak.use_backend("auto"), pytest.raises(theirs.type) as ours:
        call(F.conv2d_relu)
    assert str(ours.value)[:60] == str(theirs.value)[:60]  # behind that, the parser of arguments lists all it was given
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        call(F.conv2d_relu)
    assert kernels.calls == []


@pytest.mark.parametrize("dtype", [torch.complex64, torch.double, torch.int32])
def test_dtypes_that_no_kernel_takes(dtype: torch.dtype) -> None:
    x, w = torch.ones(1, 2, 4, 4, dtype=dtype), torch.ones(3, 2, 2, 2, dtype=dtype)
    if dtype == torch.complex64:
        with pytest.raises(RuntimeError):
            F.conv2d_relu(x, w)  # torch's ReLU refuses what its convolution made
    else:
        assert torch.equal(F.conv2d_relu(x, w), TF.conv2d(x, w).relu())
    with ak.use_backend("triton"), pytest.raises(RuntimeError, match=f"'triton' cannot run conv2d.*{dtype}"):
        F.conv2d_relu(x, w)


# -------------------------------------------------------------------------------------------------------------- precision


@pytest.fixture
def flags() -> Iterator[None]:
    conv_flag = torch.backends.cudnn.conv
    before = conv_flag.fp32_precision
    with torch.backends.__allow_nonbracketed_mutation():  # torch's own testing module, once imported, freezes the flags
        yield
        torch.backends.cudnn.allow_tf32 = before == "tf32"
    assert conv_flag.fp32_precision == before


@pytest.mark.usefixtures("flags")
def test_precision_is_what_torchs_flags_say() -> None:
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        assert _conv_ways.torchs_precision() == ("tf32" if allowed else "ieee")
    for precision in ("ieee", "tf32"):  # the newer flags: reading the older one now raises
        torch.backends.cudnn.conv.fp32_precision = precision
        assert _conv_ways.torchs_precision() == precision


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("before", ["ieee", "tf32"])
@pytest.mark.parametrize("wanted", [None, "ieee", "tf32", "tf32x3"])
def test_flags_are_put_back(before: str, wanted) -> None:
    torch.backends.cudnn.conv.fp32_precision = before
    expected = before if wanted is None else "tf32" if wanted == "tf32" else "ieee"
    with contextlib.suppress(ZeroDivisionError), _conv_ways._flags_for(torch.ones(1), wanted):
        assert _conv_ways.torchs_precision() == expected
        _ = 1 / 0
    assert torch.backends.cudnn.conv.fp32_precision == before
    with _conv_ways._flags_for(torch.ones(1).half(), wanted):
        assert torch.backends.cudnn.conv.fp32_precision == before


def test_precision_reaches_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    for op, run in (("conv2d", reference.conv2d), ("conv2d_dgrad", None), ("conv2d_wgrad", None)):
        implementation = dispatch._table[op][-1].run

        def spy(*args: object, implementation=implementation) -> Tensor:
            seen.append(args[-1])
            return implementation(*args)

        monkeypatch.setitem(dispatch._table, op, [dispatch.Implementation("triton", dispatch.never, spy)])
        del run
    x, w, b = problem()
    with ak.use_backend("triton"):
        F.conv2d_relu(x, w, b, *ARGS, precision="tf32x3").sum().backward()
        conv2d(x, w, b, True, *ARGS, "ieee").sum().backward()
        conv2d(x, w, b, True, *ARGS).sum().backward()
    assert seen == ["tf32x3"] * 3 + ["ieee"] * 3 + [None] * 3


def test_an_unknown_precision() -> None:
    x, w, _ = problem()
    for call in (F.conv2d_relu, lambda *a, **k: ak.explain("conv2d_relu", *a, **k)):
        with pytest.raises(ValueError, match="precision='fp8' is unknown; use 'ieee', 'tf32', 'tf32x3', or None"):
            call(x, w, groups=2, precision="fp8")
    assert torch.equal(F.conv2d_relu(x, w, groups=2, precision="tf32"), TF.conv2d(x, w, groups=2).relu())
