"""What this machine has and which backends work on it: the answer to "why is it slow" and the head of a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass

import torch

from . import functional, reference
from ._version import __version__
from .dispatch import BACKENDS, ENVIRONMENT_VARIABLE, use_backend

PACKAGES = ("torch", "triton", "numpy", "torchvision", "nvidia-ml-py")
VARIABLES = (ENVIRONMENT_VARIABLE, "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
REBUILD = 'pip install --no-build-isolation -e ".[bench]" -c constraints.txt'


@dataclass(frozen=True)
class Check:
    """One backend on one device: whether LRN runs there, forward and backward, with the reference's values."""

    backend: str
    device: str
    works: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``alexnet-kernels doctor`` says; ``to_json`` for a bug report."""

    version: str
    system: dict[str, str]
    packages: dict[str, str]
    variables: dict[str, str]
    gpus: tuple[dict[str, str], ...]
    backends: tuple[Check, ...]
    rebuild: str = REBUILD

    def to_json(self) -> dict[str, object]:
        return {"schema": 1, **asdict(self)}


def diagnose() -> Diagnosis:
    """Look at the machine and try every backend on every device; takes about a second and raises nothing."""
    system = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "cuda of torch": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else "not available",
    }
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    checks = tuple(_try(backend, device) for device in devices for backend in BACKENDS)
    return Diagnosis(__version__, system, {n: _installed(n) for n in PACKAGES}, variables, _gpus(), checks)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> tuple[dict[str, str], ...]:
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        found.append(
            {"device": f"cuda:{index}", "name": p.name, "capability": f"sm_{p.major}{p.minor}", "memory": memory}
        )
    return tuple(found)


def _try(backend: str, device: str) -> Check:
    """LRN of a small tensor, with its gradient, held against the reference in fp64."""
    x = torch.linspace(-3, 3, 2 * 16 * 3 * 3, device=device).reshape(2, 16, 3, 3).requires_grad_()
    try:
        with use_backend(backend):
            y = functional.local_response_norm(x, 5, alpha=0.5, k=2.0)
            (dx,) = torch.autograd.grad(y.sum(), x)
    except Exception as error:  # whatever is broken is what the doctor is here to tell
        return Check(backend, device, False, str(error).splitlines()[0])
    exact = x.detach().double()
    truth = (
        reference.lrn(exact, 5, 0.1, 0.75, 2.0),
        reference.lrn_backward(torch.ones_like(exact), exact, 5, 0.1, 0.75, 2.0),
    )
    worst = max(float((a.detach() - b).norm() / b.norm()) for a, b in zip((y, dx), truth, strict=True))
    return Check(backend, device, worst < 1e-5, f"LRN forward and backward, {worst:.1e} from fp64")
