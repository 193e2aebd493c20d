"""Which implementation runs: for each operation an ordered list of backends, an override, and an explanation.

An implementation is ``(backend, why_not, run)``. ``why_not(*args)`` is ``None`` where it can run these arguments, or one
line that says why it cannot. Under ``"auto"`` the first that can, runs; a backend that was asked for by name runs or raises.
``ops`` registers implementations; nothing here knows an operation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("triton", "cuda", "cpu", "cudnn", "reference")
ENVIRONMENT_VARIABLE = "ALEXNET_KERNELS_BACKEND"

_forced: ContextVar[str | None] = ContextVar("alexnet_kernels_backend", default=None)


@dataclass(frozen=True)
class Implementation:
    """One way to honour an operation's contract."""

    backend: str
    why_not: Callable[..., str | None]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Explanation:
    """What would run for a call, and why the other backends would not."""

    op: str
    backend: str
    why_not: dict[str, str]
    parts: tuple[Explanation, ...] = ()

    @staticmethod
    def of_one(op: str, backend: str, why: str) -> Explanation:
        """``backend`` runs ``op``, and all the others cannot for one reason."""
        return Explanation(op, backend, {name: why for name in BACKENDS if name != backend})

    @staticmethod
    def of_parts(op: str, why_not: Mapping[str, str], *parts: Explanation) -> Explanation:
        """``op`` runs as ``parts``, in this order; ``why_not`` says what keeps a backend from running more of it in one."""
        used = tuple(dict.fromkeys(name for part in parts for name in part.backend.split(" + ")))
        return Explanation(op, " + ".join(used), {n: why for n, why in why_not.items() if n not in used}, parts)

    def __str__(self) -> str:
        head = f"{self.op} runs on {self.backend}"
        if self.parts:
            said = {reason for part in self.parts for reason in part.why_not.values()}
            lines = "\n".join(map(str, self.parts)).splitlines()
            lines += [f"not {name} in one: {reason}" for name, reason in self.why_not.items() if reason not in said]
            return head + f", as {len(self.parts)} operations" + "".join(f"\n  {line}" for line in lines)
        return head + "".join(f"\n  not {name}: {reason}" for name, reason in self.why_not.items())

    def to_json(self) -> dict[str, object]:
        return asdict(self)


_table: dict[str, list[Implementation]] = {}


def register(op: str, backend: str, run: Callable[..., Any], why_not: Callable[..., str | None]) -> None:
    """Add an implementation of ``op``; of two that can run, the one registered first does."""
    _table.setdefault(op, []).append(Implementation(backend, why_not, run))


