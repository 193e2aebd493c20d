"""Convolutions in a row as one node of autograd: what single layers give, with fewer passes. On the kernels, in the interpreter
where there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import alexnet_kernels as ak
from alexnet_kernels import dispatch, nn
from alexnet_kernels import functional as F
from alexnet_kernels.kernels import activation
from alexnet_kernels.ops import _conv_ways
from alexnet_kernels.ops.conv_chain import ConvChain

# weight, (stride, padding, dilation, groups): narrow forms of conv3, conv4 and conv5
LAYERS = (((8, 6, 3, 3), (1, 1, 1, 1)), ((12, 4, 3, 2), ((1, 2), (1, 0), 1, 2)), ((6, 6, 3, 3), (1, "same", 1, 2)))


def parameters(dtype: torch.dtype = torch.float32, layout=torch.channels_last) -> tuple[Tensor, list[Tensor]]:
    """Input, and weight and bias of each layer in turn, which want gradients."""
    found = [torch.randn(2, 6, 5, 6).relu()]
    for shape, _ in LAYERS:
        found += [torch.randn(shape) / 4, torch.randn(shape[0])]
    x, *rest = (
        t.to(dtype).contiguous(memory_format=layout if t.dim() == 4 else torch.contiguous_format).requires_grad_()
        for t in found
    )
    return x, rest


def layers(rest: Sequence[Tensor | None]) -> list[tuple]:
    return [(w, b, geometry) for w, b, (_, geometry) in zip(rest[::2], rest[1::2], LAYERS, strict=True)]


def one_by_one(x: Tensor, rest: Sequence[Tensor | None]) -> Tensor:
    for w, b, geometry in layers(rest):
        x = F.conv2d_relu(x, w, b, *geometry)
    return x


def chain(x: Tensor, rest: Sequence[Tensor | None]) -> Tensor:
    return F.conv2d_relu_chain(x, layers(rest))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_single_layers(layout) -> None:
    """Bits of the result are; a gradient of the first layers is rounded once less, which fp32 sums show in their last bits."""
    x, rest = parameters(layout=layout)
    with ak.use_backend("triton"), dispatch.recording() as used:
        y, expected = chain(x, rest), one_by_one(x, rest)
    assert y.grad_fn.name() == "ConvChainBackward" and used == {"triton"}
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(t, (x, *rest), g) for t in (y, expected))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.stride() == want.stride()


def test_only_the_last_relu_has_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[torch.Size] = []
    original = activation.backward
    monkeypatch.setattr(activation, "backward", lambda g, y, *a: passes.append(y.shape) or original(g, y, *a))
    x, rest = parameters()
    with ak.use_backend("triton"):
        y = chain(x, rest)
    y.sum().backward()
    assert passes == [y.shape]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3, 6), (5,), (4, 5), (6,), (0, 2, 4, 6)])
def test_only_what_is_wanted_is_computed(wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """0 is the input, odd ones are weights: below the last of them no dgrad runs."""
    runs: list[str] = []
    original = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda op, *a: runs.append(op) or original(op, *a))
    x, rest = parameters()
    tensors = [t.detach() for t in (x, *rest)]
    for i in wanted:
        tensors[i].requires_grad_()
    with ak.use_backend("triton"):
        y, expected = chain(tensors[0], tensors[1:]), one_by_one(tensors[0], tensors[1:])
    leaves = [tensors[i] for i in wanted]
    want = torch.autograd.grad(expected, leaves, torch.ones_like(y))
    runs.clear()
    torch.testing.assert_close(torch.autograd.grad(y, leaves, torch.ones_like(y)), want, rtol=1e-5, atol=1e-5)
    first = (min(wanted) + 1) // 2  # the lowest layer whose weight or bias is wanted; 0: the input
    assert runs.count("conv2d_dgrad") == (3 if first == 0 else 3 - first)
    assert runs.count("conv2d_wgrad") == sum(i % 2 for i in wanted)


def test_without_bias() -> None:
    x, rest = parameters()
    rest[1] = rest[3] = None
    with ak.use_backend("triton"):
        y, expected = chain(x, rest), one_by_one(x, rest)
    leaves = [t for t in (x, *rest) if t is not None]
    found, wanted = (torch.autograd.grad(t, leaves, torch.ones_like(y)) for t in (y, expected))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def reference_as_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch in cuDNN's place, so that fp64 and passes that are not fused go through the node."""
    for op in ("conv2d", "conv2d_dgrad", "conv2d_wgrad"):
        run = dispatch._table[op][-1].run
        monkeypatch.setitem(dispatch._table, op, [dispatch.Implementation("cudnn", dispatch.never, run)])
    monkeypatch.setattr(_conv_ways, "is_split", lambda *_: False)


