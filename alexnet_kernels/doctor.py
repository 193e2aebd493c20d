"""What this machine has and which backends work on it: the answer to "why is it slow" and the head of a bug report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import _extension, functional, reference
from ._version import __version__
from .dispatch import BACKENDS, ENVIRONMENT_VARIABLE, use_backend

PACKAGES = ("torch", "triton", "numpy", "torchvision", "nvidia-ml-py")
VARIABLES = (
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)  # and all that begin with this package's name
_TOLERANCE = 1e-5  # of LRN in fp32 against fp64, on 16 channels; the convolutions' problems are exact


@dataclass(frozen=True)
class Check:
    """One backend on one device: whether a problem that it has runs there, forward and backward, with the reference's values."""

    backend: str
    device: str
    works: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``alexnet-kernels doctor`` says; ``to_json`` for a bug report.

    ``problems`` are what a user has to mend, one line each; a backend that this machine cannot have is none.
    """

    version: str
    system: dict[str, str]
    packages: dict[str, str]
    variables: dict[str, str]
    gpus: tuple[dict[str, str], ...]
    backends: tuple[Check, ...]
    problems: tuple[str, ...] = ()
    library: str = ""
    rebuild: str = _extension.REBUILD

    def to_json(self) -> dict[str, object]:
        return {"schema": 1, **asdict(self)}


def diagnose() -> Diagnosis:
    """Look at the machine and try every backend on every device; takes about a second and raises nothing.

    >>> [check.works for check in diagnose().backends if (check.backend, check.device) == ("reference", "cpu")]
    [True]
    """
    system = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _ask(lambda: f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        "cuda of torch": str(torch.version.cuda),
        "cudnn": _ask(lambda: str(torch.backends.cudnn.version() or "not available")),
        "driver": _ask(_driver),
    }
    checks = tuple(_try(backend, device) for device in _devices() for backend in BACKENDS)
    return Diagnosis(
        version=__version__,
        system=system,
        packages={name: _installed(name) for name in PACKAGES},
        variables={name: os.environ[name] for name in _variables()},
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        backends=checks,
        problems=_problems(checks),
        library="; ".join(f"{name}: {_extension.describe(name)}" for name in _extension.OPERATIONS),
    )


def shipped_kernels(pattern: str = "conv.* bfloat16 .*batch 256", arch: int = 90) -> list[dict[str, object]]:
    """The Triton launches that ``pattern`` finds in the catalogue, compiled for sm_``arch``: what each needs of a multiprocessor.

    No GPU is needed. One row a launch: its label, tile, programs, warps, stages, registers, spilled and shared bytes, and
    ``blocks_per_sm``, the CTAs that one multiprocessor of an H100 or H200 holds.

    Raises:
        RuntimeError: Triton is not installed, or ``TRITON_INTERPRET=1`` is set.
        ValueError: ``pattern`` is no regular expression or finds nothing, or ``arch`` is none of 80, 90 and 100.
    """
    if arch not in (80, 90, 100):
        raise ValueError(f"arch={arch} is none of the GPUs that the kernels are written for; use 80, 90 or 100")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed, so no kernel can be compiled: pip install triton (Linux only)")
    from .kernels import catalogue

    return [asdict(row) for row in catalogue.rows(pattern, arch)]


def _ask(question: Callable[[], str]) -> str:
    """The answer, or the error in its place: whatever is broken is what the doctor is here to tell."""
    try:
        return question()
    except Exception as error:
        return f"error: {_line(error)}"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _variables() -> list[str]:
    """Those that are set and change what runs, or what is built."""
    return [
        *sorted(n for n in os.environ if n.startswith("ALEXNET_KERNELS_")),
        *(n for n in VARIABLES if n in os.environ),
    ]


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """NVML's answer, or why there is none."""
    try:
        import pynvml
    except ImportError:
        return "unknown: nvidia-ml-py is not installed (pip install 'alexnet-kernels[profile]')"
    try:
        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
        return version if isinstance(version, str) else version.decode()
    except pynvml.NVMLError as error:  # no driver, or one that does not answer
        return f"none found ({_line(error)})"


