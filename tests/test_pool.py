"""Max pooling and LRN with pooling through every seam, on a stand-in for the kernels: see ``stand_in``."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import stand_in
import torch
import torch.nn.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import alexnet_kernels as ak
from alexnet_kernels import _extension, dispatch, nn, reference
from alexnet_kernels import functional as F
from alexnet_kernels._fusion import steps
from alexnet_kernels.ops import fused, pool

tnn = torch.nn
LAYOUTS = (torch.contiguous_format, torch.channels_last)
WINDOW = (3, 3, 2, 2, 0, 0, 1, 1)
NORM = (5, 0.06, 0.75, 2.0, 1)  # size, scale, beta, k, groups
GEOMETRIES = [  # kernel_size, stride, padding, dilation, ceil_mode
    (3, 2, 0, 1, False),
    (3, 2, 1, 1, True),
    (2, None, 0, 1, True),
    ((3, 2), (1, 2), (1, 0), (2, 1), False),
    ([2], 3, 1, 1, True),
]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation of this file has a kernel, called ``"cpu"``."""
    for op, rows in stand_in.table().items():
        monkeypatch.setitem(dispatch._table, op, rows)
    monkeypatch.setattr(pool, "_torchs_is_quicker", lambda x, with_place: False)


@pytest.mark.parametrize(("shape", "wanted", "backend"), [
    ((1, 4, 64, 64), False, "cpu"),  # 2^14 elements
    ((1, 4, 64, 64), True, "reference"),
    ((1, 16, 64, 64), True, "cpu"),
    ((1, 4, 63, 65), False, "reference"),
])  # fmt: skip
@pytest.mark.skipif(_extension.why_not("cpu") is not None, reason=f"no CPU kernels: {_extension.why_not('cpu')}")
def test_torchs_own_pooling_runs_where_it_is_quicker(shape: tuple[int, ...], wanted: bool, backend: str) -> None:
    x = torch.randn(shape, requires_grad=wanted)
    assert ran(lambda: F.max_pool2d(x, 3, 2)) == {backend}
    assert F.explain(F.max_pool2d, x, 3, 2).backend == backend
    last = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_(wanted)
    assert ran(lambda: F.max_pool2d(last, 3, 2)) == {"reference"}
    assert "quicker" in F.explain(F.max_pool2d, last, 3, 2).why_not["cpu"]
    with ak.use_backend("cpu"):
        assert ran(lambda: F.max_pool2d(last, 3, 2)) == {"cpu"}


def values(*shape: int, dtype: torch.dtype = torch.double, layout: torch.memory_format = LAYOUTS[0]) -> Tensor:
    """Quarters, so that windows hold equal values."""
    return (torch.randn(shape) * 4).round().div(4).to(dtype).contiguous(memory_format=layout)


def ran(call: Callable[[], object]) -> set[str]:
    with dispatch.recording() as used:
        call()
    return used


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_places_are_torchs_indices(geometry: tuple, layout: torch.memory_format) -> None:
    x = values(2, 3, 7, 9, layout=layout)
    x[0, 0, 2:5, 3] = float("nan")
    x[1, 1] = -torch.inf
    window, ceil_mode = pool.window_of(*geometry[:4]), geometry[4]
    expected, index = TF.max_pool2d(x, *geometry, return_indices=True)
    for y, place in (
        reference.max_pool2d_with_place(x, window, ceil_mode),
        pool.max_pool2d(x, window, ceil_mode, True),
    ):
        assert torch.equal(y.nan_to_num(9), expected.nan_to_num(9)) and place.dtype == torch.uint8
        assert torch.equal(reference.indices(place, window, 9), index)
        assert torch.equal(reference.pick(x, index).nan_to_num(9), y.nan_to_num(9))
    y, place = stand_in.max_pool2d(x, window, ceil_mode, True)
    number = ~expected.isnan()  # of several NaN torch's two CPU loops name different ones
    assert torch.equal(y[number], expected[number])
    assert torch.equal(reference.indices(place, window, 9)[number], index[number])


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ceil_mode=st.booleans(),
)
def test_shapes_and_refusals_are_torchs(kernel, stride, padding, dilation, sides, ceil_mode) -> None:
    """What is offered to a kernel has torch's shape; what torch refuses is not offered."""
    x, geometry = torch.empty(2, 3, *sides, device="meta"), (kernel, stride, padding, dilation)
    offered = pool.why_plain(x, pool.window_of(*geometry), ceil_mode) is None
    try:
        expected = TF.max_pool2d(x, *geometry, ceil_mode)
    except RuntimeError:
        assert not offered
        return
    assert offered or any(p and d > 1 for p, d in zip(padding, dilation, strict=True))
    if offered:
        assert pool.empty_outputs(x, pool.window_of(*geometry), ceil_mode, True)[0].shape == expected.shape


