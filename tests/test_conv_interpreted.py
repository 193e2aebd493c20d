"""The convolution's operations on their Triton kernels: in the interpreter where there is no GPU. The kernels' own tests are
in ``tests/kernels``; here are values and gradients through autograd, and whole networks.

Results are held to fp64. What each may be off: one rounding to the dtype, and sums in fp32 of K products, whose rounding
errors grow like √K at most where they are independent; 8 stands for what a bad draw adds.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as TF
from test_two_device import FC8, relative
from torch import Tensor

import alexnet_kernels as ak
from alexnet_kernels import dispatch, models
from alexnet_kernels import functional as F
from alexnet_kernels.distributed import exchange
from alexnet_kernels.models import AlexNet, TwoDeviceAlexNet, merge_state

EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# input [N, C, H, W], outputs, kernel, stride, padding, dilation, groups: conv1 to conv5 as small as they can be, and odd ones
SHAPES = {
    "conv1": ((2, 3, 19, 19), 12, (11, 11), 4, 0, 1, 1),
    "conv2": ((2, 16, 6, 6), 32, (5, 5), 1, 2, 1, 2),
    "conv3": ((3, 16, 5, 5), 24, (3, 3), 1, 1, 1, 1),
    "conv4": ((2, 32, 4, 5), 16, (3, 3), 1, 1, 1, 2),
    "odd": ((3, 6, 7, 5), 9, (2, 3), (2, 1), (1, 2), (1, 2), 3),
}


def of(name: str, dtype: torch.dtype, device: torch.device, layout=torch.channels_last) -> tuple[list[Tensor], tuple]:
    """Input, weight, bias, which want gradients, and the geometry."""
    shape, outputs, kernel, *geometry, groups = SHAPES[name]
    fan = shape[1] // groups * math.prod(kernel)
    x = torch.randn(shape, device=device).relu().to(dtype).contiguous(memory_format=layout)
    w = (torch.randn(outputs, shape[1] // groups, *kernel, device=device) * (2 / fan) ** 0.5).to(dtype)
    inputs = [x, w.contiguous(memory_format=layout), torch.randn(outputs, device=device).to(dtype)]
    return [t.requires_grad_() for t in inputs], (*geometry, groups)


def in_double(inputs: list[Tensor], relu_of: Tensor | None, g: Tensor, geometry: tuple) -> tuple[Tensor, ...]:
    """The result, and the gradients by the inputs with the mask of ``relu_of``: a sum that rounds to 0 is cut in both."""
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    z = TF.conv2d(*doubles, *geometry)
    mask = torch.ones_like(z) if relu_of is None else (relu_of > 0).double()
    return z.detach() * mask, *torch.autograd.grad(z, doubles, g.double() * mask)


def check(name: str, dtype: torch.dtype, layout, device: torch.device, backend: str) -> set[str]:
    """Hold result and gradients to fp64, and their strides to torch's; the backends that ran."""
    inputs, geometry = of(name, dtype, device, layout)
    with ak.use_backend(backend), dispatch.recording() as used:
        y = F.conv2d_relu(*inputs, *geometry, precision="ieee")
    g = torch.randn_like(y)
    with dispatch.recording() as later:
        found = torch.autograd.grad(y, inputs, g)
    expected = in_double(inputs, y.detach(), g, geometry)
    pixels = y[:, 0].numel()
    # Roundings: of the result, which cuDNN's way rounds before and after the bias; of dz, which backward starts from.
    for got, want, terms in zip((y, *found), expected, (inputs[1][0].numel(), *[pixels] * 3), strict=True):
        assert got.dtype == dtype
        assert relative(got.double(), want) <= 2 * EPS[dtype] + 8 * 2.0**-24 * math.sqrt(terms)
    assert y.stride() == TF.conv2d(*inputs, *geometry).stride()
    assert found[1].stride() == inputs[1].stride()
    return used | later


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize(("dtype", "layout"), list(zip(EPS, itertools.cycle(LAYOUTS))))
def test_values_and_gradients(name: str, dtype: torch.dtype, layout, device: torch.device) -> None:
    assert check(name, dtype, layout, device, "triton") == {"triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("backend", ["cudnn", "auto"])
@pytest.mark.parametrize(("dtype", "layout"), list(itertools.product(EPS, LAYOUTS)))
def test_cudnns_way_and_the_chosen_one(name: str, backend: str, dtype: torch.dtype, layout) -> None:
    """Strict fp32 under either setting of torch's flag, which is left as it was."""
    before = torch.backends.cudnn.conv.fp32_precision
    used = check(name, dtype, layout, torch.device("cuda"), backend)
    assert used <= {"cudnn", "triton"}
    assert backend == "auto" or used == {"cudnn", "triton"}, "bias, ReLU and their gradient are passes of this package"
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_the_operation_and_compiled_code(device: torch.device) -> None:
    """The dispatcher's way gives the bits of the direct one."""
    inputs, geometry = of("conv4", torch.float16, device)
    call = lambda *t: F.conv2d_relu(*t, *geometry)  # noqa: E731
    with ak.use_backend("triton"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        results = []
        for run in (call, compiled):
            y = run(*inputs)
            results.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("gap", "compiled"), [("rows and columns", True), ("channels", False)])
def test_a_slice_with_nan_in_its_gap(gap: str, compiled: bool, device: torch.device) -> None:
    """It has the shape and the strides of a buffer with zeros behind each row, or of one tower among two; no zeros are there."""
    inputs, geometry = of("conv4", torch.float32, device)
    n, c, h, w = inputs[0].shape
    more = (n, c, h + 1, w + 1) if gap == "rows and columns" else (n, 2 * c, h, w)
    whole = torch.full(more, float("nan"), device=device).contiguous(memory_format=torch.channels_last)
    x = whole[:, :c, :h, :w].copy_(inputs[0].detach()).requires_grad_()
    assert x.isfinite().all() and not x.is_contiguous(memory_format=torch.channels_last)
    call = lambda *t: F.conv2d_relu(*t, *geometry, precision="ieee")  # noqa: E731
    with ak.use_backend("triton"):
        y = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(x, *inputs[1:])
        found = torch.autograd.grad(y, (x, *inputs[1:]), torch.ones_like(y))
        dense = call(*inputs)
        expected = torch.autograd.grad(dense, inputs, torch.ones_like(y))
    for got, want in zip((y, *found), (dense, *expected), strict=True):
        torch.testing.assert_close(got, want)


def test_special_values_as_torch(device: torch.device) -> None:
    """NaN and infinity reach the results they reach in torch, and NaN passes the ReLU's gradient on."""
    inputs, geometry = of("conv3", torch.float32, device)
    with torch.no_grad():
        inputs[0][0, 3, 2, 2], inputs[0][1, 0, 0, 0] = float("nan"), float("inf")
    expected = TF.conv2d(*inputs, *geometry).relu()
    with ak.use_backend("triton"):
        y = F.conv2d_relu(*inputs, *geometry, precision="ieee")
        found = torch.autograd.grad(y, inputs, torch.ones_like(y))
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, inputs, torch.ones_like(y))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_determinism(device: torch.device) -> None:
    inputs, geometry = of("conv2", torch.float32, device)
    with ak.use_backend("triton"):
        results = []
        for _ in range(2):
            y = F.conv2d_relu(*inputs, *geometry)
            results.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --------------------------------------------------------------------------------------------------------------- networks


