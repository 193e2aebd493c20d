"""What nvcc makes of the CUDA sources, without a GPU: registers, spills, instructions, and a library that loads."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc/lrn_pool_backward.cu"
STEP = 2 * 2 * 8  # elements of a thread in one turn of the loop
ARCHITECTURES = ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_100,code=sm_100"]


def nvcc(*arguments: str | Path) -> str:
    program = shutil.which("nvcc")
    if program is None:
        pytest.skip("nvcc is not on PATH")
    done = subprocess.run([program, "-std=c++17", "-O3", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def check_resources(report: str) -> None:
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= 9 and all(set(one) == {"0"} for one in spills), (
        report
    )  # six backward kernels, three reductions
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 128  # two blocks of 256 threads an SM


def instructions_in_loop(listing: str) -> dict[str, int]:
    """By kernel: the instructions of its longest backward jump."""
    counts = {}
    for function in listing.split("Function : ")[1:]:
        found = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", function)]
        jumps = [(int(m[1], 16), at) for at, text in found if (m := re.search(r"BRA.*?0x([0-9a-f]+)", text))]
        spans = [(start, end) for start, end in jumps if start < end]
        counts[function.split("\n")[0]] = max((end - start) // 16 + 1 for start, end in spans)
    return counts


def test_sm_90(tmp_path: Path) -> None:
    cubin = tmp_path / "kernel.cubin"
    check_resources(nvcc("-arch=sm_90", "-cubin", "-Xptxas", "-v", "-o", cubin, SOURCE))
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    backward = {name: count for name, count in instructions_in_loop(listing).items() if "8backward" in name}
    assert len(backward) == 6
    assert max(backward.values()) <= 36 * STEP, backward


@pytest.mark.slow
def test_every_architecture_links_and_loads(tmp_path: Path) -> None:
    """In a process of its own, for a registered library cannot be taken back."""
    objects = [tmp_path / "kernel.o", tmp_path / "bindings.o"]
    gencodes = [f"-gencode=arch={a}" for a in [*ARCHITECTURES, "compute_80,code=compute_80"]]
    check_resources(nvcc(*gencodes, "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-c", "-o", objects[0], SOURCE))
    if torch.version.cuda is None:
        pytest.skip("a CPU build of torch cannot load a library that links CUDA")
    home = Path(torch.__file__).parent
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    flags = ["-DUSE_CUDA", target, f"-I{home / 'include'}", f"-I{ROOT / 'csrc'}", "-Xcompiler", "-fPIC"]
    nvcc(*flags, "-c", "-o", objects[1], ROOT / "csrc/bindings_cuda.cpp")
    library = tmp_path / "_cuda.abi3.so"
    libraries = [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10"]
    nvcc("-shared", "-cudart", "shared", "-o", library, *objects, *libraries)
    code = f"import torch; torch.ops.load_library({str(library)!r}); "
    code += "print(torch.ops.alexnet_kernels_cuda.lrn_pool_backward.default._schema)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "alexnet_kernels_cuda::lrn_pool_backward(Tensor grad, Tensor x" in done.stdout, done.stderr