def _gpu(index: int) -> dict[str, str]:
    found = {"device": f"cuda:{index}"}
    try:
        p = torch.cuda.get_device_properties(index)
    except Exception as error:
        return {**found, "error": _line(error)}
    return {
        **found,
        "name": p.name,
        "capability": f"sm_{p.major}{p.minor}",
        "memory": f"{p.total_memory / 2**30:.0f} GiB",
    }


def _devices() -> list[str]:
    others = [kind for kind in ("mps", "xpu") if getattr(torch, kind).is_available()]
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *others]


class _Problem(NamedTuple):
    """A small problem with its gradients: by the public function, and by the reference."""

    name: str
    run: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    arguments: Callable[[], tuple[Tensor, ...]]


def _whole(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, whose products and sums are exact in half types and in tf32 too."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


_LRN = _Problem(
    "LRN",
    lambda x: functional.local_response_norm(x, 5, alpha=0.5, k=2.0),
    lambda x: reference.lrn(x, 5, 0.1, 0.75, 2.0),
    lambda: (torch.linspace(-3, 3, 2 * 16 * 3 * 3).reshape(2, 16, 3, 3),),
)
_PARTIAL = {  # backends that have no LRN: a problem that each of them has
    "cuda": _Problem(
        "conv1_relu",
        lambda x, weight, bias: functional.conv1_relu(x, weight, bias),
        lambda x, weight, bias: reference.conv1(x, weight, bias, None, None, (4, 4), (0, 0, 0, 0), True),
        lambda: tuple(_whole(*shape, dtype=torch.float16) for shape in ((2, 3, 19, 19), (48, 3, 11, 11), (48,))),
    ),
    "cudnn": _Problem(
        "conv2d_relu",
        lambda x, weight, bias: functional.conv2d_relu(x, weight, bias, stride=2, padding=1),
        lambda x, weight, bias: reference.conv2d_relu(x, weight, bias, (2, 2), (1, 1), (1, 1), 1),
        lambda: tuple(_whole(*shape, dtype=torch.float32) for shape in ((2, 16, 9, 9), (32, 16, 3, 3), (32,))),
    ),
}


def _with_gradients(run: Callable[..., Tensor], arguments: Iterable[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in arguments]
    with torch.enable_grad():
        y = run(*leaves)
        found = (y, *torch.autograd.grad(y, leaves, torch.ones_like(y)))
    return [t.detach().cpu().double() for t in found]


def _try(backend: str, device: str) -> Check:
    """A small problem that the backend has, with its gradients, held against the reference in fp64 on the CPU."""
    problem = _PARTIAL.get(backend, _LRN)
    try:
        given = problem.arguments()
        with use_backend(backend):
            got = _with_gradients(problem.run, (t.to(device) for t in given))
        truth = _with_gradients(problem.exact, (t.double() for t in given))
    except Exception as error:
        return Check(backend, device, False, _line(error))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True)]
    worst = math.nan if any(map(math.isnan, errors)) else max(errors)
    verdict = f"{problem.name} forward and backward, {worst:.1e} from fp64"
    works = worst < _TOLERANCE
    return Check(backend, device, works, verdict if works else f"wrong: {verdict}, {_TOLERANCE:.0e} is allowed")


def _problems(checks: tuple[Check, ...]) -> tuple[str, ...]:
    named = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    found: list[str] = []
    if named not in ("auto", *BACKENDS):
        found.append(f"{ENVIRONMENT_VARIABLE}={named!r} is not a backend; use 'auto', {', '.join(map(repr, BACKENDS))}")
    elif named != "auto" and not any(check.works for check in checks if check.backend == named):
        found.append(f"{ENVIRONMENT_VARIABLE}={named!r} works on no device here: every operation is an error; unset it")
    elif named in _PARTIAL:
        found.append(f"{ENVIRONMENT_VARIABLE}={named!r} has no LRN: what a named backend has not is an error; unset it")
    wrong = [
        f"{c.backend} on {c.device} is {c.detail}; please report it" for c in checks if c.detail.startswith("wrong")
    ]
    broken = [f"reference on {c.device}: {c.detail}" for c in checks if c.backend == "reference" and not c.works]
    unloadable = [f"{n}: {why}" for n in _extension.OPERATIONS if "not load" in (why := _extension.describe(n))]
    return tuple(dict.fromkeys(found + wrong + unloadable + [line for line in broken if "wrong" not in line]))
