"""``make gpu``: all that only a GPU can tell, in one command, without a network: tests, sanitizers, and the benchmarks.

    python -m bench.gpu [--out DIR] [--profile quick|full] [--budget SECONDS] [--only STEP ...] [--dry-run]

The steps run in order of importance, each in a process of its own with a budget; what a step does not use, later ones get.
A step that fails, or that is stopped because its time is over, is reported, what it had measured until then is kept, and the
rest goes on. What was left out is listed. ``gpu.json`` is rewritten after each step.

GPU_PROFILE, GPU_SECONDS and GPU_DRY_RUN=1 are the environment's names for the options. Needs torch, triton, pytest and
pytest-benchmark; nvidia-ml-py, typer, rich and matplotlib for clocks and the comparison. Exits 0, 1 when a step
failed, 3 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
PROFILES = {"quick": 225.0, "full": 525.0}  # seconds in all, starting included
LEAST = 5.0  # seconds: no step begins with fewer


@dataclass(frozen=True)
class Job:
    """What a step's command is made from."""

    profile: str
    seconds: float
    out: Path  # of the run
    scratch: Path  # removed at the end
    rows: Path  # where the step leaves its measurements, a JSON object a line


@dataclass(frozen=True)
class Step:
    """One part of the run. Its commands get equal shares of its time, or run side by side (``together``) for all of it."""

    name: str
    what: str
    seconds: dict[str, float]
    commands: Callable[[Job], list[list[str]]]
    why_not: Callable[[], str | None] = lambda: None
    environment: tuple[tuple[str, str], ...] = ()
    together: bool = False


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _build(job: Job) -> list[list[str]]:
    return [_python("setup.py", "-q", "build_ext", "--inplace")]


def _no_build() -> str | None:
    """Both libraries younger than their sources, or nothing to build them with."""
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    built = [ROOT / "alexnet_kernels" / f"_{name}.abi3.so" for name in ("cpu", "cuda")]
    youngest = max(path.stat().st_mtime for path in sources)
    if all(path.is_file() and path.stat().st_mtime >= youngest for path in built):
        return "built already"
    return None if importlib.util.find_spec("setuptools") else "this Python has no setuptools"


LONGEST, LONGEST_FILE = "test_every_layer_on_a_gpu", "tests/kernels/test_conv_kernel.py"


def _tests(job: Job) -> list[list[str]]:
    """Side by side, for tests on a GPU wait for compilers. Of ``tests/kernels`` what launches: compiling alone needs no GPU."""
    marks = "(gpu or two_gpu) and not slow" if job.profile == "quick" else "gpu or two_gpu"
    slow = [] if job.profile == "quick" else ["--run-slow"]

    def files(pattern: str) -> list[str]:
        return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob(pattern))

    kernels = [*files("kernels/test_*_kernel.py"), "tests/kernels/test_handles.py"]
    parts = [files("test_*.py")[i::2] for i in range(2)] + [["tests/host", "tests/profiling"]]
    parts += [kernels] if job.profile == "quick" else [[file] for file in kernels]
    options = ["-q", "-ra", "-p", "no:cacheprovider", "-m", marks, *slow]
    commands = [_python("-m", "pytest", *part, *options, "-k", f"not {LONGEST}") for part in parts]
    if job.profile == "full":  # 36 layers and types, each of which compiles for half a minute: these four
        layers = [f"{LONGEST} and bf16 and paper and conv{i}" for i in (2, 3, 4, 5)]
        commands += [_python("-m", "pytest", LONGEST_FILE, *options, "-k", layer) for layer in layers]
    return commands


