"""A linear layer with its ReLU and dropout through every seam, on torch's own operations and on the kernels' path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import alexnet_kernels as ak
from alexnet_kernels import dispatch, nn, reference
from alexnet_kernels import functional as F
from alexnet_kernels.ops.linear import linear_relu, linear_relu_backward

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
INTERPRETED = not torch.cuda.is_available()


@pytest.fixture
def kernels(device: torch.device) -> Iterator[None]:
    """The kernels' path: what runs on a GPU, and in the interpreter."""
    with ak.use_backend("triton") if device.type == "cpu" and INTERPRETED else nullcontext():
        yield


def layer(device: torch.device, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (6, 40)) -> list[Tensor]:
    tensors = (torch.randn(shape), torch.randn(24, shape[-1]) / shape[-1] ** 0.5, torch.randn(24))
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def gradients(y: Tensor, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, [t for t in tensors if t.requires_grad], grad)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40), (40,), (1, 2, 3, 40)])
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, kernels: None) -> None:
    """Against fp64, held to torch's own error in this dtype: 1.5 times, and a few roundings."""
    tensors = layer(device, dtype, shape)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    with dispatch.recording() as used:
        y = F.linear_relu(*tensors)
    assert used == {"triton"}
    grad = torch.randn(y.shape).to(y)
    exact = TF.linear(*wide).relu()
    theirs = TF.linear(*tensors).relu()
    # where rounding moved a sum over the kink the gradients differ altogether: it gets none
    grad = grad.where((exact > 0) == (y > 0), 0).where((exact > 0) == (theirs > 0), 0)
    pairs = zip(
        (y, *gradients(y, tensors, grad)),
        (theirs, *gradients(theirs, tensors, grad)),
        (exact, *gradients(exact, wide, grad.double())),
        strict=True,
    )
    for ours, torchs, truth in pairs:
        assert (ours.dtype, ours.shape) == (dtype, truth.shape)
        error, allowed = ((t.double() - truth).norm() for t in (ours, torchs))
        assert error <= 1.5 * allowed + 4 * EPS[dtype] * truth.norm()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_only_the_gradients_asked_for(wanted: tuple[int, ...], device: torch.device, kernels: None) -> None:
    tensors = layer(device)
    for place, t in enumerate(tensors):
        t.requires_grad_(place in wanted)
    y, expected = F.linear_relu(*tensors), TF.linear(*tensors).relu()
    grad = torch.randn_like(y)
    torch.testing.assert_close(gradients(y, tensors, grad), gradients(expected, tensors, grad))


def test_any_strides(device: torch.device, kernels: None) -> None:
    x, weight, bias = layer(device)
    x = torch.randn(2, 40, 6, device=device).transpose(1, 2)
    torch.testing.assert_close(F.linear_relu(x, weight, bias), TF.linear(x, weight, bias).relu())
    wide = torch.randn(40, 24, device=device).t().requires_grad_()
    y, expected = F.linear_relu(x[:, ::2], wide, bias), TF.linear(x[:, ::2], wide, bias).relu()
    grad = torch.randn(1, 1, 24, device=device).expand_as(y)
    torch.testing.assert_close(gradients(y, [wide, bias], grad), gradients(expected, [wide, bias], grad))


