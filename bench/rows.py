"""From a problem to a row: build the contenders, check them, time them in turns, watch the clock, name the best of both sides."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels.comparison.run import environment
from alexnet_kernels.profiling import results, timer

from . import baselines
from .baselines import Call, Contender
from .cases import Problem, precision, tensors

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
VARIED = 0.03  # an SM clock that moved by more than this during a case is flagged
_EPS = {"fp32": 2**-23, "tf32": 2**-10, "fp16": 2**-10, "bf16": 2**-7, "amp": 2**-7}


def tolerance(problem: Problem) -> float:
    """The largest relative L2 error that is still right: a few roundings; the root of one where a rounding can move a
    gradient to another place (the kink of a ReLU, the largest of a window)."""
    kinks = problem.run == "backward" and ("relu" in problem.unit.kind or "pool" in problem.unit.kind)
    depth = max((f.op.macs_per_neuron(f.input) for f in problem.unit.facts if f.macs), default=1)
    if problem.run == "backward":  # a weight's gradient is a sum over images and pixels
        depth = max(depth, problem.batch * math.prod(problem.unit.output[1:]))
    few = 4 * _EPS[problem.track] + 2**-23 * depth**0.5
    return 3 * _EPS[problem.track] ** 0.5 if kinks else few


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[Row]:
    """Clock and power of a GPU during the block, in the dictionary once it has ended; empty without a GPU or NVML."""
    seen: Row = {}
    monitor: Any = None
    if device.type == "cuda":
        try:
            from alexnet_kernels.profiling import GpuMonitor

            monitor = GpuMonitor([device], hz=50).__enter__()
        except Exception as error:
            seen["note"] = f"not watched: {type(error).__name__}: {error}"
    try:
        yield seen
    finally:
        if monitor is not None:
            torch.cuda.synchronize(device)
            monitor.__exit__(None, None, None)
            with contextlib.suppress(Exception):
                seen.update(_clocks(monitor.summary()))


def _clocks(summary: Any) -> Row:
    found: Row = {}
    for series in summary.series.values():
        columns = series.columns
        for name in ("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c"):
            values = [v for v in columns.get(name, ()) if not math.isnan(v)]
            if values:
                found[name] = {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
    clock = found.get("sm_clock_mhz")
    if clock and clock["max"]:
        found["clock varied"] = (clock["max"] - clock["min"]) / clock["max"] > VARIED
    if summary.notes:
        found["note"] = "; ".join(summary.notes)
    return found


def row_of(problem: Problem) -> Row:
    """What a row says of a problem, before anybody has run it."""
    return {
        "section": "layers",
        "case": problem.id,
        "variant": problem.unit.variant,
        "unit": problem.unit.name,
        "kind": problem.unit.kind,
        "pass": problem.run,
        "track": problem.track,
        "batch": problem.batch,
        "device": torch.device(problem.device).type,
        "flops": problem.flops,
        "bytes": problem.bytes,
        "contenders": {},
        "left out": {},
    }


def measure_problem(
    problem: Problem,
    *,
    seconds: float,
    samples: int,
    sample_ms: float,
    compiled: bool = True,
    autotune: bool = True,
    cold: bool = True,
    chosen: Sequence[Contender] | None = None,
) -> Row:
    """One row. A contender that cannot be built, or is wrong before or after timing, has no time in it."""
    device = torch.device(problem.device)
    found, left_out = baselines.contenders(problem, compiled=compiled, autotune=autotune)
    contenders = list(chosen) if chosen is not None else found
    row = row_of(problem) | {"left out": left_out}
    with precision(problem.track):
        data = tensors(problem)
        exact = baselines.truth(problem, data)
        copies = timer.rotation(problem.bytes_read, device) if cold else 1
        row["buffer sets"] = copies

        def sets(contender: Contender) -> Callable[[], list[Call]]:
            return lambda: [contender.build(problem, data.copy() if i else data) for i in range(copies)]

        builders = {contender.name: sets(contender) for contender in contenders}
        measure_builders(
            row, builders, exact, tolerance(problem), device, seconds=seconds, samples=samples, sample_ms=sample_ms
        )
    return row


def measure_builders(
    row: Row,
    builders: Mapping[str, Callable[[], list[Call]]],
    exact: Sequence[Tensor],
    limit: float,
    device: torch.device,
    *,
    seconds: float,
    samples: int,
    sample_ms: float,
) -> None:
    """Build, check, time and check again; ``row`` gets an entry for each contender, and the best of both sides."""
    row["tolerance"] = limit
    if any(name.startswith(baselines.SLOW_TO_BUILD) for name in builders):
        baselines.forget_compiled()
    calls: dict[str, list[Call]] = {}
    for name, build in builders.items():
        entry = row["contenders"][name] = {"status": "ok"}
        try:
            begin = time.perf_counter()
            made = build()
            built = time.perf_counter()
            entry["error"] = timer.relative_error(made[0], exact)
            entry["build s"] = round(built - begin, 3)
            entry["first call s"] = round(time.perf_counter() - built, 3)
            if entry["error"] <= limit:
                calls[name] = made
            else:
                entry["status"] = "wrong"
        except Exception as error:
            entry.update(status="failed", reason=f"{type(error).__name__}: {str(error)[:300]}")
    if not calls:
        return
    with watched(device) as seen:
        timings = timer.measure(calls, device=device, samples=samples, sample_ms=sample_ms, seconds=seconds)
    row["watched"] = seen
    for name, timing in timings.items():
        entry = row["contenders"][name]
        entry["error after"] = timer.relative_error(calls[name][0], exact)
        if entry["error after"] <= limit:
            entry.update(described(timing))
        else:
            entry["status"] = "wrong"
    settle(row, {name: t for name, t in timings.items() if row["contenders"][name]["status"] == "ok"})


def best_of(measurements: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The least that each contender took in any of several measurements: what disturbed one of them counts for nobody."""
    return {name: min(measured[name] for measured in measurements) for name in measurements[0]}


