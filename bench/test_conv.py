"""Which form of the Triton convolution is the quickest, on conv2 to conv5, and is it quicker than cuDNN in either layout?

    pytest bench/test_conv.py --benchmark-only [-k "conv3 and bf16"] [--result DIR]

``kernels/conv.py`` chooses by counting; this measures. Every form that can take a layer is a contender, and so is cuDNN as
torch calls it: NCHW and channels_last, as towers one by one, and with its own fused ReLU. Group-major rows of a grouped layer
get the buffer they need, which costs whoever writes it nothing; the rest reads channels_last maps.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alexnet_kernels.geometry import Conv
from alexnet_kernels.kernels import conv as kernel

from .baselines import Call, Contender, contenders
from .cases import Problem, Tensors, units
from .rows import measure_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("batch_tile", "pixel_pair", "group_major", "pointer_rows")
LAYERS = ("conv3", "conv2", "conv4", "conv5")  # the first has no groups and no channels to spare: the plainest question
CASES = [("bf16", 256), ("tf32", 256), ("bf16", 128), ("bf16", 1024), ("bf16", 32), ("bf16", 1)]


def _problem(layer: str, track: str, batch: int) -> Problem:
    unit = next(u for u in units("paper") if u.kind == "conv+relu" and u.facts[0].name == layer)
    return Problem(unit, "forward", track, batch, DEVICE)


PROBLEMS = [_problem(layer, track, batch) for track, batch in CASES for layer in LAYERS]


def _precision(problem: Problem) -> str:
    return "tf32" if problem.track == "tf32" else "ieee"


def _geometry(problem: Problem) -> tuple[Conv, kernel.Problem]:
    unit, op = problem.unit, problem.unit.op(Conv)
    shape = (problem.batch, *unit.input)
    weight = (unit.output[0], unit.input[0] // op.groups, op.kernel, op.kernel)
    sizes = ((op.stride,) * 2, (op.padding,) * 2, (1, 1))
    return op, kernel.Problem.of(shape, weight, *sizes, op.groups, problem.dtype.itemsize)


def _why_not(form: str) -> Callable[[Problem], str | None]:
    def why_not(problem: Problem) -> str | None:
        try:
            kernel.choose(_geometry(problem)[1], _precision(problem), form)
        except ValueError as error:
            return str(error)
        return None

    return why_not


def _build(form: str) -> Callable[[Problem, Tensors], Call]:
    def build(problem: Problem, tensors: Tensors) -> Call:
        op, _ = _geometry(problem)
        t, precision = tensors.channels_last(), _precision(problem)
        stride, padding = (op.stride,) * 2, (op.padding,) * 2
        if form == "group_major" and op.groups > 1:
            towers = t.x.unflatten(1, (op.groups, -1)).permute(1, 0, 3, 4, 2).contiguous()
            return lambda: kernel.forward_group_major(towers, *t.weights, True, stride, padding, precision)
        return lambda: kernel.forward(t.x, *t.weights, True, stride, padding, (1, 1), op.groups, precision, form)

    return build


OURS = [Contender(f"ours {form}", _why_not(form), _build(form)) for form in FORMS]


def chosen(problem: Problem) -> list[Contender]:
    """The forms that can take a problem, and torch's own convolution in every way."""
    theirs, _ = contenders(problem, compiled=False, autotune=False)
    return [c for c in (*OURS, *theirs) if c.why_not(problem) is None and (c in OURS or not c.ours)]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: Triton has nothing to compile for on a CPU")
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_forms(problem: Problem, collect, budget) -> None:
    row = collect(
        lambda: measure_problem(
            problem,
            seconds=budget.seconds,
            samples=budget.samples,
            sample_ms=budget.sample_ms,
            chosen=chosen(problem),
        )
    )
    ours = {name: entry for name, entry in row["contenders"].items() if name.startswith("ours")}
    assert all(entry["status"] == "ok" for entry in ours.values()), ours
