"""Each operation with its gradient inside a CUDA graph, replayed on other numbers; and what ``torch.export`` keeps of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alexnet_kernels import _extension, dispatch, nn
from alexnet_kernels import functional as F

LAYOUTS = (torch.contiguous_format, torch.channels_last)
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "lrn": lambda x: F.local_response_norm(x, 5, 0.1, k=2.0, groups=2),
    "pool": lambda x: F.max_pool2d(x, 3, 2),
    "lrn then pool": lambda x: F.lrn_max_pool2d(x, 5, 0.1, k=2.0, groups=2),
    "pool then lrn": lambda x: F.max_pool2d_lrn(x, 5, 0.1, k=2.0, groups=2),
}


def run(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of a sum that gives every output another weight."""
    y = call(x)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return y, torch.autograd.grad(y, x, weights)[0]


def leaf(device: str, layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 32, 13, 11, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_captured_call_is_replayed_on_new_numbers(name: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Bit for bit what eager calls give: no launch reads anything but its tensors, and none allocates or waits outside."""
    call, x = OPERATIONS[name], leaf("cuda", layout, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), dispatch.recording() as used:  # what is compiled, or set up, at the first call
        for _ in range(3):
            run(call, x)
    torch.cuda.current_stream().wait_stream(side)
    assert used <= {"triton", "cuda"}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, x)
    for _ in range(3):
        other = leaf("cuda", layout, dtype)
        with torch.no_grad():
            x.copy_(other)
        graph.replay()
        for got, expected in zip(captured, run(call, other), strict=True):
            assert torch.equal(got, expected) and got.stride() == expected.stride()


class Module(torch.nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_exported_program_computes_the_same(name: str, layout: torch.memory_format) -> None:
    """With the operation in it where a kernel can run here, for any number of images."""
    module, x = Module(OPERATIONS[name]), leaf("cpu", layout).detach()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    for images in (2, 5):
        other = torch.randn(images, *x.shape[1:]).contiguous(memory_format=layout)
        y, expected = program.module()(other), module(other)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
    held = [str(node.target) for node in program.graph.nodes if "alexnet_kernels" in str(node.target)]
    # pooling alone is torch's own on a CPU, which is quicker for most inputs
    assert bool(held) == (_extension.why_not("cpu") is None and name != "pool")


def test_an_exported_run_of_modules_computes_the_same() -> None:
    for order in (slice(None), slice(None, None, -1)):
        module = nn.FusedSequential(*[nn.LocalResponseNorm(5), nn.MaxPool2d(3, 2)][order])
        x = leaf("cpu", torch.contiguous_format).detach()
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))
