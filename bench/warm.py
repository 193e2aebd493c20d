"""Calls each of our contenders once, on all cores side by side: what it compiles is in Triton's cache when it is measured.

    python -m bench.warm [--list]

A kernel compiles for seconds on one core, and a benchmark runs its rows one after the other: without this most of a short
budget would go there. Which contenders: those of the first rows of each benchmark in ``make gpu``. One that fails is named
and left to its benchmark, which says more. Exits 0, or 3 without a GPU.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial

import torch

from . import choose, test_conv, test_model, test_optim
from .baselines import OURS, Contender
from .cases import Problem, precision, problems, tensors
from .conftest import BUDGETS

TRACKS = ("bf16", "tf32")  # those that a short run gets to


def jobs() -> dict[str, Callable[[], object]]:
    """By name, the longest to compile first."""
    found: dict[str, Callable[[], object]] = {}
    for run, problem in test_conv.QUESTIONS:
        if problem.batch != 256 or problem.track not in TRACKS:
            continue
        if run != "forward":
            found[f"{run} {problem.id}"] = partial(_gradient, run, problem)
            continue
        for contender in test_conv.OURS:
            if contender.why_not(problem) is None:
                found[f"{problem.id} {contender.name}"] = partial(_contender, problem, contender)
    for run in test_model.RUNS:
        whole = test_model.Whole("paper", run, "bf16", 256)
        found[f"model {whole.id}"] = partial(_network, whole)
    for problem in problems(test_conv.DEVICE, tracks=TRACKS, batches=(256,)):
        for contender in OURS:
            if contender.why_not(problem) is None:
                found[f"{problem.id} {contender.name}"] = partial(_contender, problem, contender)
    for track in ("bf16", "fp32"):
        found[f"optimiser {track}"] = partial(_step, track)
    return found


def _contender(problem: Problem, contender: Contender) -> None:
    with precision(problem.track):
        contender.build(problem, tensors(problem))()


def _gradient(run: str, problem: Problem) -> None:
    facts = test_conv.facts_of(run, problem)
    choose.call(facts, "triton", *choose.tensors(facts, torch.device(problem.device)))


def _network(whole: test_model.Whole) -> None:
    with precision(whole.track):
        builders = test_model._builders(whole, test_model._weights(whole), *test_model._inputs(whole), BUDGETS["quick"])
        for name, build in builders.items():
            if name.startswith("ours"):
                for call in build():
                    call()


def _step(track: str) -> None:
    test_optim._ours(track)[0]()


def warm(name: str) -> str | None:
    """Why ``name`` did not run, or None."""
    try:
        jobs()[name]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def main(argv: list[str] | None = None) -> int:
    names = list(jobs())
    if (sys.argv[1:] if argv is None else argv) == ["--list"]:
        print("\n".join(names))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device is visible: nothing to compile for")
        return 3
    context, failed = multiprocessing.get_context("spawn"), 0
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, len(names)), mp_context=context) as executor:
        for name, why in zip(names, executor.map(warm, names), strict=True):
            if why is not None:
                failed += 1
                print(f"not warm  {name}: {why}", flush=True)
    print(f"{len(names) - failed} of {len(names)} contenders are warm")
    return 0


if __name__ == "__main__":
    sys.exit(main())