def _bench(file: str, *arguments: str, full: Sequence[str] = ()) -> Callable[[Job], list[list[str]]]:
    def command(job: Job) -> list[list[str]]:
        more = [*arguments, *(full if job.profile == "full" else ())]
        limits = [
            "--rows",
            str(job.rows),
            "--seconds",
            f"{max(1.0, 0.9 * job.seconds - 8):.0f}",
            "--gpu-profile",
            job.profile,
        ]
        options = ["-q", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-quiet"]
        return [_python("-m", "pytest", f"bench/{file}", *options, *limits, *more)]

    return command


def _layers(job: Job) -> list[list[str]]:
    """fc6 and fc7, which come last in a network, first; in full the rest, and two devices."""
    matrices = _bench("test_layers.py", "bench/test_dropout.py", "-k", "(fc6 or fc7) and bf16 and 256")
    if job.profile == "quick":
        return matrices(job)
    rest = "not norm and not conv1 and not fc6 and not fc7"
    others = _bench("test_model.py::test_two_devices", "bench/test_layers.py", "-k", rest)
    half = replace(job, seconds=job.seconds / 2)
    return [*matrices(half), *others(half)]


def _kernels(job: Job) -> list[list[str]]:
    return [_python("-m", "bench.small_cases", "--all-cores"), _python("-m", "bench.warm")]


CHECKS = ("memcheck", "racecheck", "synccheck")


def _sanitizer(job: Job) -> list[list[str]]:
    """The step ``kernels`` has filled Triton's cache: under a sanitizer nothing should be compiled."""
    tool = shutil.which("compute-sanitizer") or "compute-sanitizer"
    cases = _python("-m", "bench.small_cases", "--seconds", f"{max(1.0, 0.8 * job.seconds - 5):.0f}")
    return [[tool, "--tool", check, "--error-exitcode", "9", *cases] for check in CHECKS]


def _no_sanitizer() -> str | None:
    return None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on PATH"


def _compare(job: Job) -> list[list[str]]:
    picture = job.scratch / "noise.png"
    tracks = ("bf16", "fp32") if job.profile == "quick" else ("bf16", "tf32", "fp32")
    return [
        _python("-m", "bench.gpu", "--compare", track, "--rows", str(job.rows), "--picture", str(picture))
        for track in tracks
    ]


# Most important first: is it right, are the convolutions quicker than cuDNN's, the tests, what could the card do, then the
# other kernels, whole networks, and everything else.
STEPS = (
    Step(
        "build",
        "the compiled libraries, as far as this machine can; what it cannot is left out of the rest",
        {"quick": 40, "full": 60},
        _build,
        why_not=_no_build,
        environment=(("ALEXNET_KERNELS_BUILD", "auto"),),
    ),
    Step(
        "kernels",
        "every kernel on small cases against fp64; what the benchmarks launch, compiled by all cores at once",
        {"quick": 25, "full": 40},
        _kernels,
        together=True,
    ),
    Step(
        "conv",
        "conv2 to conv5: forms of the forward pass, dgrad and wgrad, each against cuDNN",
        {"quick": 25, "full": 52},
        _bench("test_conv.py"),
    ),
    Step(
        "tests",
        "the tests marked gpu and two_gpu, side by side; slow ones in full",
        {"quick": 23, "full": 54},
        _tests,
        together=True,
    ),
    Step(
        "ceilings",
        "matmul bf16, tf32, fp32; device copy; L2 read; a launch on the host",
        {"quick": 15, "full": 20},
        _bench("test_ceilings.py", "bench/test_launch.py"),
    ),
    Step(
        "stem",
        "conv1 and the first block, in the right type (weight gradient), from pixels and from fp32: inference, training",
        {"quick": 24, "full": 60},
        _bench("test_layers.py", "bench/test_stem.py", "-k", "conv1 and (bf16 and 256 or from)"),
    ),
    Step(
        "lrn",
        "LRN and LRN with pooling, forward and backward, against torch and cuDNN's own, in full torch.compile",
        {"quick": 18, "full": 50},
        _bench("test_layers.py", "-k", "norm"),
    ),
    Step(
        "model",
        "the optimiser's step; whole networks: inference, training step, as graphs, memory, first call, compile time",
        {"quick": 22, "full": 77},
        _bench("test_optim.py", "bench/test_model.py", "-k", "not two_devices"),
    ),
    Step(
        "sanitizer",
        f"compute-sanitizer {', '.join(CHECKS)} side by side, every kernel on small cases",
        {"quick": 13, "full": 34},
        _sanitizer,
        why_not=_no_sanitizer,
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        together=True,
    ),
    Step(
        "layers",
        "fc6 and fc7, with dropout too; in full two devices, conv2 to conv5 with ReLU, whole groups, pooling",
        {"quick": 10, "full": 58},
        _layers,
    ),
    Step("compare", "alexnet-kernels compare, batch 128, photographs or noise", {"quick": 10, "full": 20}, _compare),
)
FIGURES = ("speedup", "roofline", "throughput")
FILES = ("gpu.json", "gpu.log", "<gpu>/<date>-<digest>.json", "report.md", *(f"<gpu>-{name}.png" for name in FIGURES))


@dataclass
class Done:
    """How a step ended: ``passed``, ``failed``, ``stopped`` (its time was over) or ``left out``."""

    step: str
    status: str
    reason: str
    seconds: float
    rows: list[dict[str, Any]]


def plan(steps: Iterable[Step], profile: str, budget: float) -> list[tuple[Step, float]]:
    """Each step with its own budget, and 0 for those that a smaller total does not reach."""
    left, found = budget, []
    for step in steps:
        own = min(step.seconds[profile], left)
        found.append((step, own if own >= LEAST else 0.0))
        left -= found[-1][1]
    return found


def run_steps(
    planned: Sequence[tuple[Step, float]],
    budget: float,
    job: Callable[[Step, float], Job],
    log: TextIO,
    finished: Callable[[list[Done]], None],
    *,
    execute: Callable[[Sequence[Sequence[str]], dict[str, str], float, TextIO], list[Ended]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Done]:
    """Run the steps; none goes on after the total budget, and none but the first failing one can hurt the others."""
    execute = execute or run_commands
    begin, owed, done = clock(), 0.0, list[Done]()
    for step, own in planned:
        owed += own
        started = clock()
        seconds = min(owed, budget) - (started - begin)
        why = step.why_not() or (
            f"no time: {max(0.0, seconds):.0f} s of the budget were left" if seconds < LEAST else None
        )
        if own == 0.0 and why is None:
            why = "no time: the budget ends before it"
        if why:
            done.append(Done(step.name, "left out", why, 0.0, []))
            finished(done)
            continue
        print(f"== {step.name}: {step.what} ({seconds:.0f} s)", flush=True)
        status, reason, what = "passed", "", job(step, seconds)
        try:
            commands = step.commands(what)
            rounds = [commands] if step.together else [[command] for command in commands]
            for i, at_once in enumerate(rounds):
                share = (seconds - (clock() - started)) / (len(rounds) - i)
                for code, last in execute(at_once, dict(step.environment), max(1.0, share), log):
                    if code and status != "failed":
                        status, reason = "failed", f"exit status {code}: {last}"
                    elif code is None and status == "passed":
                        status, reason = "stopped", f"after {share:.0f} s"
                    elif status == "passed":
                        reason = "; ".join(filter(None, (reason, last))) if step.together else last
        except Exception as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
        done.append(Done(step.name, status, reason, round(clock() - started, 1), read_rows(what.rows)))
        print(f"== {step.name}: {status} {reason}, {done[-1].seconds} s, {len(done[-1].rows)} rows", flush=True)
        finished(done)
    return done


Ended = tuple[int | None, str]  # exit status (None: stopped), and the last line of output


def run_commands(
    commands: Sequence[Sequence[str]], environment: dict[str, str], seconds: float, log: TextIO
) -> list[Ended]:
    """How each ended, all of them side by side for ``seconds``; their output goes to ``log``, of several one after the other."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    deadline, processes = time.monotonic() + seconds, list[subprocess.Popen[bytes]]()
    with contextlib.ExitStack() as stack:
        alone = len(commands) == 1
        outs: list[Any] = [log if alone else stack.enter_context(tempfile.NamedTemporaryFile("w+")) for _ in commands]
        for command, out in zip(commands, outs, strict=True):
            out.write(f"\n$ {' '.join(command)}\n")
            out.flush()
        places = [out.tell() for out in outs]
        try:
            for command, out in zip(commands, outs, strict=True):
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env={**os.environ, "PYTHONPATH": path, **environment},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except BaseException:
            _stop(processes)
            raise
        codes = [process.poll() for process in processes]
        _stop([process for process, code in zip(processes, codes, strict=True) if code is None])
        ended = [(code, _last_line(out.name, at)) for code, out, at in zip(codes, outs, places, strict=True)]
        for out in () if alone else outs:
            log.write(Path(out.name).read_text(errors="replace"))
        log.flush()
    return ended


def _last_line(path: str, place: int) -> str:
    with Path(path).open(errors="replace") as written:
        written.seek(place)
        lines = [line.strip() for line in written if line.strip()]
    return lines[-1][:200] if lines else ""


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """The processes and all they started, first politely: pytest then still writes what it has."""
    for number, patience in ((signal.SIGINT, 3.0), (signal.SIGKILL, 10.0)):
        running = [process for process in processes if process.poll() is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + patience
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The measurements that a step left, without a line that was cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def show_plan(planned: Sequence[tuple[Step, float]], profile: str, budget: float, out: Path) -> None:
    print(f"profile {profile}: {budget:.0f} s in all")
    for step, own in planned:
        why = step.why_not()
        note = f"   (left out here: {why})" if why else "" if own else "   (left out: the budget ends before it)"
        print(f"{step.name:10} {own:5.0f} s  {step.what}{note}")
    print(f"writes into {out}/: {', '.join(FILES)}")


def compare(track: str, rows: Path, picture: Path) -> int:
    """``alexnet-kernels compare`` on photographs, or on noise where scikit-image has none; its rows go to ``rows``."""
    import torch
    from PIL import Image

    from alexnet_kernels import images

    try:
        pictures = [str(p) for p in images.default_photographs()]
    except (FileNotFoundError, ImportError):
        noise = torch.randint(0, 256, (300, 300, 3), dtype=torch.uint8)
        Image.frombytes("RGB", (300, 300), bytes(noise.flatten().tolist())).save(picture)
        pictures = [str(picture)]
    result = picture.with_name(f"compare-{track}.json")
    options = ["--dtype", track, "--batch", "128", "--json", str(result)]
    code = subprocess.run(_python("-m", "alexnet_kernels", "compare", *pictures, *options), check=False).returncode
    if result.exists():
        with rows.open("a") as file:
            for row in json.loads(result.read_text())["rows"]:
                file.write(json.dumps({"section": "compare", "track": track, **row}) + "\n")
    return code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for what is written (bench/out)")
    parser.add_argument("--profile", choices=PROFILES, default=os.environ.get("GPU_PROFILE") or "quick")
    parser.add_argument("--budget", type=float, default=os.environ.get("GPU_SECONDS") or None, help="seconds in all")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true", default=os.environ.get("GPU_DRY_RUN") == "1")
    for hidden in ("--compare", "--rows", "--picture"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.profile not in PROFILES:
        parser.error(f"GPU_PROFILE={arguments.profile!r}: use {' or '.join(PROFILES)}")
    if arguments.compare:
        return compare(arguments.compare, Path(arguments.rows), Path(arguments.picture))
    budget = float(arguments.budget) if arguments.budget is not None else PROFILES[arguments.profile]
    planned = plan([step for step in STEPS if step.name in arguments.only], arguments.profile, budget)
    if arguments.dry_run:
        show_plan(planned, arguments.profile, budget, arguments.out)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device is visible: nothing to run")
        return 3
    return run(planned, arguments.profile, budget, arguments.out)


def draw(out: Path) -> list[Path]:
    """The tables and figures of what was measured; a machine without matplotlib has the numbers."""
    from alexnet_kernels.profiling.report import write_report

    try:
        written, skipped = write_report(out, out)
    except Exception as error:
        print(f"no report: {type(error).__name__}: {error}")
        return []
    for line in skipped:
        print(f"skipped: {line}")
    return written


def run(planned: Sequence[tuple[Step, float]], profile: str, budget: float, out: Path) -> int:
    import torch

    from alexnet_kernels._files import write_text
    from alexnet_kernels.comparison.run import environment

    from . import rows

    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "schema": 2,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "profile": profile,
        "budget": budget,
        "environment": environment([torch.device("cuda", i) for i in range(torch.cuda.device_count())]),
    }

    def finished(done: list[Done]) -> None:
        result["steps"] = [vars(one) for one in done]
        write_text(out / "gpu.json", json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch, (out / "gpu.log").open("w+") as log:

        def job(step: Step, seconds: float) -> Job:
            return Job(profile, seconds, out, Path(scratch), Path(scratch) / f"{step.name}.jsonl")

        done = run_steps(planned, budget, job, log, finished)
        measured = [row for one in done for row in one.rows]
        files: list[Path] = []
        failed = any(one.status == "failed" for one in done)
        try:
            found = rows.publish(measured, out)
            files = [found] if found else []
        except Exception as error:
            failed = True
            print(f"result file: {type(error).__name__}: {error}")
        files += draw(out) if files else []
        text = rows.summary(measured)
        log.write("\n" + text)
    print(text, end="")
    for one in done:
        print(f"{one.step:10} {one.status:9} {one.seconds:6.1f} s  {one.reason}")
    print("wrote", ", ".join(str(path) for path in (out / "gpu.json", out / "gpu.log", *files)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
