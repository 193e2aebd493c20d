"""The optimiser's step on a network's parameters: ours, torch's two ways, and the casts that autocast adds to those.

    pytest bench/test_optim.py --benchmark-only

``bf16``: gradients arrive in bf16 and the next forward reads bf16 weights. Ours does all of it in one kernel; torch's step is
fp32's, so that each gradient is cast before it and each weight after it, as autocast does. ``fp32``: the step alone. The rate
is 0, so that weights stay what they were however often a step is timed; they are compared afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alexnet_kernels import models, optim
from alexnet_kernels.profiling import timer

from .rows import described, settle, watched

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VARIANT = "paper" if DEVICE.type == "cuda" else "tiny"
BYTES = 20  # a parameter, at least: gradient, momentum and weight read; momentum and weight written, here and there a half one
OPTIONS = {"lr": 0.0, "momentum": 0.9, "weight_decay": 5e-4}


def _parameters(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    found = [p.detach().to(DEVICE, dtype).requires_grad_() for p in models.alexnet(VARIANT).parameters()]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def _ours(track: str) -> tuple[Callable[[], None], list[Tensor]]:
    weights = _parameters(torch.bfloat16 if track == "bf16" else torch.float32)
    return optim.SGD(weights, **OPTIONS).step, weights


def _torchs(track: str, **how: bool) -> tuple[Callable[[], None], list[Tensor]]:
    weights = _parameters(torch.bfloat16 if track == "bf16" else torch.float32)
    if track == "fp32":
        return torch.optim.SGD(weights, **OPTIONS, **how).step, weights
    masters = [p.detach().float().requires_grad_() for p in weights]
    for master in masters:
        master.grad = torch.empty_like(master)
    step = torch.optim.SGD(masters, **OPTIONS, **how).step

    def with_casts() -> None:
        torch._foreach_copy_([m.grad for m in masters], [p.grad for p in weights])
        step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)

    return with_casts, weights


@pytest.mark.parametrize("track", ["bf16", "fp32"])
def test_step(track: str, collect, budget) -> None:
    """What a step costs, with its casts."""

    def measure() -> dict[str, Any]:
        made = {
            "ours": _ours(track),
            "torch foreach": _torchs(track, foreach=True),
            "torch fused": _torchs(track, fused=True),
        }
        before = {name: [w.detach().clone() for w in weights] for name, (_, weights) in made.items()}
        for step, _ in made.values():  # state is made, outside of any graph
            step()
        calls = {name: [step] for name, (step, _) in made.items()}
        with watched(DEVICE) as seen:
            found = timer.measure(
                calls, device=DEVICE, samples=budget.samples, sample_ms=budget.sample_ms, seconds=3 * budget.seconds
            )
        count = sum(w.numel() for w in before["ours"])
        row: dict[str, Any] = {
            "section": "layers",
            "case": f"{VARIANT}/sgd/step {track}",
            "variant": VARIANT,
            "unit": "sgd",
            "kind": "optimiser",
            "pass": "step",
            "track": track,
            "batch": 0,
            "device": DEVICE.type,
            "flops": 6 * count,
            "bytes": BYTES * count,
            "watched": seen,
            "contenders": {},
            "left out": {},
        }
        for name, timing in found.items():
            right = all(torch.equal(a, b) for a, b in zip(before[name], made[name][1], strict=True))
            row["contenders"][name] = {"status": "ok", **described(timing)} if right else {"status": "wrong"}
        settle(row, {name: timing for name, timing in found.items() if row["contenders"][name]["status"] == "ok"})
        return row

    row = collect(measure)
    assert row["contenders"]["ours"]["status"] == "ok", row