CALLS = {
    "pool": lambda x, b, order, kept: (pool.max_pool2d, (x, WINDOW, False, kept)),
    "lrn": lambda x, b, order, kept: (fused.lrn_pool, (x, None, False, *NORM, WINDOW, False, order, kept)),
    "bias": lambda x, b, order, kept: (fused.lrn_pool, (x, b, True, *NORM[:4], 2, WINDOW, True, order, kept)),
}


@pytest.mark.parametrize(("name", "order"), [("pool", False), ("lrn", False), ("bias", True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name: str, order: bool, layout: torch.memory_format) -> None:
    x = torch.randn(2, 6, 7, 8).contiguous(memory_format=layout).requires_grad_()
    bias = torch.randn(6, requires_grad=True)
    op, args = CALLS[name](x, bias, order, True)
    torch.library.opcheck(op, args)
    op, args = CALLS[name](x.detach()[:, :, 1:, ::2], bias.detach(), order, False)
    torch.library.opcheck(op, args)
    assert op(*args)[1].shape == (0,)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_the_gradients(order: bool, layout: torch.memory_format) -> None:
    x = torch.randn(2, 6, 7, 8).contiguous(memory_format=layout).requires_grad_()
    bias = torch.randn(6, requires_grad=True)
    y, place = fused.lrn_pool(x, bias, True, *NORM, WINDOW, False, order, True)
    g = torch.randn_like(y).requires_grad_()
    torch.library.opcheck(pool.max_pool2d_backward, (g, place, 7, 8, WINDOW))
    quick = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
    )  # the fourth takes 10 s; gradgradcheck stands in
    torch.library.opcheck(
        fused.lrn_pool_backward, (g, x, bias, place, True, *NORM, WINDOW, order, True), test_utils=quick
    )
    torch.library.opcheck(
        fused.lrn_pool_backward, (g, x, None, place, False, *NORM, WINDOW, order, False), test_utils=quick
    )


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bias_with_gaps(order: bool, layout: torch.memory_format, device: torch.device) -> None:
    """The kernels read a bias element after element: a slice, or one of an expanded scalar, is copied before."""
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is on only where there is no GPU")
    x = torch.randn(2, 16, 7, 7, device=device).contiguous(memory_format=layout)
    bias = torch.randn(32, device=device)[::2]
    with ak.use_backend("triton"):
        expected = fused.lrn_pool(x, bias.contiguous(), True, *NORM, WINDOW, False, order, True)
        found = fused.lrn_pool(x, bias, True, *NORM, WINDOW, False, order, True)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        grads = []
        for b in (bias.clone(), bias):
            leaves = [x.clone().requires_grad_(), b.detach().requires_grad_()]
            y = fused.apply(leaves[0] * 1, NORM, GEOMETRIES[0], order, True, leaves[1])
            grads.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def composed(x: Tensor, bias: Tensor | None, order: bool, norm: tuple = NORM, pooling: tuple = GEOMETRIES[0]) -> Tensor:
    """ReLU, LRN and pooling of torch's own, grouped."""
    a = x if bias is None else (x + bias[:, None, None]).relu()
    size, scale, beta, k, groups = norm
    a = TF.max_pool2d(a, *pooling) if order else a
    a = torch.cat([TF.local_response_norm(part, size, scale * size, beta, k) for part in a.chunk(groups, 1)], 1)
    return a if order else TF.max_pool2d(a, *pooling)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "dispatcher"])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_to_any_order(backend: str, direct: bool, order: bool, biased: bool, monkeypatch) -> None:
    if not direct:
        monkeypatch.setattr(fused, "is_direct", lambda *_: False)
    x = torch.randn(2, 4, 5, 5, dtype=torch.double, requires_grad=True)
    inputs = (x, torch.randn(4, dtype=torch.double, requires_grad=True)) if biased else (x,)

    def call(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return fused.lrn_pool(x, bias, biased, *NORM[:4], 2, WINDOW, False, order, True)[0]

    def applied(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return fused.apply(x * 1, (*NORM[:4], 2), GEOMETRIES[0], order, biased, bias)

    with ak.use_backend(backend):
        for function in (call, applied):
            torch.testing.assert_close(
                function(*inputs), composed(*inputs, *[None] * (not biased), order, (*NORM[:4], 2))
            )
            assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling_on_a_kernel_is_torchs(geometry: tuple, layout: torch.memory_format) -> None:
    for x in (values(2, 3, 7, 9, layout=layout), values(3, 7, 9), values(2, 3, 8, 12)[:, :, 1:, ::2]):
        x.requires_grad_()
        got, expected = F.max_pool2d(x, *geometry), TF.max_pool2d(x, *geometry)
        assert torch.equal(got, expected) and got.stride() == expected.stride()
        g = torch.randn_like(expected)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (got, expected)))
        assert ran(lambda x=x: F.max_pool2d(x, *geometry)) == {"cpu"}
    small = torch.randn(1, 2, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: F.max_pool2d(x, *geometry), small, fast_mode=True)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.randint(9, (2, 3, 7, 7)), {}),
        (torch.zeros(0, 3, 7, 7), {}),
        (torch.randn(2, 3, 7, 7), {"return_indices": True}),
        (torch.randn(1, 1, 1, 9), {"kernel_size": (2, 3), "padding": 1, "dilation": (2, 1), "stride": 1}),
    ],
    ids=["integers", "empty", "indices", "windows in the padding"],
)
def test_what_torch_answers_itself(x: Tensor, options: dict) -> None:
    options = {"kernel_size": 3, **options}
    assert ran(lambda: torch.testing.assert_close(F.max_pool2d(x, **options), TF.max_pool2d(x, **options))) == {
        "reference"
    }
    with (
        ak.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run max_pool2d: .*torch's own"),
    ):
        F.max_pool2d(x, **options)


