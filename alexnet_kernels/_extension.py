"""The compiled libraries: ``_cpu``, ``_cuda``. Each is optional, is loaded once, on first use, and says why it is not there.

Loading registers ``torch.ops.alexnet_kernels_cpu`` or ``torch.ops.alexnet_kernels_cuda``. The libraries are built against
LibTorch's stable ABI (``setup.py``), so one serves every Python and torch since 2.10; one that does not load all the same,
or lacks an operation, costs a warning and not the program.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch

OPERATIONS = {
    "cpu": ("lrn", "lrn_backward", "max_pool2d", "max_pool2d_backward", "lrn_pool", "lrn_pool_backward", "simd_level"),
    "cuda": ("lrn_pool_backward", "conv1", "stem", "conv1_backward"),
}
REBUILD = 'pip install --no-build-isolation -e ".[bench]" -c constraints.txt'
_FOLDER = Path(__file__).parent
_SIMD = ("baseline", "AVX2", "AVX-512")


@functools.cache  # on the path of every call
def why_not(name: str) -> str | None:
    """Why the library ``"cpu"`` or ``"cuda"`` cannot be used, or ``None``; the first call loads it."""
    path = _FOLDER / f"_{name}.abi3.so"
    if not path.is_file():
        return f"the compiled library is not there: {_reason(name)}"
    if name == "cuda" and torch.version.cuda is None:
        return "this torch has no CUDA"
    try:
        torch.ops.load_library(str(path))
        missing = [op for op in OPERATIONS[name] if not hasattr(getattr(torch.ops, f"alexnet_kernels_{name}"), op)]
        if missing:
            raise OSError(f"it has no {', '.join(missing)}")
    except Exception as error:
        original = error.__cause__ or error  # torch says only that it could not load the library
        warnings.warn(
            f"{path} does not load, so what it would run, other implementations run: {original}\nRebuild it: {REBUILD}",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"the compiled library does not load: {(str(original).splitlines() or [''])[0]}; {REBUILD}"
    return None


def describe(name: str) -> str:
    """One line for a person: the library is there, and for which processor; or why it is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = why_not(name)
    if reason is not None:
        return reason
    return f"loaded ({_SIMD[torch.ops.alexnet_kernels_cpu.simd_level()]})" if name == "cpu" else "loaded"


def _reason(name: str) -> str:
    """What the installation left; of a compiler's message the first line that tells of an error."""
    try:
        lines = (_FOLDER / f"_{name}.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"it was not built; {REBUILD}"
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no reason was noted")
