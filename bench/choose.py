"""``make tune``, second part: the quickest way to run each pass of AlexNet's convolutions on this GPU.

    python -m bench.choose [--budget SECONDS] [--dry-run] [--work DIR]

Forward, dgrad and wgrad of every convolution, by precision and batch, most important ones first: Triton, cuDNN, and cuDNN for
each group by itself are held to fp64 and timed, taking turns, with the passes around them that each needs. Another way than
cuDNN is chosen where its lead is certain, that is, where the 95 % interval of the ratio leaves 1 out.

What was measured is kept in DIR after each case, so that a second run goes on where the first ended; other sources, another
GPU, torch or cuDNN begin anew. Exits 0, 1 when nothing could be measured, 3 without a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import geometry, reference
from alexnet_kernels._files import write_text
from alexnet_kernels.kernels import _launch
from alexnet_kernels.ops import _choice
from alexnet_kernels.ops import _conv_ways as ways
from alexnet_kernels.ops._choice import PASSES, WAYS, Facts
from alexnet_kernels.profiling.timer import Timing, measure, ratio, rotation

from .tune import known_table, sources_digest

BATCHES = (256, 128, 1024, 64, 32, 1)  # in order of importance, as dtypes are
DTYPES = ("bfloat16", "tf32", "float16", "tf32x3")
VARIANTS = ("paper", "torchvision")
_CHUNK = 64  # images that fp64 is asked for at once
Case = Callable[[], object]


def cases() -> Iterator[Facts]:
    """Every case once, the most important one first. The image needs no gradient."""
    seen = set()
    for batch, dtype in product(BATCHES, DTYPES):
        for channels, size, op, normed in convolutions():
            weight = (op.out_channels, channels // op.groups, op.kernel, op.kernel)
            numbers = ((op.stride,) * 2, (op.padding,) * 2, (1, 1), op.groups)
            for run in PASSES:
                after = run == "forward" and not normed
                facts = Facts(run, dtype, True, (batch, channels, *size), weight, *numbers, after)
                if (run != "dgrad" or channels != 3) and (facts.key, batch) not in seen:
                    seen.add((facts.key, batch))
                    yield facts


def convolutions() -> Iterator[tuple[int, tuple[int, int], geometry.Conv, bool]]:
    """Of the networks and of one tower of theirs: channels and sides of the input, the operation, and whether a response
    normalisation follows, which then has bias and ReLU."""
    for name in VARIANTS:
        for layer, normed in _convolutions_of(name):
            yield layer.input[0], layer.input[1:], layer.op, normed
    for layer, normed in _convolutions_of(VARIANTS[0]):
        tower = replace(layer.op, out_channels=layer.op.out_channels // geometry.TOWERS, groups=1)
        yield layer.input[0] // layer.op.groups, layer.input[1:], tower, normed


def _convolutions_of(name: str) -> Iterator[tuple[geometry.LayerFacts, bool]]:
    variant = geometry.variant(name)
    normed = {group.name: any(isinstance(op, geometry.LRN) for op in group.ops) for group in variant.groups}
    for layer in variant.layers:
        if isinstance(layer.op, geometry.Conv):
            yield layer, normed[layer.group]


def id_of(facts: Facts) -> str:
    return f"{facts.run} {facts.dtype} {facts.geometry} batch {facts.batch}"


# ------------------------------------------------------------------------------------------------------------- measuring


def tensors(facts: Facts, device: torch.device) -> tuple[Tensor, ...]:
    """``x`` like the output of a ReLU, weights and bias by He's rule, and a gradient; channels_last."""
    dtype = getattr(torch, facts.dtype, torch.float32)
    spread = math.sqrt(2 / math.prod(facts.weight[1:]))
    x = torch.randn(facts.shape, device=device).relu_()
    weight = torch.randn(facts.weight, device=device) * spread
    dz = torch.randn((facts.batch, facts.weight[0], *facts.outputs), device=device)
    maps = [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight, dz)]
    return *maps, torch.randn(facts.weight[0], device=device).to(dtype)


def call(facts: Facts, way: str, x: Tensor, weight: Tensor, dz: Tensor, bias: Tensor) -> Tensor:
    """One pass in one way."""
    precision = facts.dtype if facts.dtype.startswith("tf32") else None
    args = (facts.stride, facts.padding, facts.dilation, facts.groups, precision)
    after = (bias if facts.epilogue else None, facts.epilogue)
    split = way == "cudnn split"
    if way == "triton":
        if facts.run == "forward":
            return ways.triton_forward(x, weight, *after, *args)
        return (ways.triton_dgrad if facts.run == "dgrad" else ways.triton_wgrad)(dz, x, weight, *args)
    if facts.run == "forward":
        y = ways.convolution(x, weight, args, split)  # type: ignore[arg-type]
        return ways.epilogue(y.contiguous(memory_format=torch.channels_last), *after)
    mask = (facts.run == "dgrad", facts.run == "wgrad")
    found = ways.gradients(dz, x, weight, args, mask, split)[mask.index(True)]  # type: ignore[arg-type]
    assert found is not None
    return found


def bytes_read(facts: Facts, x: Tensor, weight: Tensor, dz: Tensor, bias: Tensor) -> int:
    """What a pass reads of its set of tensors: two of the three."""
    read = {"forward": (x, weight), "dgrad": (dz, weight), "wgrad": (dz, x)}[facts.run]
    return sum(t.nbytes for t in read)