@pytest.mark.usefixtures("reference_as_kernel")
def test_gradients_of_gradients() -> None:
    """The node is differentiated by single layers; what they give for plain torch is known to be right."""
    x, rest = parameters(torch.double)
    weight = torch.randn(2, 6, 5, 3, dtype=torch.double)

    def second(network) -> tuple[Tensor, ...]:
        y = network(x, rest)
        first = torch.autograd.grad(y, (x, *rest), weight, create_graph=True)
        return first + torch.autograd.grad(sum(g.square().sum() for g in first), (x, *rest))

    with ak.use_backend("cudnn"):
        y = chain(x, rest)
        assert isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)
        plain = torch.autograd.grad(y, (x, *rest), weight)
    torch.testing.assert_close(plain, second(one_by_one)[:7])

    def both(x: Tensor, rest: Sequence[Tensor]) -> Tensor:
        with ak.use_backend("auto"):
            (row,) = dispatch._table["conv2d"]
            assert row.backend == "cudnn"
            plan = [(p, q, r, g, None) for p, q, r, g in NUMBERS]
            return ConvChain.apply(plan, x, *rest)

    torch.testing.assert_close(second(both), second(one_by_one))


BACKWARD = ["conv2d_dgrad", "conv2d_wgrad"]
NUMBERS = (((1, 1), (1, 1), (1, 1), 1), ((1, 2), (1, 0), (1, 1), 2), ((1, 1), (1, 1), (1, 1), 2))


def test_elsewhere_it_is_single_layers() -> None:
    """On a CPU, compiled, transformed, or where torch has more to do than a kernel."""
    x, rest = parameters(torch.double)
    expected = one_by_one(x, rest)
    assert torch.equal(chain(x, rest), expected)
    assert chain(x, rest).grad_fn.name() == "ReluBackward0"
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, rest), expected)
    torch.testing.assert_close(torch.vmap(lambda t: chain(t, rest))(x[None])[0], expected)
    torch.testing.assert_close(F.conv2d_relu_chain(x[0], layers(rest)), expected[0])
    assert F.conv2d_relu_chain(x, []) is x


def test_errors_are_those_of_single_layers() -> None:
    x, rest = parameters()
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, got int"):
        F.conv2d_relu_chain(x, [(3, None, (1, 0, 1, 1))])
    rest[2] = rest[2][:, :3]
    for backend in ("auto", "triton"):
        with ak.use_backend(backend), pytest.raises(RuntimeError, match=r"channels|cannot run conv2d_relu"):
            chain(x, rest)


def test_a_run_of_convolutions_is_one_operation() -> None:
    modules = []
    for (outputs, inputs, *kernel), (stride, padding, dilation, groups) in LAYERS:
        conv = torch.nn.Conv2d(inputs * groups, outputs, tuple(kernel), stride, padding, dilation, groups)
        modules += [conv, torch.nn.ReLU(inplace=True)]
    stock = torch.nn.Sequential(*modules)
    ours = nn.FusedSequential(*modules)
    for count, names in ((6, ["chain"]), (5, ["chain"]), (4, ["chain"]), (3, ["relu"]), (2, ["relu"])):
        found = [run.operation for run in ak.conversion_report(ours[:count]).fused]
        assert [name.rpartition("_")[2] for name in found] == names
    x = torch.randn(2, 6, 5, 6)
    assert torch.equal(ours(x), stock(x))
    with ak.use_backend("triton"):
        y = ours(x)
    assert y.grad_fn.name() == "ConvChainBackward"
    torch.testing.assert_close(y, stock(x), rtol=1e-5, atol=1e-5)
    handle = modules[2].register_forward_hook(lambda *_: None)
    assert [run.names for run in ak.conversion_report(ours).fused] == [("0", "1"), ("4", "5")]
    handle.remove()


def test_explain_has_a_part_for_each_layer() -> None:
    x, rest = parameters()
    said = ak.explain(F.conv2d_relu_chain, x, layers(rest))
    assert (said.op, said.backend) == ("conv2d_relu_chain", "reference")
    assert [part.op for part in said.parts] == ["conv2d_relu"] * 3
    with ak.use_backend("triton"):
        said = ak.explain("conv2d_relu_chain", x.detach(), layers([t.detach() for t in rest]))
    assert [part.backend for part in said.parts] == ["triton"] * 3
    assert set(said.why_not) == set(dispatch.BACKENDS) - {"triton"}
    with ak.use_backend("triton"):
        said = ak.explain("conv2d_relu_chain", x.detach(), layers([t.detach() for t in rest[:2]] + rest[2:]))
    assert [[part.op for part in layer.parts][2:] for layer in said.parts] == [[], ["conv2d_wgrad"], BACKWARD]
    with pytest.raises(RuntimeError, match="channel"):
        ak.explain(F.conv2d_relu_chain, x[:, :4], layers(rest))


def test_nan_passes_every_relu() -> None:
    x, rest = parameters()
    with torch.no_grad():
        x[0, 0, 0, 0] = float("nan")
    with ak.use_backend("triton"):
        y = chain(x, rest)
    found, wanted = (torch.autograd.grad(t, (x, *rest), torch.ones_like(y)) for t in (y, one_by_one(x, rest)))
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
