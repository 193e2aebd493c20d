"""Function transforms over the operations: ``torch.func``, and gradients that are batched where the forward was not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import alexnet_kernels as ak
from alexnet_kernels import dispatch
from alexnet_kernels import functional as F

CONV = ((1, 1), (1, 0), 1, 2)
NORM, POOL = (5, 0.1, 0.75, 1.0), (3, 2, 0, 1, False)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def weight() -> Tensor:
    return torch.linspace(-1, 1, 12 * 3 * 9).view(12, 3, 3, 3).sin()


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "lrn": lambda x: F.local_response_norm(x, *NORM, groups=2),
    "pool": lambda x: F.max_pool2d(x, *POOL),
    "lrn, pool": lambda x: F.lrn_max_pool2d(x, *NORM, *POOL),
    "pool, lrn": lambda x: F.max_pool2d_lrn(x, *NORM, *POOL),
    "conv": lambda x: F.conv2d_relu(x, weight().to(x), torch.zeros(12).to(x), *CONV),
    "convs": lambda x: F.conv2d_relu_chain(x, [(weight().to(x), None, CONV), (weight()[:8].to(x), None, (1, 1, 1, 4))]),
    "conv, lrn, pool": lambda x: F.conv2d_relu_lrn_max_pool2d(x, weight().to(x), None, CONV, NORM, POOL),
    "linear": lambda x: F.linear_relu(x, torch.linspace(-1, 1, 5 * x.shape[-1]).view(5, -1).to(x), torch.ones(5).to(x)),
}
SHAPES = (
    (2, 6, 5, 7),
    (3, 6, 150, 150),
)  # the second in blocks, where a reference works so; and large enough for kernels


def image(shape: tuple[int, ...], layout: torch.memory_format, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).contiguous(memory_format=layout).requires_grad_()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, where it loops over a batch
@pytest.mark.parametrize("shape", SHAPES, ids=["small", "large"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_batched_gradients(name: str, layout: torch.memory_format, shape: Any, device: torch.device) -> None:
    """Those of one by one, by the kernels that run without a transform."""
    x = image(shape, layout, device)
    y = OPERATIONS[name](x)
    grads = torch.randn(2, *y.shape, device=device)
    with dispatch.recording() as used:
        (batched,) = torch.autograd.grad(y, x, grads, retain_graph=True, is_grads_batched=True)
    assert used <= {"reference"}
    expected = torch.stack([torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads])
    torch.testing.assert_close(batched, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lrn", "lrn, pool"])
def test_a_backend_that_was_asked_for_by_name_is_not_replaced(name: str) -> None:
    with ak.use_backend("triton"):
        x = image(SHAPES[0], LAYOUTS[0], torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        y = OPERATIONS[name](x)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run a batched gradient: plain torch"):
        torch.autograd.grad(y, x, torch.randn(2, *y.shape).to(y), is_grads_batched=True)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_vectorised_jacobian_and_hessian(layout: torch.memory_format, strategy: str) -> None:
    x = image((1, 4, 3, 3), layout, torch.device("cpu")).detach()
    functional = torch.autograd.functional
    torchs = lambda t: TF.local_response_norm(t, 3)  # noqa: E731
    ours = lambda t: F.local_response_norm(t, 3)  # noqa: E731
    jacobians = [
        functional.jacobian(f, x, vectorize=v, strategy=s)
        for f, v, s in ((ours, True, strategy), (torchs, False, "reverse-mode"))
    ]
    torch.testing.assert_close(*jacobians)
    hessians = [
        functional.hessian(lambda t, f=f: f(t).square().sum(), x, vectorize=v, outer_jacobian_strategy=s)
        for f, v, s in ((ours, True, strategy), (torchs, False, "reverse-mode"))
    ]
    torch.testing.assert_close(*(h.detach() for h in hessians), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_ensemble_by_vmap(layout: torch.memory_format) -> None:
    """As torch's recipe has it: the parameters of several models stacked, one call for all."""
    models = [ak.models.alexnet("tiny").eval() for _ in range(2)]
    stacked, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 3, 227, 227).contiguous(memory_format=layout)

    def one(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    with torch.no_grad():
        found = torch.func.vmap(one)(stacked, buffers)
        torch.testing.assert_close(found, torch.stack([model(x) for model in models]), rtol=1e-4, atol=1e-4)


def test_pixels_by_vmap() -> None:
    model = ak.models.alexnet("tiny").eval()
    pixels = torch.randint(256, (3, 1, 3, 227, 227), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(pixels)[:, 0], model(pixels[:, 0]), rtol=1e-4, atol=1e-4)


def test_linearised_behind_trainable_weights() -> None:
    net = ak.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.LocalResponseNorm(3)))
    x, tangent = torch.randn(1, 3, 9, 9), torch.randn(1, 3, 9, 9)
    y, tangents = torch.func.linearize(net, x)
    expected, along = torch.func.jvp(net, (x,), (tangent,))
    torch.testing.assert_close((y, tangents(tangent)), (expected, along))