def described(timing: timer.Timing) -> Row:
    return {
        "milliseconds": timing.median,
        "iqr": timing.iqr,
        "p5": timing.percentile(5),
        "p95": timing.percentile(95),
        "samples": len(timing.samples),
        "how": timing.how,
    }


def settle(row: Row, timings: Mapping[str, Any]) -> None:
    """Name the best of each side and their ratio, baseline / ours: over 1, ours is faster."""
    ours = {n: t for n, t in timings.items() if n.startswith("ours")}
    theirs = {n: t for n, t in timings.items() if not n.startswith("ours")}
    if ours:
        row["ours"] = min(ours, key=lambda n: ours[n].median)
    if theirs:
        row["baseline"] = min(theirs, key=lambda n: theirs[n].median)
    if ours and theirs:
        ratio = timer.ratio(theirs[row["baseline"]], ours[row["ours"]])
        row["ratio"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high, "verdict": str(ratio.verdict)}


def against_ceilings(row: Row, ceilings: Mapping[str, float]) -> Row:
    """Shares of what the device can do: of the matmul of the row's track, of the copy, and of the roofline floor.

    ``ceilings`` are operations a second by track, and bytes a second as ``"copy"``. Only what was measured is used.
    """
    name = row.get("ours") or row.get("baseline")
    if name is None or "flops" not in row or "milliseconds" not in row["contenders"].get(name, {}):
        return {}
    seconds = row["contenders"][name]["milliseconds"] / 1e3
    peak, copy = ceilings.get({"amp": "bf16"}.get(row["track"], row["track"])), ceilings.get("copy")
    found: Row = {"of": name}
    if peak and row["flops"]:
        found["% of matmul"] = 100 * row["flops"] / seconds / peak
    if copy:
        found["% of copy"] = 100 * row["bytes"] / seconds / copy
    if peak and copy:
        found["% of floor"] = 100 * max(row["flops"] / peak, row["bytes"] / copy) / seconds
    return found


def ceilings_of(measured: Sequence[Row]) -> dict[str, float]:
    return {row["ceiling"]: row["per second"] for row in measured if row.get("section") == "ceilings"}


def summary(measured: Sequence[Row]) -> str:
    """A short table: what the device can do, then a line a row with both sides' best by name. Losing rows stay."""
    peaks = ceilings_of(measured)
    lines = [
        f"{row['case']:34} {row['milliseconds']:9.4f} ms  {row['per second']:.4g} {row['unit']}/s"
        for row in measured
        if row.get("section") == "ceilings"
    ]
    for row in measured:
        if row.get("section") not in ("layers", "model", "launch"):
            continue
        head = f"{row['case']:44}"
        bad = [f"{n} {c['status']}" for n, c in row["contenders"].items() if c["status"] != "ok"]
        tail = ("  [" + ", ".join(bad) + "]" if bad else "") + (
            "  CLOCK VARIED" if row.get("watched", {}).get("clock varied") else ""
        )
        if "ratio" not in row:
            lines.append(f"{head} not measured{tail}")
            continue
        ours, best, ratio = row["ours"], row["baseline"], row["ratio"]
        times = row["contenders"]
        share = against_ceilings(row, peaks).get("% of floor")
        lines.append(
            f"{head} {times[ours]['milliseconds']:9.4f} ms {ours} | {times[best]['milliseconds']:9.4f} ms {best} | "
            f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}) {ratio['verdict']}"
            + (f", {share:.0f}% of floor" if share else "")
            + tail
        )
    return "\n".join(lines) + "\n" if lines else "nothing was measured\n"


def digest() -> str:
    """Of the sources that were measured: the package, the benchmarks, and what the compiled libraries are built from."""
    paths = [ROOT / "setup.py", *(ROOT / "alexnet_kernels/kernels/tuned").glob("*.json")]
    paths += [p for folder in ("alexnet_kernels", "bench") for p in (ROOT / folder).rglob("*.py")]
    paths += [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def publish(measured: Sequence[Row], folder: Path, complete: bool = False) -> Path | None:
    """Write ``folder/<gpu or cpu>/<date>-<digest>.json``: all rows, with what they ran on; None where nothing was measured.

    ``complete``: all that the suite has was tried. ``make gpu`` picks what its budget reaches, and leaves a part.

    Raises:
        FileExistsError: a result file is never written again.
    """
    if not measured:
        return None
    cuda = torch.cuda.is_available()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if cuda else [torch.device("cpu")]
    peaks = ceilings_of(measured)
    return results.write(
        folder,
        torch.cuda.get_device_name() if cuda else "cpu",
        datetime.datetime.now(datetime.timezone.utc),
        digest(),
        environment(devices) | _versions(),
        [{**row, "shares": against_ceilings(row, peaks)} for row in measured],
        complete,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("triton", "torchvision"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        with contextlib.suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
            pynvml.nvmlShutdown()
    return found
