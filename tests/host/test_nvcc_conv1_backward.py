"""What nvcc makes of the first convolution's backward: registers, spills, occupancy, the instructions of its loops."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
WEIGHT, DATA = ROOT / "csrc/conv1_backward.cu", ROOT / "csrc/conv1_dgrad.cu"
REGISTERS, THREADS, SHARED = 65536, 256, {80: 164, 90: 228, 100: 228}  # of a multiprocessor; KiB
DATA_SHARED = 2 * (6 * 66 * 48 + 9 * 48 * 48) + 6 * 66 * 32


def nvcc(*arguments: str | Path) -> str:
    program = shutil.which("nvcc")
    if program is None:
        pytest.skip("nvcc is not on PATH")
    done = subprocess.run([program, "-std=c++17", "-O3", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def registers(report: str) -> dict[str, int]:
    """By kernel; none may spill."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert found and all(one[1:4] == ("0", "0", "0") for one in found), report
    return {one[0]: int(one[4]) for one in found}


def check(source: Path, architecture: int, cubin: Path) -> None:
    name = f"sm_{architecture}" + ("a" if architecture == 90 else "")
    used = registers(nvcc(f"-arch={name}", "-cubin", "-Xptxas", "-v", "-o", cubin, source))
    if source == WEIGHT:
        kernels = [count for kernel, count in used.items() if "weight_gradient" in kernel]
        assert len(kernels) == 9 and len(used) == 12
        assert max(kernels) <= 255  # one block of 8 warps: the sums alone are 156
    else:
        kernels = [count for kernel, count in used.items() if "data_gradient" in kernel]
        assert len(kernels) == 3 and len(used) == 6
        fitting = min(REGISTERS // (max(kernels) * THREADS), (SHARED[architecture] << 10) // (DATA_SHARED + 1024))
        assert fitting == (1 if architecture == 80 else 2)


def loops(cubin: Path, kernel: str) -> list[str]:
    """The text of each backward jump's span that has products and holds no other such span."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    (function,) = [text for text in listing.split("Function : ")[1:] if kernel in text.split("\n")[0]]
    found = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", function)]
    spans = [(int(m[1], 16), at) for at, text in found if (m := re.search(r"BRA.*?0x([0-9a-f]+)", text))]
    bodies = {span: [text for at, text in found if span[0] <= at <= span[1]] for span in spans if span[0] < span[1]}
    products = {span: "\n".join(body) for span, body in bodies.items() if any("HMMA" in text for text in body)}
    inner = [a for a in products if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in products)]
    return [products[span] for span in inner]


def count(text: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", text))


def test_weight_gradient_on_sm_90(tmp_path: Path) -> None:
    check(WEIGHT, 90, tmp_path / "kernel.cubin")


def test_data_gradient_on_sm_90(tmp_path: Path) -> None:
    """A tap of 16 channels: 12 products for 5 loads of matrices, and little else."""
    cubin = tmp_path / "kernel.cubin"
    check(DATA, 90, cubin)
    taps = loops(cubin, "data_gradientIL11ElementType2E")
    assert [count(tap, "HMMA") for tap in taps] == [12, 12, 10]
    assert all(count(tap, "LDSM") == 5 and len(tap.splitlines()) <= 32 for tap in taps)


@pytest.mark.slow
@pytest.mark.parametrize("source", [WEIGHT, DATA], ids=["weight gradient", "data gradient"])
@pytest.mark.parametrize("architecture", [80, 100])
def test_other_architectures(source: Path, architecture: int, tmp_path: Path) -> None:
    check(source, architecture, tmp_path / "kernel.cubin")


@pytest.mark.slow
def test_the_op_links_and_loads(tmp_path: Path) -> None:
    """In a process of its own, for a registered library cannot be taken back."""
    if torch.version.cuda is None:
        pytest.skip("a CPU build of torch cannot load a library that links CUDA")
    home, library = Path(torch.__file__).parent, tmp_path / "_cuda.abi3.so"
    flags = ["-arch=sm_90a", "-shared", "-cudart", "shared", "-Xcompiler", "-fPIC", "-DUSE_CUDA"]
    torchs = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{home / 'include'}", f"-L{home / 'lib'}"]
    libraries = ["-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10"]
    nvcc(*flags, *torchs, WEIGHT, DATA, ROOT / "csrc/bindings_conv1_backward.cpp", "-o", library, *libraries)
    code = f"import torch; torch.ops.load_library({str(library)!r}); "
    code += "print(torch.ops.alexnet_kernels_cuda.conv1_backward.default._schema)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        "conv1_backward(Tensor grad, Tensor? a, Tensor x, Tensor weight, Tensor? mean, Tensor? scale, int[] padding, "
        "bool[] mask) -> (Tensor, Tensor, Tensor)"
    ) in done.stdout, done.stderr