def networks(fc8: str) -> tuple[AlexNet, AlexNet, TwoDeviceAlexNet, Tensor]:
    """``tiny`` in fp64, the same in fp32 as one network and as two towers, and images; without dropout."""
    exact = models.alexnet("tiny", num_classes=11, input_size=67).double().eval()
    for parameter in exact.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else (2 / parameter[0].numel()) ** 0.5)
    one = models.alexnet("tiny", num_classes=11, input_size=67).eval()
    one.load_state_dict(exact.state_dict())
    exact.load_state_dict(one.state_dict())  # the rounded weights
    two = TwoDeviceAlexNet.from_one_device(one, ("cpu", "cpu"), fc8)
    return exact, one, two, torch.randn(2, 3, 67, 67)


def results(network: torch.nn.Module, x: Tensor, images: bool) -> dict[str, Tensor]:
    """Logits and every gradient, by the names of one device; the ``images``' too, which is most of the interpreter's work."""
    x = x.clone().requires_grad_(images)
    y = network(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    if isinstance(network, TwoDeviceAlexNet):
        found = merge_state(found, network.variant, network.fc8)
    return {"logits": y.detach(), **found, **({"images": x.grad} if images else {})}


# Eight layers, each a sum in fp32 of at most 9216/8 products, forward and backward: 16 times one of them.
NETWORK = 16 * 2 * 2.0**-24 * math.sqrt(9216 / 8)


@pytest.mark.parametrize(
    ("fc8", "images"), [(FC8[0], False), *(pytest.param(f, True, marks=pytest.mark.slow) for f in FC8)]
)
def test_two_devices_equal_one_on_triton(fc8: str, images: bool) -> None:
    """Both forms, every layer of them on this package's kernels, against fp64 and so against each other."""
    exact, one, two, x = networks(fc8)
    expected = results(exact, x.double(), images)
    for network in (one, two):
        with ak.use_backend("triton"), dispatch.recording() as used:
            found = results(network, x, images)
        assert used == {"triton"}, "a layer ran elsewhere"
        assert found.keys() == expected.keys()
        errors = {name: relative(value.double(), expected[name]) for name, value in found.items()}
        assert max(errors.values()) <= NETWORK, errors


@pytest.mark.slow
def test_what_crosses_is_the_same_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with zeros for the other tower's half in conv3, the network's result is far off."""
    original = exchange.pull
    monkeypatch.setattr(exchange, "pull", lambda x, name, *a, **k: original(x * (name != "conv3"), name, *a, **k))
    exact, _, two, x = networks("device0")
    with torch.no_grad():
        expected = exact(x.double())
        with ak.use_backend("triton"):
            assert relative(two(x).double(), expected) > 1e-3