@functools.cache
def _default() -> str:
    return _check(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def requested() -> str:
    """The backend in force: ``use_backend``'s, else the environment variable's (read once), else ``"auto"``."""
    return _forced.get() or _default()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation on ``name``: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"``, ``"cudnn"`` or ``"reference"``.

    A named backend that cannot run a call raises ``RuntimeError`` with the reason; it is never replaced silently. Blocks
    nest. Each thread and async task has its own. A backward runs on the backend of its forward; what
    ``torch.utils.checkpoint`` computes again, on the backend in force around ``backward()``.

    Compiled code reads it each time it runs, inside the operations that have kernels; its backward reads it anew, in the
    thread that runs it (on a GPU autograd's own, which only the environment variable reaches). Operations without a kernel
    are plain torch there, compiled with the rest. Put the block around the compiled function, not into it.

    Raises:
        ValueError: ``name`` is no backend.

    >>> with use_backend("reference"):
    ...     requested()
    'reference'
    """
    token = _forced.set(_check(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def _check(name: str, argument: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument}={name!r} is not a backend; use 'auto', {', '.join(map(repr, BACKENDS))}")
    return name


def choose(op: str, *args: Any) -> Implementation:
    """The implementation that runs ``op(*args)`` now."""
    wanted = requested()
    for implementation in _table[op]:
        if wanted in ("auto", implementation.backend):
            reason = implementation.why_not(*args)
            if reason is None:
                return implementation
            if wanted != "auto":
                raise RuntimeError(
                    f"backend {wanted!r} cannot run {op}: {reason}; use backend 'auto' or mend the cause"
                )
    names = ", ".join(i.backend for i in _table[op])
    raise RuntimeError(
        f"backend {wanted!r} has no implementation of {op} (there are: {names}); use backend 'auto' or one of those"
    )


_used: ContextVar[set[str] | None] = ContextVar("alexnet_kernels_used", default=None)


@contextlib.contextmanager
def recording() -> Iterator[set[str]]:
    """The backends that run inside the block, in this thread: ``with recording() as used: model(x)``."""
    used: set[str] = set()
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


def run(op: str, *args: Any) -> Any:
    """``op(*args)`` on the implementation that :func:`choose` names."""
    return perform(choose(op, *args), *args)


def perform(chosen: Implementation, *args: Any) -> Any:
    """Run what :func:`choose` named."""
    note(chosen.backend)
    return chosen.run(*args)


def kernel(op: str, *args: Any) -> Implementation | None:
    """What :func:`choose` names; None for the reference, in whose place the caller has torch's own operations."""
    chosen = choose(op, *args)
    return None if chosen.backend == "reference" else chosen


def has_kernel(op: str, *args: Any) -> bool:
    """Whether any backend but the reference could run ``op(*args)``, whatever was asked for."""
    return any(i.backend != "reference" and i.why_not(*args) is None for i in _table[op])


def note(backend: str) -> None:
    """Tell a surrounding :func:`recording` that ``backend`` runs."""
    used = _used.get()
    if used is not None:
        used.add(backend)


def require_reference(op: str, why: str) -> None:
    """For a call that only plain torch can run: note it, or raise where another backend was asked for by name."""
    _allow_reference(op, why)
    note("reference")


def _allow_reference(op: str, why: str) -> None:
    wanted = requested()
    if wanted not in ("auto", "reference"):
        raise RuntimeError(f"backend {wanted!r} cannot run {op}: {why}; use backend 'auto' or 'reference'")


def explain_reference(op: str, why: str) -> Explanation:
    """What :func:`require_reference` would do, without doing it."""
    _allow_reference(op, why)
    return Explanation.of_one(op, "reference", why)


def explain_call(op: str, *args: Any) -> Explanation:
    """What :func:`run` would do, without doing it."""
    chosen, wanted = choose(op, *args), requested()
    why = f"can run; {chosen.backend} " + ("comes first" if wanted == "auto" else "was asked for by name")
    known = {i.backend: i.why_not(*args) or why for i in _table[op]}
    reasons = {
        name: known.get(name, "no implementation in this version") for name in BACKENDS if name != chosen.backend
    }
    return Explanation(op, chosen.backend, reasons)


@functools.cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton; Linux only)"


@functools.cache
def _unbuildable() -> str | None:
    """Why Triton cannot launch what it compiled: for each signature it builds a small module, in C, with Python's headers."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton launches kernels through a C compiler, and there is none; install gcc, or name one in CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's, as Triton reads it
    include = sysconfig.get_paths(scheme)["include"]
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not elsewhere and not Path(include, "Python.h").exists():
        return f"Triton launches kernels through Python's headers, and {include} has none; install python3-dev"
    return None


@functools.cache
def old_gpu(index: int) -> str | None:
    """Why no kernel runs on this GPU: it is of an older kind than all of them are written for, or not there at all."""
    if not torch.cuda.is_available():  # a fake tensor says that it is on one
        return "no CUDA device is visible"
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"cuda:{index} is sm_{major}{minor}; the kernels need sm_80 or newer"


def triton_why_not(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The reasons that hold for every Triton kernel: no Triton, no suitable device, no such dtype."""
    if x.dtype not in dtypes:
        return f"no kernel for {x.dtype}"
    if x.is_cuda:
        old = "no kernel for ROCm" if torch.version.hip else old_gpu(x.device.index)
        return _triton_missing() or old or _unbuildable()
    if not x.is_cpu:
        return f"no kernel for device {x.device.type!r}"
    if requested() != "triton":  # first, because it is quick: reading the environment costs a microsecond on every call
        return "a CPU only has Triton's interpreter, which runs only when asked for by name"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "a CPU only has Triton's interpreter; set TRITON_INTERPRET=1 before anything imports Triton"
    return _triton_missing()


def never(*_: Any) -> None:
    """``why_not`` of an implementation that can always run."""