def truth(facts: Facts, x: Tensor, weight: Tensor, dz: Tensor, bias: Tensor) -> Tensor:
    """In fp64, a few images at a time; of forward and dgrad the first of them."""
    numbers, w = (facts.stride, facts.padding, facts.dilation, facts.groups), weight.double()
    if facts.run == "forward":
        return reference.conv2d(x[:2].double(), w, bias.double() if facts.epilogue else None, facts.epilogue, *numbers)
    mask = (facts.run == "dgrad", facts.run == "wgrad", False)
    if mask[0]:
        return reference.conv2d_backward(dz[:2].double(), x[:2].double(), w, None, *numbers, mask)[0]
    total = torch.zeros_like(w)
    for part, g in zip(x.split(_CHUNK), dz.split(_CHUNK), strict=True):
        total += reference.conv2d_backward(g.double(), part.double(), w, None, *numbers, mask)[1]
    return total


def run_case(facts: Facts, device: torch.device, seconds: float = 5.0) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings of the ways that are right, and what is wrong with the others: no more than 1.5 times cuDNN's error is right."""
    first = tensors(facts, device)
    exact = truth(facts, *first)
    errors: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for way in WAYS if facts.groups > 1 else WAYS[:2]:
        try:
            got = call(facts, way, *first)[: len(exact)].double()
            errors[way] = float((got - exact).norm() / exact.norm())
        except Exception as failure:
            wrong[way] = f"{type(failure).__name__}: {str(failure)[:200]}"
    allowed = 1.5 * errors.get("cudnn", math.inf)
    for way, error in list(errors.items()):
        if not error <= allowed:
            wrong[way] = f"wrong: relative error {error:.2e}, cuDNN's is {errors['cudnn']:.2e}"
            del errors[way]
    sets = [first]
    sets += [tensors(facts, device) for _ in range(rotation(bytes_read(facts, *first), device) - 1)]
    calls = {way: [lambda way=way, s=s: call(facts, way, *s) for s in sets] for way in errors}
    return measure(calls, device=device, samples=50, seconds=seconds), wrong


def decide(timings: dict[str, Timing]) -> str:
    """The way to go: cuDNN unless another's lead is certain."""
    best = "cudnn"
    for way in ("cudnn split", "triton"):
        if way in timings and ("cudnn" not in timings or ratio(timings[best], timings[way]).verdict == "faster"):
            best = way
    return best


# -------------------------------------------------------------------------------------------------------------- the table


def digest() -> str:
    """Of the kernels' sources, the compiler and the libraries: what was measured with others does not count."""
    versions = f"{sources_digest()} {torch.__version__} {torch.backends.cudnn.version()}"
    return hashlib.sha256(versions.encode() + Path(ways.__file__).read_bytes()).hexdigest()[:12]


def load(path: Path, stamp: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run measured, by case; nothing where its ``stamp`` is another."""
    try:
        found = json.loads(path.read_text())
        if all(found[name] == value for name, value in stamp.items()):
            return dict(found["rows"])
        print(f"{path}: of other sources or another GPU, begun anew")
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        print(f"{path} holds no measurements ({error}), begun anew")
    return {}


def choose(
    rows: dict[str, Any],
    budget: float,
    save: Callable[[], None],
    runner: Callable[[Facts], tuple[dict[str, Timing], dict[str, str]]],
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Add what is missing to ``rows`` within ``budget`` seconds, saved after each; the cases that were left out, with reasons."""
    begin, left_out = clock(), []
    for facts in cases():
        name = id_of(facts)
        if name in rows:
            continue
        if clock() - begin >= budget:
            left_out.append(f"{name}: out of time")
            continue
        try:
            timings, wrong = runner(facts)
        except Exception as error:
            left_out.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if not timings:
            left_out.append(f"{name}: {wrong}")
            continue
        row = _choice.row_of(facts, decide(timings), {way: round(t.median, 5) for way, t in timings.items()})
        rows[name] = {**row, "wrong": wrong} if wrong else row
        save()
    return left_out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.choose", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=os.environ.get("TUNE_SECONDS") or 480, help="seconds")
    parser.add_argument("--work", type=Path, default=Path("bench/out"), help="where the unfinished state is kept")
    parser.add_argument("--dry-run", action="store_true", default=os.environ.get("GPU_DRY_RUN") == "1")
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        for facts in cases():
            print(id_of(facts))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device is visible: nothing to choose between")
        return 3
    gpu, device = torch.cuda.get_device_name(), torch.device("cuda", torch.cuda.current_device())
    path, target = arguments.work / "choose.json", _launch.table_of(gpu)
    stamp = {"digest": digest(), "gpu": gpu}
    rows = load(path, stamp)

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**stamp, "rows": rows}, indent=1) + "\n")

    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        left_out = choose(rows, arguments.budget, save, lambda facts: run_case(facts, device))
    for line in left_out:
        print(f"left out  {line}")
    if not rows:
        print("nothing could be measured: nothing is written")
        return 1
    versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "digest": stamp["digest"]}
    target.parent.mkdir(parents=True, exist_ok=True)
    table = {**known_table(target), "gpu": gpu, "choices": {**versions, "conv2d": list(rows.values())}}
    write_text(target, json.dumps(table, indent=1) + "\n")
    for name, row in rows.items():
        times = ", ".join(f"{way} {ms:.4f}" for way, ms in row["milliseconds"].items())
        print(f"{name:110} {row['way']:12} {times}")
    print(f"wrote {target}; what was left out can be had by running this again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
