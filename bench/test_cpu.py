"""On a CPU, one process: the paper's network beside stock ``torch.nn``, LRN beside torch's, and what importing costs.

    pytest bench/test_cpu.py --benchmark-only

Contenders take turns inside one measurement (``profiling.timer.interleave``); a measurement is made three times, and of each
contender, ours or not, the least of its three medians counts: a shared machine only ever disturbs. Ratios are of those. Figures
stand in the columns of ``extra_info``.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
import torch.nn.functional as TF

from alexnet_kernels import _extension, models, optim, use_backend
from alexnet_kernels import functional as F
from alexnet_kernels.comparison.run import training_step
from alexnet_kernels.comparison.stock import stock_alexnet
from alexnet_kernels.profiling.timer import interleave

from .rows import best_of

BATCH = 16


def measure(benchmark, calls: Mapping[str, Callable[[], object]], rounds: int) -> None:
    """Three interleaved measurements inside one benchmark; each contender's best median, and ratios of those to ours."""

    def once() -> None:
        found = interleave(calls, rounds=rounds)
        measurements.append({name: timing.median for name, timing in found.items()})

    measurements: list[dict[str, float]] = []
    benchmark.pedantic(once, rounds=3, iterations=1)
    best = best_of(measurements)
    benchmark.extra_info.update({f"{name} ms": round(value, 3) for name, value in best.items()})
    for name in best.keys() - {"ours"}:
        benchmark.extra_info[f"{name} / ours"] = round(best[name] / best["ours"], 3)
    print(f"\n{benchmark.name}: {benchmark.extra_info}")


def on_reference(function: Callable[..., torch.Tensor], *args: object, **options: object) -> torch.Tensor:
    with use_backend("reference"):
        return function(*args, **options)


@pytest.fixture
def networks() -> tuple[models.AlexNet, models.AlexNet]:
    torch.manual_seed(0)
    ours, stock = models.alexnet("paper"), stock_alexnet("paper")
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def in_both_layouts(stock: torch.nn.Module, x: torch.Tensor) -> dict[str, tuple[torch.nn.Module, torch.Tensor]]:
    """Stock in both of torch's layouts: the model's weights and the images in the layout named."""
    last = torch.channels_last
    return {
        "stock": (stock, x),
        "stock channels_last": (copy.deepcopy(stock).to(memory_format=last), x.contiguous(memory_format=last)),
    }


def test_paper_forward(benchmark, networks) -> None:
    ours, stock = networks
    x = torch.randn(BATCH, 3, 227, 227) * 60
    with torch.inference_mode():
        calls = {name: partial(model, images) for name, (model, images) in in_both_layouts(stock.eval(), x).items()}
        compiled = {
            name.replace("stock", "compiled"): partial(torch.compile(c.func), *c.args) for name, c in calls.items()
        }
        for call in compiled.values():
            call()
        measure(benchmark, {"ours": partial(ours.eval(), x), **calls, **compiled}, rounds=4)


def test_paper_training_step(benchmark, networks) -> None:
    ours, stock = networks
    x, labels = torch.randn(BATCH, 3, 227, 227) * 60, torch.randint(1000, (BATCH,))
    both = in_both_layouts(stock.train(), x)
    calls = {name: training_step(model, images, labels) for name, (model, images) in both.items()}
    fused = partial(torch.optim.SGD, fused=True)
    calls |= {f"{name} fused SGD": training_step(m, images, labels, sgd=fused) for name, (m, images) in both.items()}
    calls["default SGD"] = training_step(ours.train(), x, labels)  # our network with torch's default optimiser
    measure(benchmark, {"ours": training_step(ours, x, labels, sgd=optim.SGD), **calls}, rounds=2)


@pytest.mark.parametrize("shape", [(BATCH, 96, 55, 55), (BATCH, 256, 27, 27)], ids=["norm1", "norm2"])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_lrn_forward(benchmark, shape: tuple[int, ...], layout: str) -> None:
    x = (torch.randn(shape).relu() * 20).contiguous(memory_format=getattr(torch, layout))
    with torch.inference_mode():
        calls = {
            "ours": lambda: F.local_response_norm(x, 5, k=2.0),
            "stock": lambda: TF.local_response_norm(x, 5, k=2.0),
            "reference": partial(on_reference, F.local_response_norm, x, 5, k=2.0),
        }
        measure(benchmark, calls, rounds=9)


@pytest.mark.parametrize("shape", [(BATCH, 96, 55, 55), (BATCH, 256, 27, 27)], ids=["norm1", "norm2"])
def test_lrn_backward(benchmark, shape: tuple[int, ...]) -> None:
    x, g = (torch.randn(shape).relu() * 20).requires_grad_(), torch.randn(shape)
    outputs = {
        "ours": F.local_response_norm(x, 5, k=2.0),
        "stock": TF.local_response_norm(x, 5, k=2.0),
        "reference": on_reference(F.local_response_norm, x, 5, k=2.0),  # its backward follows
    }
    calls = {name: partial(torch.autograd.grad, y, x, g, retain_graph=True) for name, y in outputs.items()}
    measure(benchmark, calls, rounds=9)


@pytest.mark.parametrize("shape", [(BATCH, 96, 55, 55), (BATCH, 256, 27, 27)], ids=["norm1", "norm2"])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_relu_lrn_pool_forward(benchmark, shape: tuple[int, ...], layout: str) -> None:
    """The compiled library's one pass, beside the three modules and what torch.compile makes of them."""
    reason = _extension.why_not("cpu")
    if reason:
        pytest.skip(reason)
    x = (torch.randn(shape) * 20).contiguous(memory_format=getattr(torch, layout))
    stock = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.LocalResponseNorm(5, k=2.0), torch.nn.MaxPool2d(3, 2))
    arguments = (None, True, 5, 2e-5, 0.75, 2.0, 1, (3, 3, 2, 2, 0, 0, 1, 1), False, False, False)
    with torch.inference_mode():
        calls = {
            "ours": lambda: torch.ops.alexnet_kernels_cpu.lrn_pool(x, *arguments),
            "stock": partial(stock, x),
            "compiled": partial(torch.compile(stock), x),
        }
        measure(benchmark, calls, rounds=9)


def test_import(benchmark) -> None:
    """Milliseconds that ``import alexnet_kernels`` takes after ``import torch``, each time in a new process."""
    code = "import time, torch; t = time.perf_counter(); import alexnet_kernels; print((time.perf_counter() - t) * 1e3)"

    def once() -> None:
        found.append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))

    found: list[float] = []
    benchmark.pedantic(once, rounds=3, iterations=1)
    benchmark.extra_info["milliseconds beyond torch, best of three"] = round(min(found), 1)
    print(f"\n{benchmark.name}: {benchmark.extra_info}")
