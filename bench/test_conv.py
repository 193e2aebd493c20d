"""Which form of the Triton convolution is the quickest, on conv2 to conv5, and is each pass quicker than cuDNN in either layout?

    pytest bench/test_conv.py --benchmark-only [-k "conv3 and bf16"] [--result DIR]

``kernels/conv.py`` chooses by counting; this measures. Forward, every form that can take a layer is a contender, and so is
cuDNN as torch calls it: NCHW and channels_last, as towers one by one, and with its own fused ReLU. Group-major rows of a
grouped layer get the buffer they need, which costs whoever writes it nothing; the rest reads channels_last maps. dgrad and
wgrad are rows of their own: the bare pass, ours against cuDNN's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from alexnet_kernels import reference
from alexnet_kernels.geometry import Conv
from alexnet_kernels.kernels import conv as kernel
from alexnet_kernels.ops._choice import PASSES, Facts
from alexnet_kernels.profiling import timer

from . import choose
from .baselines import Call, Contender, contenders
from .cases import Problem, Tensors, Unit, precision, units
from .rows import Row, measure_builders, measure_problem, row_of, tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("batch_tile", "pixel_pair", "group_major", "pointer_rows")
LAYERS = ("conv3", "conv2", "conv4", "conv5")  # the first has no groups and no channels to spare: the plainest question
CASES = [("bf16", 256), ("tf32", 256), ("bf16", 128), ("bf16", 1024), ("bf16", 32), ("bf16", 1)]


def _problem(layer: str, track: str, batch: int) -> Problem:
    unit = next(u for u in units("paper") if u.kind == "conv+relu" and u.facts[0].name == layer)
    return Problem(unit, "forward", track, batch, DEVICE)


PROBLEMS = [_problem(layer, track, batch) for track, batch in CASES for layer in LAYERS]
QUESTIONS = [
    (run, problem) for case in zip(*[iter(PROBLEMS)] * len(LAYERS), strict=True) for run in PASSES for problem in case
]


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


def facts_of(run: str, problem: Problem) -> Facts:
    """A pass of a layer's convolution, without bias and ReLU, as ``ops`` sees it."""
    op, unit = problem.unit.op(Conv), problem.unit
    assert isinstance(op, Conv)
    weight = (unit.output[0], unit.input[0] // op.groups, op.kernel, op.kernel)
    numbers = ((op.stride,) * 2, (op.padding,) * 2, (1, 1), op.groups)
    dtype = problem.track if problem.track == "tf32" else str(problem.dtype)[6:]
    return Facts(run, dtype, True, (problem.batch, *unit.input), weight, *numbers, False)  # type: ignore[arg-type]


def gradient_builders(facts: Facts, sets: list[tuple[Tensor, ...]]) -> dict[str, Callable[[], list[Call]]]:
    """A gradient by us, and by cuDNN in both layouts, whole and tower by tower."""
    ways = {"ours triton": ("triton", True), "cudnn channels_last": ("cudnn", True), "cudnn nchw": ("cudnn", False)}
    if facts.groups > 1:
        ways |= {
            f"{name.replace(' ', ' split towers ')}": ("cudnn split", at) for name, (_, at) in list(ways.items())[1:]
        }

    def build(way: str, last: bool) -> list[Call]:
        laid = sets if last else [tuple(t.contiguous() for t in tensors) for tensors in sets]
        return [partial(choose.call, facts, way, *tensors) for tensors in laid]

    return {name: partial(build, *how) for name, how in ways.items()}


def gradient_truth(facts: Facts, x: Tensor, weight: Tensor, dz: Tensor) -> Tensor:
    mask = (facts.run == "dgrad", facts.run == "wgrad", False)
    numbers = (facts.stride, facts.padding, facts.dilation, facts.groups)
    found = reference.conv2d_backward(dz.double(), x.double(), weight.double(), None, *numbers, mask)
    return found[0] if mask[0] else found[1]


def measure_gradient(run: str, problem: Problem, seconds: float, samples: int, sample_ms: float) -> Row:
    """One pass alone; operations are the forward's, bytes each of input, weight and gradient of the output once."""
    alone = replace(problem, unit=Unit(problem.unit.variant, problem.unit.facts[0].name, problem.unit.facts[:1]))
    facts, device = facts_of(run, problem), torch.device(problem.device)
    row = row_of(alone) | {"case": alone.id.replace("/forward/", f"/{run}/"), "pass": run}
    with precision(problem.track):
        first = choose.tensors(facts, device)
        copies = row["buffer sets"] = timer.rotation(choose.bytes_read(facts, *first), device)
        sets = [first, *(choose.tensors(facts, device) for _ in range(copies - 1))]
        exact = (gradient_truth(facts, *sets[0][:3]),)
        limit = tolerance(replace(alone, run="backward"))
        limits = {"seconds": seconds, "samples": samples, "sample_ms": sample_ms}
        measure_builders(row, gradient_builders(facts, sets), exact, limit, device, **limits)
    return row


def measure_pass(run: str, problem: Problem, **limits: float) -> Row:
    if run == "forward":
        row = measure_problem(problem, chosen=chosen(problem), **limits)  # type: ignore[arg-type]
        return row | {"case": f"{problem.id}/forms"}
    return measure_gradient(run, problem, **limits)  # type: ignore[arg-type]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: Triton has nothing to compile for on a CPU")
@pytest.mark.parametrize(("run", "problem"), QUESTIONS, ids=lambda part: part if isinstance(part, str) else part.id)
def test_pass(run: str, problem: Problem, collect, budget) -> None:
    limits = {"seconds": budget.seconds, "samples": budget.samples, "sample_ms": budget.sample_ms}
    row = collect(lambda: measure_pass(run, problem, **limits))
    ours = {name: entry for name, entry in row["contenders"].items() if name.startswith("ours")}
    assert all(entry["status"] == "ok" for entry in ours.values()), ours
