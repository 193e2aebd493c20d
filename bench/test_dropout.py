"""fc6 and fc7 as training runs them, with dropout behind the ReLU: forward and all gradients.

    pytest bench/test_dropout.py --benchmark-only [--result DIR]

What drops out is random, so that nobody can be compared with fp64 element by element. Instead: what was kept is twice the fp64
result, and of what could be kept about half was; the gradient by the bias is the output's, twice, where it was kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from alexnet_kernels import functional as F
from alexnet_kernels.profiling import timer

from .baselines import forget_compiled
from .cases import Problem, Tensors, precision, tensors, units
from .rows import _EPS, Row, described, row_of, settle, watched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    (layer, track, batch) for track, batch in (("bf16", 256), ("bf16", 128), ("tf32", 256)) for layer in ("fc6", "fc7")
]
P = 0.5
Layer = Callable[..., Tensor]  # input, weight, bias -> output


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear_relu_dropout(x, weight, bias, P)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return TF.dropout(TF.relu(TF.linear(x, weight, bias), inplace=True), P)


def problem_of(layer: str, track: str, batch: int, variant: str = "paper") -> Problem:
    unit = next(u for u in units(variant) if u.facts[0].name == layer)
    return Problem(unit, "forward", track, batch, DEVICE)


def call(layer: Layer, data: Tensors) -> Callable[[], tuple[Tensor, ...]]:
    """The output, and the gradients by input, weight and bias."""
    wanted = [t.detach().requires_grad_() for t in (data.x, *data.weights)]

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = layer(*wanted)
        return y.detach(), *torch.autograd.grad(y, wanted, data.grad)

    return step


def why_wrong(problem: Problem, data: Tensors, found: tuple[Tensor, ...]) -> str | None:
    """By what was kept; None where nothing is wrong."""
    exact, limit = data.to(torch.float64), 4 * _EPS[problem.track]
    y, dx, dw, db = (t.double() for t in found)
    relu = TF.relu(TF.linear(exact.x, *exact.weights))
    kept = y != 0
    share = float((kept & (relu > 0)).sum() / (relu > 0).sum())
    if abs(share - (1 - P)) > 5 * (P * (1 - P) / float((relu > 0).sum())) ** 0.5 + limit:
        return f"{share:.3f} of the outputs were kept"
    dz = exact.grad * kept / (1 - P)
    right = (relu * kept / (1 - P), dz @ exact.weights[0], dz.t() @ exact.x, dz.sum(0))
    errors = [float((got - want).norm() / want.norm()) for got, want in zip((y, dx, dw, db), right, strict=True)]
    return f"relative errors {errors}" if not max(errors) <= limit else None


def measure(problem: Problem, layers: dict[str, Layer], seconds: float, samples: int, sample_ms: float) -> Row:
    row = row_of(problem) | {"case": problem.id.replace("/forward/", "/dropout training/"), "pass": "training"}
    row |= {"unit": f"{problem.unit.name}+dropout", "flops": 3 * problem.flops}
    backward = replace(problem, run="backward")
    row["bytes"] += backward.bytes
    device = torch.device(problem.device)
    with precision(problem.track):
        forget_compiled()
        # x, weights and gradient, which is what both passes read
        copies = row["buffer sets"] = timer.rotation(backward.bytes_read, device)
        sets = [tensors(problem, seed) for seed in range(copies)]
        calls = {name: [call(layer, data) for data in sets] for name, layer in layers.items()}

        def judged(name: str) -> str | None:
            try:
                return why_wrong(problem, sets[0], calls[name][0]())
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:300]}"

        bad = {name: why for name in calls if (why := judged(name)) is not None}
        with watched(device) as seen:
            right = {name: calls[name] for name in calls if name not in bad}
            timings = timer.measure(right, device=device, samples=samples, sample_ms=sample_ms, seconds=seconds)
        bad |= {name: why for name in timings if (why := judged(name)) is not None}
    row["watched"] = seen
    row["contenders"] = {n: {"status": "ok", **described(t)} for n, t in timings.items() if n not in bad}
    row["contenders"] |= {name: {"status": "wrong", "reason": why} for name, why in bad.items()}
    settle(row, {name: t for name, t in timings.items() if name not in bad})
    return row


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: on a CPU dropout is torch's own")
@pytest.mark.parametrize(("layer", "track", "batch"), CASES, ids=str)
def test_dropout(layer: str, track: str, batch: int, collect, budget) -> None:
    layers: dict[str, Layer] = {"ours": ours, "eager": eager}
    if budget.compiled == "all" or (budget.compiled == "first" and (track, batch) == CASES[0][1:]):
        layers["compile"] = torch.compile(eager, dynamic=False)
    run = functools.partial(measure, problem_of(layer, track, batch), layers)
    row = collect(lambda: run(budget.seconds, budget.samples, budget.sample_ms))
    assert row["contenders"]["ours"]["status"] == "ok", row["contenders"]
