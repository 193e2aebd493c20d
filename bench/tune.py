"""``make tune``: the fastest configuration of each Triton kernel on this GPU. Which, from what: ``tune_cases.py``.

    python -m bench.tune [--budget SECONDS] [--dry-run] [--work DIR]

1. Every candidate is compiled, in parallel processes, for this GPU's architecture.
2. One that spills, or needs more shared memory or registers than there are, is dropped before anything runs.
3. The rest are checked against fp64 and timed, taking turns, on the network's own shapes; the smallest geometric mean wins.

What was compiled and timed is kept in DIR after each step, so that a second run goes on where the first ended; a change of
the kernels' sources, of the GPU or of the compiler begins anew. Kernels that nobody got to keep their built-in
configurations. Exits 0, 1 when no kernel could be tuned, 3 without a GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels._files import write_text
from alexnet_kernels.kernels import _compile, _launch, conv

from .tune_cases import FAMILIES, IMAGES, KERNELS, Case

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # a block may ask for
REGISTERS = 65_536  # of a multiprocessor


@dataclass(frozen=True)
class Candidate:
    """A configuration, any dataclass, for the kernel ``family.name``."""

    kernel: str
    config: Any

    @property
    def id(self) -> str:
        return f"{self.kernel} " + " ".join(f"{name}={value}" for name, value in asdict(self.config).items())

    @property
    def place(self) -> tuple[Any, str]:
        """The kernel's module, and its name there."""
        family, name = self.kernel.split(".")
        return FAMILIES[family], name


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a candidate: the worst over its cases."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    error: str = ""


def built_in(kernel: str) -> Candidate:
    """What the kernel runs with where nothing was tuned."""
    module, name = Candidate(kernel, None).place
    return Candidate(kernel, KERNELS[kernel].default or module.CONFIGS[name])


def candidates() -> tuple[Candidate, ...]:
    """All of them, the built-in configuration of each kernel first."""
    found: list[Candidate] = []
    for kernel, row in KERNELS.items():
        default = built_in(kernel)
        found += [default, *(Candidate(kernel, config) for config in row.configs if config != default.config)]
    return tuple(found)


def cases(kernel: str, device: str = "meta") -> Iterator[Case]:
    return KERNELS[kernel].cases(kernel.split(".")[1], device)


def plans(candidate: Candidate) -> list[_launch.Launch]:
    """The candidate's launches, planned on tensors without memory."""
    with instead(candidate):
        return [launch for case in cases(candidate.kernel) for launch in case.launches()]


@contextlib.contextmanager
def instead(candidate: Candidate) -> Iterator[None]:
    """The candidate's configuration as if the GPU's table named it, and nothing else."""
    module, name = candidate.place
    family, before = candidate.kernel.split(".")[0], module.tuned
    module.tuned = lambda asked, *_: {name: candidate.config} if asked == family else {}
    conv.tile_of.cache_clear()  # it remembers what it found
    try:
        yield
    finally:
        module.tuned = before
        conv.tile_of.cache_clear()


# ------------------------------------------------------------------------------------------------------------- compiling


def compile_candidate(candidate: Candidate, arch: int) -> Compiled:
    """For an architecture that need not be here; runs in a process of its own."""
    worst = Compiled(0, 0, 0)
    try:
        for launch in plans(candidate):
            one = _compile.compile_launch(launch, arch)
            worst = Compiled(*(max(a, b) for a, b in zip(_numbers(worst), _numbers(one), strict=True)))
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Triton wraps the reason once for each function that it is in
            cause = cause.__cause__
        return Compiled(0, 0, 0, f"{type(cause).__name__}: {str(cause)[:200]}")
    return worst


def _numbers(compiled: Compiled | _compile.Compiled) -> tuple[int, int, int]:
    return compiled.registers, compiled.spill_bytes, compiled.shared_bytes


def compile_all(
    work: Iterable[Candidate], arch: int, seconds: float, workers: int | None = None
) -> Iterator[tuple[Candidate, Compiled]]:
    """Candidates as they are done, on all cores; those that ``seconds`` do not suffice for are not begun."""
    deadline = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    environment = os.environ.pop("TRITON_INTERPRET", None)  # an interpreted function cannot be compiled
    pool = concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context)
    try:
        futures = {pool.submit(compile_candidate, candidate, arch): candidate for candidate in work}
        for future in concurrent.futures.as_completed(futures, timeout=max(0.0, deadline - time.monotonic())):
            yield futures[future], future.result()
    except concurrent.futures.TimeoutError:
        return
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment


