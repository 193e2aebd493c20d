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
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
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

    def __str__(self) -> str:
        others = "".join(f"\n  not {name}: {reason}" for name, reason in self.why_not.items())
        return f"{self.op} runs on {self.backend}{others}"

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

    A named backend that cannot run a call raises ``RuntimeError`` with the reason; it is never replaced silently. Each
    thread and async task has its own; a backward runs on the backend of its forward. Compiled code reads it when it runs,
    for operations with kernels; those without are plain torch there, and compiled with the rest.

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
    chosen = choose(op, *args)
    note(chosen.backend)
    return chosen.run(*args)


def note(backend: str) -> None:
    """Tell a surrounding :func:`recording` that ``backend`` runs."""
    used = _used.get()
    if used is not None:
        used.add(backend)


def require_reference(op: str, why: str) -> None:
    """For a call that only plain torch can run: note it, or raise where another backend was asked for by name."""
    wanted = requested()
    if wanted not in ("auto", "reference"):
        raise RuntimeError(f"backend {wanted!r} cannot run {op}: {why}; use backend 'auto' or 'reference'")
    note("reference")


def explain_reference(op: str, why: str) -> Explanation:
    """What :func:`require_reference` would do, without doing it."""
    require_reference(op, why)
    return Explanation(op, "reference", {name: why for name in BACKENDS if name != "reference"})


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
def _old_gpu(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"cuda:{index} is sm_{major}{minor}; the kernels need sm_80 or newer"


def triton_why_not(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The reasons that hold for every Triton kernel: no Triton, no suitable device, no such dtype."""
    if x.dtype not in dtypes:
        return f"no kernel for {x.dtype}"
    missing = _triton_missing()
    if missing is not None:
        return missing
    if x.device.type == "cuda":
        return "no kernel for ROCm" if torch.version.hip else _old_gpu(x.device.index)
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None if requested() == "triton" else "the interpreter runs only when asked for by name"
    return f"no kernel for device {x.device.type!r}"


def never(*_: Any) -> None:
    """``why_not`` of an implementation that can always run."""