@pytest.mark.usefixtures("kernels")
def test_nothing_is_kept_where_no_gradient_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    original = fused.dispatch.perform
    monkeypatch.setattr(dispatch, "perform", lambda chosen, *args: kept.append(args[-1]) or original(chosen, *args))
    x = torch.randn(1, 8, 5, 5)
    F.lrn_max_pool2d(x, 5)
    F.lrn_max_pool2d(x.requires_grad_(), 5)
    with torch.no_grad():
        F.lrn_max_pool2d(x, 5)
        F.max_pool2d(x, 2)
    assert kept == [False, True, False, False]
    with pytest.raises(RuntimeError, match="with_place=False keeps nothing for backward"):
        pool.max_pool2d(x, WINDOW, False, False)[0].sum().backward()
    with pytest.raises(RuntimeError, match="with_place=False keeps nothing for backward"):
        fused.lrn_pool(x, None, False, *NORM, WINDOW, False, False, False)[0].sum().backward()


def _net(order: bool, bias: bool = True, groups: int = 1) -> tnn.Sequential:
    norm, pooling = nn.LocalResponseNorm(5, 0.3, k=2.0, groups=groups), tnn.MaxPool2d(3, 2)
    rest = (pooling, norm) if order else (norm, pooling)
    return tnn.Sequential(tnn.Conv2d(3, 8, 3, padding=1, groups=1, bias=bias), tnn.ReLU(inplace=True), *rest)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("apart", [False, True], ids=["bias in the convolution", "bias in the kernel"])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_run_of_four_is_one_operation(apart: bool, order: bool, bias: bool, groups: int, monkeypatch) -> None:
    """Values, every gradient, second gradients; a watched member, copies."""
    if apart:
        monkeypatch.setattr(fused, "BIAS_APART", ("cpu",))
    theirs = _net(order, bias, groups).double()
    ours = nn.FusedSequential(*copy.deepcopy(theirs))
    assert ran(lambda: ours(torch.randn(1, 3, 7, 7).double())) == {"reference", "cpu"}
    names = [step.op for step in steps(ours)]
    assert names == ["conv2d_relu_max_pool2d_lrn" if order else "conv2d_relu_lrn_max_pool2d"]
    x = torch.randn(2, 3, 9, 8, dtype=torch.double, requires_grad=True)
    for again in (ours, copy.deepcopy(ours)):
        results = []
        for net in (again, theirs):
            leaves = (x, *net.parameters())
            y = net(x)
            grads = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
            twice = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)
            results.append((y, grads, twice))
        torch.testing.assert_close(*results)
    seen: list[Tensor] = []
    ours[1].register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(ours(x), theirs(x))
    assert len(seen) == 1


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("order", [False, True])
def test_a_run_without_a_kernel_is_as_before(order: bool) -> None:
    """An unbatched image, where LRN reads [N, C, L]; learned coefficients; the half-precision autocast; a forced reference."""
    theirs = _net(order)
    ours = nn.FusedSequential(*theirs)
    x = torch.randn(2, 3, 9, 9)
    for image in (x[0], x[:0]):
        torch.testing.assert_close(ours(image), theirs(image))
    with ak.use_backend("reference"):
        assert ran(lambda: torch.testing.assert_close(ours(x), theirs(x))) == {"reference"}
    with torch.autocast("cpu", torch.bfloat16):
        half = ours(x)
        assert half.dtype == torch.bfloat16
    half.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())
    learned = nn.FusedSequential(*_net(order))
    learned[3 if order else 2].alpha = torch.tensor(0.3, requires_grad=True)
    learned(x).sum().backward()
    assert learned[3 if order else 2].alpha.grad is not None


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["pool", "run"])
def test_compiled_and_exported(name: str, layout: torch.memory_format) -> None:
    """Whole graphs that hold the operation, one of them for every batch; and its gradient."""
    torch._dynamo.reset()
    module = nn.MaxPool2d(3, 2) if name == "pool" else nn.FusedSequential(*_net(False))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for n in (2, 3, 5):
        x = torch.randn(n, 3, 9, 9).contiguous(memory_format=layout).requires_grad_()
        y, expected = compiled(x), module(x)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, expected)))
        frames.add(counter.frame_count)
    assert len(frames) == 1
    assert any("alexnet_kernels" in str(node.target) for node in counter.graphs[-1].graph.nodes)
    exported = torch.export.export(module, (x.detach(),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    torch.testing.assert_close(exported.module()(x[:2]), module(x[:2]))
    traced = torch.jit.trace(module, (x.detach(),))
    torch.testing.assert_close(traced(x), module(x))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN layout")
def test_onednns_own_layout_is_torchs() -> None:
    x = torch.randn(1, 8, 64, 64)
    for size in (64, 9):  # large enough for a kernel, and not
        part = x[..., :size, :size]
        torch.testing.assert_close(F.max_pool2d(part.to_mkldnn(), 3, 2).to_dense(), TF.max_pool2d(part, 3, 2))


def test_a_graph_without_kernels_holds_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    for op in stand_in.OPERATIONS:
        monkeypatch.setitem(dispatch._table, op, dispatch._table[op][-1:])
    counter = CompileCounterWithBackend("eager")
    torch.compile(lambda x: F.lrn_max_pool2d(x, 5), fullgraph=True, backend=counter)(torch.randn(1, 3, 7, 7))
    called = [str(node.target) for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert not any(op in target for op in ("alexnet_kernels.max_pool2d", "lrn_pool") for target in called)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("order", [False, True])
def test_function_transforms_run_plain_torch(order: bool) -> None:
    ours, theirs = (net.double() for net in (nn.FusedSequential(*_net(order)), _net(order)))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, 3, 7, 7, dtype=torch.double)
    for transform in (torch.vmap, lambda f: lambda x: torch.func.jvp(f, (x[0],), (x[1],))):
        torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))