def why_pruned(candidate: Candidate, compiled: Compiled, arch: int) -> str | None:
    """Why a candidate is not worth running, by what the compiler says alone."""
    if compiled.error:
        return f"does not compile: {compiled.error}"
    if compiled.spill_bytes:
        return f"spills {compiled.spill_bytes} bytes"
    limit = SHARED_BYTES.get(arch, min(SHARED_BYTES.values()))
    if compiled.shared_bytes > limit:
        return f"needs {compiled.shared_bytes} bytes of shared memory, {limit} are allowed"
    registers = compiled.registers * 32 * candidate.config.num_warps
    if registers > REGISTERS:
        return f"needs {registers} registers, a multiprocessor has {REGISTERS}"
    return None


# --------------------------------------------------------------------------------------------------------------- running


def run_kernel(kernel: str, chosen: list[Candidate]) -> dict[str, float | str]:
    """Candidates of one kernel by id: milliseconds, the geometric mean over the cases, or what is wrong with them."""
    from alexnet_kernels.profiling.timer import measure

    logs: dict[str, list[float]] = {c.id: [] for c in chosen}
    wrong: dict[str, str] = {}
    for case in cases(kernel, "cuda"):
        truth = case.truth()
        calls: dict[str, list[Callable[[], object]]] = {}
        for candidate in chosen:
            if candidate.id in wrong:
                continue
            with instead(candidate):
                launches = case.launches()
            reason = why_wrong(case, launches, truth)
            if reason is None:
                calls[candidate.id] = [partial(run_all, launches)]
            else:
                wrong[candidate.id] = reason
        if not calls:
            break
        for name, timing in measure(calls, device=torch.device("cuda"), samples=50).items():
            logs[name].append(math.log(timing.median))
    return {c.id: wrong[c.id] if c.id in wrong else math.exp(sum(logs[c.id]) / len(logs[c.id])) for c in chosen}


def run_all(launches: Sequence[_launch.Launch]) -> None:
    for launch in launches:
        _launch.run(launch)


def why_wrong(case: Case, launches: Sequence[_launch.Launch], truth: Sequence[torch.Tensor]) -> str | None:
    """Why launches must not be chosen however fast they are, or None; what they write was poisoned before."""
    try:
        for out in case.written:
            out.fill_(math.nan if out.is_floating_point() else 255)
        run_all(launches)
        allowed = 4 * max(torch.finfo(case.dtype).eps, case.eps)
        for out, exact in zip(case.written, truth, strict=True):
            error = float((out[:IMAGES].double() - exact).norm() / exact.norm())
            if not error <= (allowed if out.is_floating_point() else 0):
                return f"wrong: relative error {error:.2e} in {out.dtype}"
    except Exception as failure:
        return f"{type(failure).__name__}: {str(failure)[:200]}"
    return None


# ---------------------------------------------------------------------------------------------------------------- tuning


def sources_digest() -> str:
    """Of the kernels' sources and the compiler: what was found with others does not count."""
    import triton

    folder = Path(_launch.__file__).parent
    text = triton.__version__.encode() + b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(text).hexdigest()[:12]


@dataclass
class State:
    """What is known so far, kept on disk."""

    path: Path
    digest: str
    gpu: str
    compiled: dict[str, dict[str, Any]]
    timed: dict[str, float | str]

    @classmethod
    def load(cls, path: Path, digest: str, gpu: str) -> State:
        fresh = cls(path, digest, gpu, {}, {})
        if not path.exists():
            return fresh
        try:
            found = json.loads(path.read_text())
            if (found["digest"], found["gpu"]) != (digest, gpu):
                print(f"{path}: of other sources or another GPU, begun anew")
                return fresh
            return cls(path, digest, gpu, dict(found["compiled"]), dict(found["timed"]))
        except (ValueError, KeyError, TypeError) as error:
            print(f"{path} is not a tuning state ({error}), begun anew")
            return fresh

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps({**asdict(self), "path": self.path.name}, indent=1) + "\n")


@dataclass(frozen=True)
class Tuned:
    kernels: dict[str, Any]
    pruned: dict[str, str]
    left_out: tuple[str, ...]