def test_second_gradients(device: torch.device) -> None:
    """Plain torch in fp64; and the kernels' gradient differentiated, which the reference does."""
    tensors = [t.detach().double().requires_grad_() for t in layer(device, shape=(3, 5))]
    assert torch.autograd.gradcheck(F.linear_relu, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(F.linear_relu, tensors, fast_mode=True)
    x, weight, bias = tensors
    y = TF.linear(x, weight, bias).relu().detach()
    call = lambda g, x, w: linear_relu_backward(g, x, w, y, 0.0, [True] * 3)  # noqa: E731
    assert torch.autograd.gradcheck(call, (torch.randn_like(y).requires_grad_(), x, weight), fast_mode=True)


def test_opcheck(device: torch.device) -> None:
    x, weight, bias = layer(device, shape=(2, 3, 8))
    seed = torch.tensor([7], device=device)
    for p, seeds in ((0.0, None), (0.5, seed)):
        torch.library.opcheck(linear_relu, (x, weight, bias, p, seeds))
    torch.library.opcheck(linear_relu, (x.detach().transpose(0, 1), weight, bias, 0.0, None))
    y = linear_relu(x, weight, bias, 0.0, None).detach()
    grad = torch.randn_like(y).requires_grad_()
    for mask in ([True, True, True], [False, True, False]):
        torch.library.opcheck(linear_relu_backward, (grad, x, weight, y, 0.0, mask))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_compile_fullgraph(dynamic: bool, p: float, device: torch.device, kernels: None) -> None:
    _, weight, bias = layer(device)
    call = lambda x: F.linear_relu_dropout(x * 2, weight, bias, p) + 1  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (2, 5):
        x = torch.randn(n, 40, device=device, requires_grad=True)
        torch.manual_seed(n)
        y = compiled(x)
        torch.manual_seed(n)
        expected = call(x)
        assert torch.equal(y, expected)
        grads = [torch.autograd.grad(t.sum(), (x, weight, bias)) for t in (y, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_as_torch(device: torch.device, kernels: None) -> None:
    tensors = layer(device)
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = F.linear_relu(*tensors), TF.linear(*tensors).relu()
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    grads = gradients(y, tensors, torch.ones_like(y)), gradients(expected, tensors, torch.ones_like(y))
    assert all(g.dtype == torch.float32 for g in grads[0])
    torch.testing.assert_close(*grads, rtol=2.0**-6, atol=2.0**-6)


def test_nan_passes_as_in_torch(device: torch.device, kernels: None) -> None:
    x, weight, bias = layer(device)
    with torch.no_grad():
        x[0, 0], x[1, 0] = float("nan"), float("inf")
    y, expected = F.linear_relu(x, weight, bias), TF.linear(x, weight, bias).relu()
    torch.testing.assert_close(y, expected, equal_nan=True)
    grads = (gradients(t, [x, weight, bias], torch.ones_like(y)) for t in (y, expected))
    torch.testing.assert_close(*grads, equal_nan=True)


def test_what_runs_and_why_not(device: torch.device) -> None:
    x, weight, bias = layer(device)
    said = ak.explain("linear_relu", x, weight, bias)
    assert said.op == "linear_relu" and said.backend == ("reference" if device.type == "cpu" else "triton")
    for reason, arguments in {
        "written for a layer with a bias": (x, weight),
        "an empty tensor": (x[:0], weight, bias),
        r"not \[..., K\], \[O, K\] and \[O\]": (x, weight, bias[:1]),
        "no kernel for torch.float64": (x.double(), weight.double(), bias.double()),
    }.items():
        torch.testing.assert_close(F.linear_relu(*arguments), TF.linear(*arguments).relu())
        for call in (F.linear_relu, lambda *a: ak.explain("linear_relu_dropout", *a)):
            with ak.use_backend("triton"), pytest.raises(RuntimeError, match=f"cannot run linear_relu.*{reason}"):
                call(*arguments)
    with pytest.raises(RuntimeError, match=r"same dtype|same type"):
        F.linear_relu(x, weight.double(), bias)


# --------------------------------------------------------------------------------------------------------------- dropout


def test_random_words_are_philox() -> None:
    """Known answers of the generator's authors (Random123, kat_vectors: philox4x32 10) for a zero key and counter."""
    words = reference.random_words(torch.tensor([0]), 6).tolist()
    assert [f"{w:08x}" for w in words[:4]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert len(set(words)) == 6 and all(0 <= w < 2**32 for w in words)


def test_a_kernel_drops_what_the_reference_drops(device: torch.device, kernels: None) -> None:
    tensors = [t.detach() for t in layer(device, shape=(50, 40))]
    for seed in (3, 2**61 + 12345):
        arguments = (*tensors, 0.3, torch.tensor([seed], device=device))
        ours = linear_relu(*arguments)
        with ak.use_backend("reference"):
            theirs = linear_relu(*arguments)
        assert torch.equal(ours == 0, theirs == 0)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_dropout_on_a_cpu_is_torchs(p: float, training: bool) -> None:
    """The numbers too, from the same seed; with gradients."""
    tensors = layer(torch.device("cpu"))
    results = []
    for call in (F.linear_relu_dropout, lambda *a: TF.dropout(TF.linear(*a[:3]).relu(), *a[3:])):
        torch.manual_seed(1)
        y = call(*tensors, p, training)
        results.append((y, *gradients(y, tensors, torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_on_kernels(device: torch.device, kernels: None) -> None:
    """Follows the seed; draws anew at each call; nothing is dropped in evaluation; gradients are those of its own mask."""
    tensors = layer(device, shape=(50, 40))
    torch.manual_seed(3)
    first, second = (F.linear_relu_dropout(*tensors, 0.5) for _ in range(2))
    torch.manual_seed(3)
    again = F.linear_relu_dropout(*tensors, 0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    plain = F.linear_relu(*tensors)
    assert torch.equal(F.linear_relu_dropout(*tensors, 0.5, training=False), plain)
    kept = first != 0
    torch.testing.assert_close(first, torch.where(kept, plain * 2, 0))
    share = float(kept[plain > 0].float().mean())
    assert abs(share - 0.5) < 5 * 0.5 / float((plain > 0).sum()) ** 0.5
    grad = torch.randn_like(first)
    expected = gradients(TF.linear(*tensors).relu() * kept * 2, tensors, grad)
    torch.testing.assert_close(gradients(first, tensors, grad), expected)


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_a_share_that_is_none(p: float) -> None:
    x, weight, bias = layer(torch.device("cpu"))
    for call in (F.linear_relu_dropout, lambda *a: ak.explain("linear_relu_dropout", *a)):
        with pytest.raises(ValueError, match=rf"p={p} must lie between 0 and 1"):
            call(x, weight, bias, p)


def test_a_run_in_a_container() -> None:
    """One operation, with torch's numbers on a CPU; a watched Dropout is called itself, and the two before it stay one."""
    children = (torch.nn.Linear(5, 7), torch.nn.ReLU(inplace=True), torch.nn.Dropout(0.4))
    net, theirs, x = nn.FusedSequential(*children), torch.nn.Sequential(*children), torch.randn(3, 5)
    assert [run.operation for run in ak.conversion_report(net).fused] == ["linear_relu_dropout"]
    for module in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.eval()):
        results = []
        for one in (module, theirs.train(module.training)):
            torch.manual_seed(4)
            results.append(one(x))
        assert torch.equal(*results)
    handle = net[2].register_forward_hook(lambda *_: None)
    assert [run.operation for run in ak.conversion_report(net).fused] == ["linear_relu"]
    handle.remove()


@pytest.mark.gpu
def test_a_captured_graph_draws_anew() -> None:
    tensors = [t.detach() for t in layer(torch.device("cuda"), shape=(50, 40))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        F.linear_relu_dropout(*tensors, 0.5)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.linear_relu_dropout(*tensors, 0.5)
    results = []
    for _ in range(3):
        graph.replay()
        results.append(y.clone())
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
