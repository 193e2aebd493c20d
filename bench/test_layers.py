"""Every layer and fused group of the paper's network, forward and backward, against every baseline that can run it.

    pytest bench/test_layers.py --benchmark-only [-k "norm and bf16"] [--result DIR]

On a GPU: each batch and precision track of ``cases``, the most important first. On a CPU: batches 16 and 1, fp32 and bf16.
"""

from __future__ import annotations

import pytest
import torch

from .cases import Problem, problems
from .rows import measure_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("problem", problems(DEVICE), ids=lambda problem: problem.id)
def test_layer(problem: Problem, collect, budget) -> None:
    first = problem.track == "bf16" and problem.batch == 256
    lrn = problem.unit.kind in ("lrn", "lrn+pool")
    row = collect(
        lambda: measure_problem(
            problem,
            seconds=budget.seconds,
            samples=budget.samples,
            sample_ms=budget.sample_ms,
            compiled=budget.compiled == "all" or lrn or (first and budget.compiled == "first"),
            autotune=budget.autotune,
        )
    )
    ours = {name: entry for name, entry in row["contenders"].items() if name.startswith("ours")}
    assert all(entry["status"] == "ok" for entry in ours.values()), ours