@pytest.mark.usefixtures("kernels")
def test_explain_names_the_kernel_and_its_parts() -> None:
    x, w = torch.randn(1, 16, 7, 7), torch.randn(8, 16, 3, 3)
    assert ak.explain("max_pool2d", x, 3).backend == "cpu"
    assert "int64" in ak.explain("max_pool2d", x, 3, return_indices=True).why_not["triton"]
    for name in ("lrn_max_pool2d", "max_pool2d_lrn"):
        said = ak.explain(name, x, 5)
        assert (said.op, said.backend, said.parts) == (name, "cpu", ())
        assert "can run; cpu comes first" in said.why_not["reference"]
        apart = ak.explain(name, x, 5, kernel_size=1, stride=1, k=torch.tensor(1.0))
        assert sorted(part.op for part in apart.parts) == ["lrn", "max_pool2d"]
        said = ak.explain(f"conv2d_relu_{name}", x, w, None, (1, 0, 1, 1), (5, 1e-4, 0.75, 1.0), (3, 2, 0, 1, False))
        assert [(part.op, part.backend) for part in said.parts] == [("conv2d", "reference"), (name, "cpu")]
        assert said.backend == "reference + cpu" and set(said.why_not) == {"triton", "cuda", "cudnn"}


@pytest.mark.usefixtures("kernels")
def test_a_backward_runs_on_the_backend_of_its_forward() -> None:
    x = torch.randn(1, 8, 7, 7, requires_grad=True)
    with ak.use_backend("cpu"):
        y = F.lrn_max_pool2d(x, 5)
    with ak.use_backend("reference"):
        assert ran(lambda: y.sum().backward(retain_graph=True)) == {"cpu"}
    with ak.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' has no implementation of conv2d"):
        nn.FusedSequential(*_net(False))(torch.randn(1, 3, 7, 7))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("bias", "relu", "order"), list(itertools.product([False, True], repeat=3)))
def test_the_reference_agrees_with_the_stand_in(bias: bool, relu: bool, order: bool) -> None:
    x, b = values(2, 6, 7, 8, dtype=torch.bfloat16), values(6, dtype=torch.bfloat16) if bias else None
    args = (b, relu, *NORM[:4], 2, WINDOW, True, order, True)
    (y, place), (expected, other) = reference.lrn_pool(x, *args), stand_in.lrn_pool(x, *args)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-6)
    if order:
        assert torch.equal(place, other)
    g = torch.randn_like(y)
    args = (b, other, relu, *NORM[:4], 2, WINDOW, order, True)
    for a, e in zip(reference.lrn_pool_backward(g, x, *args), stand_in.lrn_pool_backward(g, x, *args), strict=True):
        torch.testing.assert_close(a, e, rtol=2**-6, atol=1e-5)