def tune(
    state: State,
    arch: int,
    budget: float,
    *,
    work: tuple[Candidate, ...] | None = None,
    compiler: Callable[[list[Candidate], int, float], Iterable[tuple[Candidate, Compiled]]] = compile_all,
    runner: Callable[[str, list[Candidate]], Mapping[str, float | str]] = run_kernel,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Compile, prune, run and choose, within ``budget`` seconds, of which compiling may take 60 %."""
    work = candidates() if work is None else work
    begin = clock()
    missing = [c for c in work if c.id not in state.compiled]
    for candidate, compiled in compiler(missing, arch, 0.6 * budget) if missing else ():
        state.compiled[candidate.id] = asdict(compiled)
        state.save()
    pruned: dict[str, str] = {}
    left_out = [f"{c.id}: not compiled" for c in work if c.id not in state.compiled]
    chosen: dict[str, Any] = {}
    for kernel in dict.fromkeys(c.kernel for c in work):
        known = [c for c in work if c.kernel == kernel and c.id in state.compiled]
        reasons = {c.id: why_pruned(c, Compiled(**state.compiled[c.id]), arch) for c in known}
        pruned |= {name: why for name, why in reasons.items() if why}
        alive = [c for c in known if reasons[c.id] is None]
        if any(c.id not in state.timed for c in alive):
            if clock() - begin >= budget:
                left_out.append(f"{kernel}: not timed")
                continue
            try:
                state.timed.update(runner(kernel, alive))
            except Exception as error:
                left_out.append(f"{kernel}: {type(error).__name__}: {str(error)[:200]}")
                continue
            state.save()
        pruned |= {c.id: str(state.timed[c.id]) for c in alive if isinstance(state.timed[c.id], str)}
        right = [c for c in alive if not isinstance(state.timed[c.id], str)]
        if right:
            chosen[kernel] = min(right, key=lambda c: float(state.timed[c.id])).config
    return Tuned(chosen, pruned, tuple(left_out))


def known_table(path: Path) -> dict[str, Any]:
    """What a GPU's table already says, of which each part of ``make tune`` writes its own; nothing where it cannot be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def table(tuned: Tuned, state: State) -> dict[str, Any]:
    """What ``kernels/_launch.py`` reads, and beside it the measurement that it rests on."""
    kernels: dict[str, dict[str, Any]] = {}
    for kernel, config in tuned.kernels.items():
        family, name = kernel.split(".")
        kernels.setdefault(family, {})[name] = asdict(config)
    return {
        "schema": 1,
        "gpu": state.gpu,
        "digest": state.digest,
        "torch": torch.__version__,
        "kernels": kernels,
        "milliseconds": {name: value for name, value in state.timed.items() if not isinstance(value, str)},
        "pruned": tuned.pruned,
        "left out": list(tuned.left_out),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=os.environ.get("TUNE_SECONDS") or 480, help="seconds")
    parser.add_argument("--work", type=Path, default=Path("bench/out"), help="where the unfinished state is kept")
    parser.add_argument("--dry-run", action="store_true", default=os.environ.get("GPU_DRY_RUN") == "1")
    arguments = parser.parse_args(argv)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    target = _launch.table_of(gpu) if gpu else _launch.table_of("<gpu>").with_name("<gpu>.json")
    if arguments.dry_run:
        work = candidates()
        print(f"budget {arguments.budget:.0f} s, {os.cpu_count()} processes compile, sources {sources_digest()}")
        for kernel in KERNELS:
            mine = [c for c in work if c.kernel == kernel]
            print(
                f"{kernel:32} {len(mine):3} candidates, {len(plans(mine[0])):2} cases  built-in: {mine[0].id.split(' ', 1)[1]}"
            )
        print(f"state   {arguments.work / 'tune.json'}\nwrites  {target}")
        return 0
    if gpu is None:
        print("no CUDA device is visible: nothing to tune")
        return 3
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    state = State.load(arguments.work / "tune.json", sources_digest(), gpu)
    tuned = tune(state, arch, arguments.budget)
    for name, why in tuned.pruned.items():
        print(f"pruned    {name}: {why}")
    for line in tuned.left_out:
        print(f"left out  {line}")
    if not tuned.kernels:
        print("no kernel could be tuned: nothing is written")
        return 1
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps({**known_table(target), **table(tuned, state)}, indent=1) + "\n")
    for kernel, config in tuned.kernels.items():
        name, default = Candidate(kernel, config).id, built_in(kernel).id
        print(f"{name:60} {state.timed[name]:.4f} ms, built-in {state.timed.get(default, 'not measured')}")
    print(f"wrote {target}; what was left out can be had by running this again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
