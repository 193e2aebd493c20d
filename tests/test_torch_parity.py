"""Torch's own sample inputs for what we replace: values, gradients, second gradients, errors; transforms and tracers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from alexnet_kernels import functional as F
from alexnet_kernels import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")

PAIRS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "nn.functional.local_response_norm": (F.local_response_norm, TF.local_response_norm),
    "nn.functional.max_pool2d": (F.max_pool2d, TF.max_pool2d),
    "nn.functional.conv2d": (F.conv2d_relu, lambda *a, **k: TF.conv2d(*a, **k).relu()),
    "nn.functional.linear": (F.linear_relu, lambda *a, **k: TF.linear(*a, **k).relu()),
}
MOST = 60  # samples an operation and dtype: max_pool2d alone has 200, which differ in one argument at a time
INFOS = {info.name: info for info in op_db if info.name in PAIRS}


def tensors(value: object) -> list[Tensor]:
    return [t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)]


def samples(name: str, dtype: torch.dtype, *, grad: bool, most: int = MOST) -> Iterator[tuple[Tensor, tuple, dict]]:
    every = list(INFOS[name].sample_inputs("cpu", dtype, requires_grad=grad))
    for sample in every[:: max(1, len(every) // most)]:
        yield sample.input, sample.args, sample.kwargs


def leaves(x: Tensor, args: tuple) -> list[Tensor]:
    return [t for t in (x, *args) if isinstance(t, Tensor) and t.requires_grad]


def test_all_operations_were_found() -> None:
    assert set(INFOS) == set(PAIRS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(PAIRS))
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    ours, theirs = PAIRS[name]
    seen = 0
    for x, args, kwargs in samples(name, dtype, grad=True):
        got, expected = ours(x, *args, **kwargs), theirs(x, *args, **kwargs)
        torch.testing.assert_close(got, expected)
        differentiable = [(a, b) for a, b in zip(tensors(got), tensors(expected), strict=True) if b.requires_grad]
        for a, b in differentiable:
            g = torch.randn_like(b)
            inputs = leaves(x, args)
            pairs = zip(torch.autograd.grad(a, inputs, g), torch.autograd.grad(b, inputs, g), strict=True)
            for ga, gb in pairs:
                torch.testing.assert_close(ga, gb, rtol=1e-4, atol=1e-5)
        seen += 1
    assert seen > 1


@pytest.mark.parametrize("name", list(PAIRS))
def test_second_gradients(name: str) -> None:
    """On six samples each, spread over the list: the whole of it takes minutes."""
    ours, _ = PAIRS[name]
    for x, args, kwargs in itertools.islice(samples(name, torch.float64, grad=True, most=6), 6):
        first = lambda x, args=args, kwargs=kwargs: tensors(ours(x, *args, **kwargs))[0]  # noqa: E731
        assert torch.autograd.gradgradcheck(first, x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_pooling(dtype: torch.dtype) -> None:
    x = torch.randint(0, 100, (2, 3, 7, 7)).to(dtype)
    for indices in (False, True):
        torch.testing.assert_close(
            F.max_pool2d(x, 3, 2, return_indices=indices), TF.max_pool2d(x, 3, 2, return_indices=indices)
        )


@pytest.mark.parametrize("name", list(PAIRS))
def test_what_torch_refuses_we_refuse(name: str) -> None:
    ours, _ = PAIRS[name]
    refused = list(INFOS[name].error_inputs("cpu")) if INFOS[name].error_inputs_func else []
    for error in refused:
        s = error.sample_input
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
            ours(s.input, *s.args, **s.kwargs)


MODULES = {
    "LocalResponseNorm": nn.LocalResponseNorm,
    "MaxPool2d": nn.MaxPool2d,
    "Conv2d": nn.ConvReLU2d,
    "Linear": nn.LinearReLU,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(MODULES))
def test_modules_on_torchs_module_inputs(name: str, dtype: torch.dtype) -> None:
    (info,) = [m for m in module_db if m.module_cls is getattr(torch.nn, name)]
    inputs = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=True)
    assert inputs
    for sample in inputs:
        made = [
            cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            for cls in (MODULES[name], info.module_cls)
        ]
        ours, theirs = (m.to(dtype) for m in made)
        ours.load_state_dict(theirs.state_dict())
        relu = torch.relu if name in ("Conv2d", "Linear") else (lambda t: t)
        forward = sample.forward_input
        got, expected = ours(*forward.args, **forward.kwargs), relu(theirs(*forward.args, **forward.kwargs))
        torch.testing.assert_close(got, expected)
        x = (*forward.args, *forward.kwargs.values())[0]
        for a, b in zip(tensors(got)[:1], tensors(expected)[:1], strict=True):
            torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (a, b)), rtol=1e-4, atol=1e-5)


X = torch.randn(2, 6, 7, 7, dtype=torch.double, generator=torch.Generator().manual_seed(1))
W, B = torch.randn(4, 6, 3, 3, dtype=torch.double), torch.randn(4, dtype=torch.double)
V = torch.randn(2, 7, dtype=torch.double)
OPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "lrn": (lambda x: F.local_response_norm(x, 5, 0.3), lambda x: TF.local_response_norm(x, 5, 0.3)),
    "spatial": (
        lambda x: F.spatial_response_norm(x, 3, 0.3),
        lambda x: x / (0.3 * TF.avg_pool2d(x * x, 3, 1, 1) + 1) ** 0.75,
    ),
    "pool": (lambda x: F.max_pool2d(x, 3, 2), lambda x: TF.max_pool2d(x, 3, 2)),
    "conv": (lambda x: F.conv2d_relu(x, W, B), lambda x: TF.conv2d(x, W, B).relu()),
    "linear": (
        lambda x: F.linear_relu(x, V),
        lambda x: TF.linear(x, V).relu(),
    ),
    "lrn pool": (
        lambda x: F.lrn_max_pool2d(x, 5, 0.3),
        lambda x: TF.max_pool2d(TF.local_response_norm(x, 5, 0.3), 3, 2),
    ),
    "pool lrn": (
        lambda x: F.max_pool2d_lrn(x, 5, 0.3),
        lambda x: TF.local_response_norm(TF.max_pool2d(x, 3, 2), 5, 0.3),
    ),
}


@pytest.mark.parametrize("name", list(OPS))
def test_transforms(name: str) -> None:
    ours, theirs = OPS[name]
    batch = torch.stack([X, X.flip(0) * 2])
    for transform in (
        lambda f: torch.vmap(f)(batch),
        lambda f: torch.func.jvp(f, (X,), (X.cos(),)),
        lambda f: torch.vmap(torch.func.grad(lambda t: f(t[None]).pow(2).sum()))(X),
        lambda f: torch.func.vjp(f, X)[1](torch.ones_like(f(X))),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


@pytest.mark.parametrize("name", list(OPS))
def test_compiled_exported_traced_and_on_meta(name: str) -> None:
    ours, theirs = OPS[name]

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ours(x)

    module, expected = Module(), theirs(X)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(X), expected)
    torch.testing.assert_close(torch.export.export(module, (X,)).module()(X), expected)
    torch.testing.assert_close(torch.jit.trace(module, (X,))(X), expected)
    if name not in ("conv", "linear"):  # their weights are on the CPU
        meta = ours(X.to("meta"))
        assert (meta.shape, meta.dtype, meta.device.type) == (expected.shape, expected.dtype, "meta")


def test_a_symbolic_trace_records_one_call() -> None:
    module = torch.nn.Sequential(nn.LocalResponseNorm(5, 0.3), nn.MaxPool2d(3, 2))

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, qualified_name: str) -> bool:
            return False

    graph = Tracer().trace(module)
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    assert F.local_response_norm in calls
    assert torch.equal(torch.fx.GraphModule(module, graph)(X), module(X))


class Watched(Tensor):
    """A subclass that sees the functions called on it."""

    seen: list[object]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.local_response_norm(x, 5),
        lambda x: F.spatial_response_norm(x, 3),
        lambda x: F.max_pool2d(x, 3),
        lambda x: F.conv2d_relu(x, W),
        lambda x: F.linear_relu(x, torch.ones(2, 7, dtype=torch.double)),
        lambda x: F.lrn_max_pool2d(x, 5, groups=2),
        lambda x: F.max_pool2d_lrn(x, 5, alpha_mode="sum"),
    ],
    ids=["lrn", "spatial", "pool", "conv", "linear", "lrn pool", "pool lrn"],
)
def test_a_tensor_subclass_sees_our_function(call: Callable[[Tensor], Tensor]) -> None:
    Watched.seen = []
    out = call(X.as_subclass(Watched))
    assert isinstance(out, Watched)
    assert getattr(F, Watched.seen[0].__name__) is Watched.seen[0]
    torch.testing.assert_close(out.as_subclass(Tensor), call(X))


@pytest.mark.parametrize("name", list(OPS))
def test_deterministic_algorithms(name: str) -> None:
    ours, _ = OPS[name]
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(3):
            x = X.clone().requires_grad_()
            y = ours(x)
            results.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    finally:
        torch.use_deterministic_algorithms(False)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


def test_pooling_nan_and_ties_as_torch() -> None:
    x = torch.zeros(1, 2, 5, 5)
    x[0, 0, 2, 2] = float("nan")
    x[0, 1, 0, 0] = -float("inf")
    got, expected = F.max_pool2d(x, 3, 2, return_indices=True), TF.max_pool2d(x, 3, 2, return_indices=True)
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert torch.equal(got[1][0, 1, 0, 0], torch.tensor(1))  # the first of the equal zeros, after -inf


@pytest.mark.parametrize("name", list(OPS))
def test_fx_records_one_node(name: str) -> None:
    ours, _ = OPS[name]

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ours(x)

    traced = torch.fx.symbolic_trace(Module())
    (target,) = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert getattr(F, target.__name__) is target
    torch.testing.assert_close(traced(X), ours(X))


def test_a_weight_that_is_a_proxy_is_recorded_too() -> None:
    traced = torch.fx.symbolic_trace(lambda weight, bias: F.conv2d_relu(X, weight, bias))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [F.conv2d_relu]
    torch.testing.assert_close(traced(W, B), F.conv2d_relu(X, W, B))


@pytest.mark.parametrize("groups", [1, 2])
def test_learned_coefficients_have_gradients(groups: int) -> None:
    """Torch's function takes a tensor for alpha, beta or k and differentiates by it; so does ours, in plain torch."""

    def values(norm: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        numbers = [torch.tensor(v, dtype=torch.double, requires_grad=True) for v in (0.3, 0.75, 1.5)]
        parts = [norm(part, 5, *numbers) for part in X.chunk(groups, 1)]
        y = (
            torch.cat(parts, 1)
            if norm is TF.local_response_norm
            else F.local_response_norm(X, 5, *numbers, groups=groups)
        )
        return y, *torch.autograd.grad(y.square().sum(), numbers)

    torch.testing.assert_close(values(F.local_response_norm), values(TF.local_response_norm))


@pytest.mark.parametrize("name", ["lrn", "spatial", "pool", "conv"])
def test_unbatched_or_any_dimensions(name: str) -> None:
    """[C, H, W] as torch reads it: one image, and for LRN [N, C, L]."""
    ours, theirs = OPS[name]
    for x in (X[0], X[:, :, None]) if name == "lrn" else (X[0],):
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_of_what_torch_runs(dtype: torch.dtype) -> None:
    x, w = X.to(dtype), W.to(dtype)
    assert torch.equal(F.max_pool2d(x, 3, 2), TF.max_pool2d(x, 3, 2))
    assert torch.equal(F.conv2d_relu(x, w), TF.conv2d(x, w).relu())
    assert torch.equal(F.linear_relu(x, V.to(dtype)), TF.linear(x, V.to(dtype)).relu())


def test_meta_has_gradients_and_layout() -> None:
    x = X.contiguous(memory_format=torch.channels_last).to("meta").requires_grad_()
    y = F.local_response_norm(x, 5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for t in (y, dx):
        assert t.is_meta and t.shape == X.shape and t.is_contiguous(memory_format=torch.channels_last)


def test_export_with_dynamic_shapes() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.lrn_max_pool2d(x, 5, 0.3)

    auto = torch.export.Dim.AUTO
    program = torch.export.export(Module(), (X,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    other = torch.randn(3, 6, 9, 11, dtype=torch.double)  # odd sides, as X: torch's pooling guards that they stay so
    torch.testing.assert_close(program.module()(other), Module()(other))


REFUSED = [
    (lambda f: f.local_response_norm(X * 1j, 5), "real numbers"),
    (lambda f: f.local_response_norm(X[0, 0], 5), "Expected 3D or higher"),
    (lambda f: f.local_response_norm(X, 5.0), r"size=5.0 must be an integer, got float; convert with int"),
    (lambda f: f.local_response_norm(X, "5"), "size='5' must be an integer"),
    (lambda f: f.max_pool2d(X * 1j, 2), "not implemented|not supported"),
    (lambda f: f.max_pool2d(X, 3, padding=2), "pad should be at most half"),
    (lambda f: f.max_pool2d(X, 2, stride=0), "stride should not be zero"),
    (lambda f: f.max_pool2d(X, 9), "too small"),
    (lambda f: f.max_pool2d(X[0, 0], 2), "3D or 4D"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_torch_refuses_has_a_clear_error(call: Callable[..., object], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        call(TF)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(F)
