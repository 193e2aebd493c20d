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


def is_worth_compiling(problem: Problem) -> bool:
    """Where minutes count: neighbours that a compiler may fuse, in the usual batch. A convolution with its ReLU has cuDNN's own
    fusion for that, the first block ``test_stem.py``, and fc6 and fc7 ``test_dropout.py``."""
    unit = problem.unit
    fused = len(unit.facts) > 2 or unit.kind == "lrn+pool"
    return fused and not unit.first and (problem.track, problem.batch) == ("bf16", 256)


@pytest.mark.parametrize("problem", problems(DEVICE), ids=lambda problem: problem.id)
def test_layer(problem: Problem, collect, budget) -> None:
    row = collect(
        lambda: measure_problem(
            problem,
            seconds=budget.seconds,
            samples=budget.samples,
            sample_ms=budget.sample_ms,
            compiled=budget.compiled == "all" or (budget.compiled == "first" and is_worth_compiling(problem)),
            autotune=budget.autotune,
        )
    )
    ours = {name: entry for name, entry in row["contenders"].items() if name.startswith("ours")}
    assert all(entry["status"] == "ok" for entry in ours.values()), ours
