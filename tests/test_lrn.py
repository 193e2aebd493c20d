"""Response normalisation through every seam: values, gradients, layouts, dtypes, transforms, compilation, errors."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import alexnet_kernels as ak
from alexnet_kernels import functional as F
from alexnet_kernels import reference
from alexnet_kernels.ops.lrn import lrn, lrn_backward

ARGS = (5, 2e-2, 0.75, 2.0, 1)  # size, scale, beta, k, groups: a scale at which the norm does something
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def by_definition(x: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Tensor:
    """The formula, channel by channel, in fp64."""
    x = x.double()
    out, width = torch.empty_like(x), x.shape[1] // groups
    for c in range(x.shape[1]):
        first = c // width * width
        window = x[:, max(first, c - size // 2) : min(first + width, c + (size - 1) // 2 + 1)]
        out[:, c] = x[:, c] / (k + scale * window.square().sum(1)) ** beta
    return out


def relative(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach(), expected.detach()
    return float((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 30])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_reference_is_the_formula(size: int, groups: int) -> None:
    x = torch.randn(2, 6, 3, 4, dtype=torch.double)
    args = (size, 0.3, 0.6, 1.5, groups)
    assert relative(reference.lrn(x, *args), by_definition(x, *args)) < 1e-15


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("beta", [0.75, 0.5])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 2), (3, 2, 4)])
def test_agrees_with_torch(size: int, beta: float, shape: tuple[int, ...]) -> None:
    """Every odd and even window, also wider than the channels."""
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    ours, theirs = F.local_response_norm(x, size, 0.1, beta, 1.3), TF.local_response_norm(x, size, 0.1, beta, 1.3)
    assert relative(ours, theirs) < 1e-14
    g = torch.randn_like(x)
    assert relative(torch.autograd.grad(ours, x, g)[0], torch.autograd.grad(theirs, x, g)[0]) < 1e-14


def test_alpha_modes() -> None:
    x = torch.randn(2, 10, 3, 3)
    mean = F.local_response_norm(x, 5, 5e-2, alpha_mode="mean")
    assert torch.equal(F.local_response_norm(x, 5, 1e-2, alpha_mode="sum"), mean)


def test_groups_are_towers() -> None:
    """Two groups are two separate tensors; without groups only the channels at the border differ."""
    x = torch.randn(2, 12, 3, 3) * 9
    whole, towers = F.local_response_norm(x, 5, 1.0), F.local_response_norm(x, 5, 1.0, groups=2)
    assert torch.equal(towers, torch.cat([F.local_response_norm(h, 5, 1.0) for h in x.chunk(2, 1)], 1))
    differs = (whole != towers).flatten(2).any(2).any(0).nonzero().flatten()
    assert differs.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("large", [False, True])  # small: one block; large: the cache-blocked path
def test_dtypes_are_held_to_torch_in_fp32(dtype: torch.dtype, layout: torch.memory_format, large: bool, device) -> None:
    """Half types: torch's fp32 result, rounded; the error stays within 1.5 times of what that costs. In fp32 and fp64 two
    square roots and a product stand for one ``pow``, three roundings for one: twice is allowed."""
    shape = (6, 96, 27, 27) if large else (2, 24, 5, 7)
    x = (torch.randn(shape, device=device).relu() * 20).to(dtype).contiguous(memory_format=layout).requires_grad_()
    g = torch.randn(shape, device=device).to(dtype)
    y = F.local_response_norm(x, 5, 1e-3, k=2.0)
    (dx,) = torch.autograd.grad(y, x, g)
    assert y.dtype == dx.dtype == dtype
    assert y.is_contiguous(memory_format=layout) and dx.is_contiguous(memory_format=layout)

    def torch_in(work: torch.dtype) -> tuple[Tensor, Tensor]:
        z = x.detach().to(work).requires_grad_()
        out = TF.local_response_norm(z, 5, 1e-3, k=2.0)
        return out.detach(), torch.autograd.grad(out, z, g.to(work))[0]

    work = torch.float64 if dtype == torch.float64 else torch.float32
    factor = 1.5 if dtype.itemsize == 2 else 2.0
    for ours, theirs, truth in zip((y, dx), torch_in(work), torch_in(torch.float64), strict=True):
        assert relative(ours, truth) <= factor * relative(theirs.to(dtype), truth) + 4 * 2.0**-53


@pytest.mark.parametrize("arrange", ["slice", "expand", "transpose", "stride"])
def test_any_strides(arrange: str) -> None:
    x = {
        "slice": lambda: torch.randn(2, 16, 6, 6)[:, 3:11, 1:5],
        "expand": lambda: torch.randn(1, 8, 4, 4).expand(3, 8, 4, 4),
        "transpose": lambda: torch.randn(2, 4, 4, 8).transpose(1, 3),
        "stride": lambda: torch.randn(2, 8, 8, 9)[:, :, ::2, ::3],
    }[arrange]()
    assert torch.equal(F.local_response_norm(x, 5, 0.1), F.local_response_norm(x.clone(), 5, 0.1))
    leaf = x.clone().requires_grad_()
    view = x.detach().requires_grad_()
    for t in (leaf, view):
        F.local_response_norm(t, 5, 0.1).pow(2).sum().backward()
    assert relative(view.grad, leaf.grad) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_as_torch(value: float) -> None:
    x = torch.randn(2, 9, 3, 3)
    x[0, 4, 1, 1] = x[1, 0, 0, 0] = value
    ours, theirs = F.local_response_norm(x, 5, 0.1), TF.local_response_norm(x, 5, 0.1)
    assert torch.allclose(ours, theirs, rtol=1e-5, equal_nan=True)


def test_large_values_do_not_overflow_in_half() -> None:
    """|a| > 255 overflows a² in fp16; sums are formed in fp32."""
    x = torch.full((1, 5, 1, 1), 300.0, dtype=torch.float16)
    expected = TF.local_response_norm(x.float(), 5, 1e-4, k=2.0).half()
    assert torch.equal(F.local_response_norm(x, 5, 1e-4, k=2.0), expected)


def test_empty_batch_and_integers() -> None:
    assert F.local_response_norm(torch.zeros(0, 4, 2, 2), 5).shape == (0, 4, 2, 2)
    ints = torch.arange(24).reshape(1, 6, 2, 2)
    assert torch.equal(F.local_response_norm(ints, 3, 1.0), TF.local_response_norm(ints, 3, 1.0))
    halves = torch.cat([TF.local_response_norm(half, 3, 1.0) for half in ints.chunk(2, 1)], 1)
    assert torch.equal(F.local_response_norm(ints, 3, 1.0, groups=2), halves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: torch.memory_format) -> None:
    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(lrn, (x, *ARGS))
    torch.library.opcheck(lrn_backward, (torch.randn(2, 6, 4, 5).requires_grad_(), x, *ARGS))
    torch.library.opcheck(lrn, (x[:, :, 1:, ::2], *ARGS))
    torch.library.opcheck(lrn, (x[:1].expand(3, 6, 4, 5), *ARGS))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("beta", [0.75, 1.1])
def test_gradcheck_and_gradgradcheck(groups: int, size: int, beta: float) -> None:
    x = torch.randn(2, 6, 2, 2, dtype=torch.double, requires_grad=True)
    call = lambda x: F.local_response_norm(x, size, 0.3, beta, 1.2, groups=groups)  # noqa: E731
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(layout: torch.memory_format, dynamic: bool) -> None:
    call = lambda x: F.local_response_norm(x * 2, 5, 0.1) + 1  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (2, 3):
        x = torch.randn(n, 8, 4, 4).contiguous(memory_format=layout).requires_grad_()
        y, expected = compiled(x), call(x)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


def test_export() -> None:
    module, x = ak.nn.LocalResponseNorm(5, k=2.0), torch.randn(2, 8, 4, 4)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


def test_autocast_keeps_the_dtype() -> None:
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.local_response_norm(x, 5).dtype == torch.float32
        half = F.local_response_norm(x.bfloat16(), 5)
        assert half.dtype == torch.bfloat16
    half.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def _transforms() -> dict[str, Callable[..., object]]:
    f = torch.func
    return {
        "vmap": lambda call, x: torch.vmap(call)(x),
        "vmap of an inner dimension": lambda call, x: torch.vmap(call, in_dims=2, out_dims=1)(x),
        "per-sample gradients": lambda call, x: torch.vmap(f.grad(lambda t: call(t).pow(3).sum()))(x),
        "jvp": lambda call, x: f.jvp(call, (x[0],), (x[1],)),
        "hessian": lambda call, x: f.hessian(lambda t: call(t).pow(2).sum())(x[0, :1, :3, :1, :1]),
        "jacfwd": lambda call, x: f.jacfwd(call)(x[0, :1, :3, :1, :1]),
    }


@pytest.mark.parametrize("name", list(_transforms()))
def test_function_transforms_as_torch(name: str) -> None:
    x = torch.randn(3, 2, 6, 2, 4, dtype=torch.double)
    transform = _transforms()[name]
    ours = transform(lambda t: F.local_response_norm(t, 5, 0.3), x)
    theirs = transform(lambda t: TF.local_response_norm(t, 5, 0.3), x)
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 3),
    channels=st.integers(1, 9),
    spatial=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    size=st.integers(1, 11),
    beta=st.sampled_from([0.5, 0.75, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_agrees_with_torch(n, channels, spatial, size, beta, seed) -> None:
    x = torch.randn(n, channels, *spatial, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) * 5
    torch.testing.assert_close(F.local_response_norm(x, size, 0.3, beta), TF.local_response_norm(x, size, 0.3, beta))


def test_a_trace_needs_torch_alone() -> None:
    """What is saved loads where this package is not, as convolutions and pooling do."""
    x = torch.randn(1, 6, 4, 4)
    traced = torch.jit.trace(ak.nn.LocalResponseNorm(3, groups=2), (x,))
    assert "alexnet_kernels::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x + 1), F.local_response_norm(x + 1, 3, groups=2))


def test_module_is_torchs() -> None:
    ours, theirs = ak.nn.LocalResponseNorm(3, 1e-2, 0.5, 1.5), torch.nn.LocalResponseNorm(3, 1e-2, 0.5, 1.5)
    x = torch.randn(2, 6, 3, 3)
    assert isinstance(ours, torch.nn.LocalResponseNorm) and repr(ours) == repr(theirs) and not ours.state_dict()
    for again in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(again(x), theirs(x))
    theirs.__class__ = ak.nn.LocalResponseNorm
    assert torch.equal(theirs(x), ours(x))
    assert repr(ak.nn.LocalResponseNorm(5, groups=2, alpha_mode="sum")).endswith("k=1.0, groups=2, alpha_mode='sum')")


BAD = [
    (TypeError, "input must be a torch.Tensor, got list", lambda: F.local_response_norm([1.0], 5)),
    (TypeError, "input is torch.complex64.*real numbers", lambda: F.local_response_norm(torch.zeros(1, 2, 3) * 1j, 5)),
    (
        ValueError,
        r"input has 2 dimensions, shape \(2, 3\).*unsqueeze",
        lambda: F.local_response_norm(torch.zeros(2, 3), 5),
    ),
    (ValueError, "size=0 must be at least 1", lambda: F.local_response_norm(torch.zeros(1, 2, 3), 0)),
    (
        ValueError,
        "groups=4 does not divide the 6 channels",
        lambda: F.local_response_norm(torch.zeros(1, 6, 3), 5, groups=4),
    ),
    (TypeError, r"groups=2.0 must be an integer", lambda: F.local_response_norm(torch.zeros(1, 6, 3), 5, groups=2.0)),
    (TypeError, r"size='3' must be an integer", lambda: F.spatial_response_norm(torch.zeros(1, 6, 3, 3), "3")),
    (ValueError, "groups=0 does not divide", lambda: F.local_response_norm(torch.zeros(1, 6, 3), 5, groups=0)),
    (
        ValueError,
        "alpha_mode='max' is unknown",
        lambda: F.local_response_norm(torch.zeros(1, 6, 3), 5, alpha_mode="max"),
    ),
    (ValueError, "size=4 must be odd", lambda: F.spatial_response_norm(torch.zeros(1, 6, 3, 3), 4)),
    (ValueError, "input has 5 dimensions", lambda: F.spatial_response_norm(torch.zeros(1, 6, 3, 3, 3), 5)),
    (TypeError, "input is torch.int64.*float", lambda: F.spatial_response_norm(torch.zeros(1, 6, 3, 3).long(), 5)),
    (TypeError, "input must be a torch.Tensor", lambda: F.max_pool2d(3, 2)),
    (TypeError, "weight must be a torch.Tensor", lambda: F.conv2d_relu(torch.zeros(1, 1, 3, 3), 7)),
    (TypeError, "weight must be a torch.Tensor", lambda: F.linear_relu(torch.zeros(1, 3), None)),
]


@pytest.mark.parametrize(("kind", "message", "call"), BAD, ids=[m for _, m, _ in BAD])
def test_errors_name_argument_value_and_remedy(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_spatial_norm_is_its_formula() -> None:
    x = torch.randn(2, 3, 6, 7, dtype=torch.double)
    squares = TF.pad(x.square(), (2, 2, 2, 2))
    total = sum(squares[:, :, i : i + 6, j : j + 7] for i, j in itertools.product(range(5), range(5)))
    expected = x / (1 + 0.5 / 25 * total) ** 0.75
    torch.testing.assert_close(ak.nn.SpatialResponseNorm(5, 0.5)(x), expected)
    assert torch.autograd.gradcheck(
        ak.nn.SpatialResponseNorm(3, 0.5), torch.randn(1, 2, 3, 3).double().requires_grad_()
    )


def test_fused_names_are_compositions() -> None:
    x, w, b = torch.randn(2, 4, 9, 9), torch.randn(6, 2, 3, 3), torch.randn(6)
    torch.testing.assert_close(F.conv2d_relu(x, w, b, 2, 1, 1, 2), TF.conv2d(x, w, b, 2, 1, 1, 2).relu())
    torch.testing.assert_close(
        F.conv2d_relu(x, w, padding="same", groups=2), TF.conv2d(x, w, padding="same", groups=2).relu()
    )
    torch.testing.assert_close(F.linear_relu(x, torch.randn(5, 9), None).min(), torch.tensor(0.0))
    values, indices = F.max_pool2d(x, 3, 2, return_indices=True)
    expected = TF.max_pool2d(x, 3, 2, return_indices=True)
    assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])
    normed = F.local_response_norm(x, 5, 0.1, k=2.0, groups=2)
    assert torch.equal(F.lrn_max_pool2d(x, 5, 0.1, k=2.0, groups=2), TF.max_pool2d(normed, 3, 2))
    pooled = F.local_response_norm(TF.max_pool2d(x, 3, 2), 5, 0.1, k=2.0, groups=2)
    assert torch.equal(F.max_pool2d_lrn(x, 5, 0.1, k=2.0, groups=2), pooled)
