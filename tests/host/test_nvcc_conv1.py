"""What nvcc makes of the first layer's forward, without a GPU: registers, spills, blocks on a multiprocessor, the main loop."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc/conv1_forward.cu"
REGISTERS = 1 << 16  # of a multiprocessor
SHARED = {
    "80": 164 << 10,
    "90a": 228 << 10,
    "100": 228 << 10,
}  # of a multiprocessor; a block takes 1 KB more than it asks for


class Kernel(NamedTuple):
    element: int  # of ElementType
    channels: int
    stem: bool
    parts: int
    warpgroups: bool
    registers: int
    spilled: bool

    @property
    def threads(self) -> int:
        return 256 if self.element == 0 and self.parts == 1 and self.channels > 48 else 128

    @property
    def size(self) -> int:
        return 4 if self.element == 0 else 2

    @property
    def shared(self) -> int:
        """As the traits lay it out: weights, bias, the strip or two rows of results, the row that stays."""
        pixel, columns = self.channels * self.size + 16, 55 if self.stem else 56
        depth, strip = (416, (22 * 58 + 66) * 16) if self.warpgroups else (400, 45 * 232 * self.size)
        weights = depth * self.channels // self.parts * self.size
        return weights + self.channels * 4 + max(strip, 2 * columns * pixel) + (columns * pixel if self.stem else 0)

    def blocks(self, architecture: str) -> int:
        """On one multiprocessor at once."""
        a_warp = (self.registers + 7) // 8 * 8 * 32
        return min(REGISTERS // (a_warp * self.threads // 32), SHARED[architecture] // (self.shared + 1024))


def compile_for(architecture: str, target: Path) -> list[Kernel]:
    program = shutil.which("nvcc")
    if program is None:
        pytest.skip("nvcc is not on PATH")
    command = [
        program,
        "-std=c++17",
        "-O3",
        f"-arch=sm_{architecture}",
        "-cubin",
        "-Xptxas",
        "-v",
        "-o",
        target,
        SOURCE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    assert not re.findall(
        r".*(?:serialized|injected).*", report
    )  # products one by one, a wait or fence that is not ours
    pattern = (
        r"ElementType(\d)ELi(\d+)ELb(\d)ELi(\d)E\d+(Warpgroup|)Taps.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        Kernel(int(m[1]), int(m[2]), m[3] == "1", int(m[4]), m[5] != "", int(m[9]), any(int(m[i]) for i in (6, 7, 8)))
        for m in re.finditer(pattern, report, re.DOTALL)
    ]


def check_resources(kernels: list[Kernel], architecture: str) -> None:
    # three types; 48, 64, 96 channels and 96 by halves; alone and with the pool; and 12 by wgmma
    assert [sum(kernel.warpgroups == way for kernel in kernels) for way in (False, True)] == [24, 12]
    for kernel in kernels:
        assert not kernel.spilled, kernel
        largest = SHARED[architecture] - 1024
        by_halves = architecture == "80" and kernel.parts == 1 and kernel.element == 0 and kernel.channels == 96
        assert kernel.shared <= largest or by_halves, kernel
        if architecture != "80":
            assert kernel.blocks(architecture) >= (1 if kernel.element == 0 else 2), (
                kernel
            )  # 8 warps either way, or more
        elif not by_halves:
            assert kernel.blocks(architecture) >= 1, kernel


def main_loops(listing: str) -> dict[str, Counter[str]]:
    """By kernel: the instructions of the innermost loop that has the most products."""
    found = {}
    for function in listing.split("Function : ")[1:]:
        code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", function)]
        jumps = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"BRA.*?0x([0-9a-f]+)", text))]
        loops = []
        for start, end in jumps:
            inner = any(start <= s and e <= end and (s, e) != (start, end) and s < e for s, e in jumps)
            if start < end and not inner:
                body = [re.sub(r"^@!?U?P\d+ ", "", text) for at, text in code if start <= at <= end]
                loops.append(Counter(text.split()[0].split(".")[0] for text in body))
        found[function.split("\n")[0]] = max(loops, key=lambda loop: loop["HMMA"], default=Counter())
    return found


def runs_of_wgmma(listing: str) -> dict[str, list[Counter[str]]]:
    """By kernel: the instructions from each fence to its wait."""
    found = {}
    for function in listing.split("Function : ")[1:]:
        code = [re.sub(r"^@!?U?P\d+ ", "", text) for text in re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(.*?);", function)]
        names = " ".join(text.split()[0] for text in code)
        runs = re.findall(r"WARPGROUP\.ARRIVE (.*?) WARPGROUP\.DEPBAR", names)
        found[function.split("\n")[0]] = [Counter(name.split(".")[0] for name in run.split()) for run in runs]
    return found


def check_wgmma(listing: str) -> None:
    """All of K under way at once, descriptors by additions on the uniform path, nothing waited for or moved in between."""
    kernels = {
        name: runs for name, runs in runs_of_wgmma(listing).items() if "WarpgroupTaps" in name and "forward" in name
    }
    assert len(kernels) == 12
    for name, runs in kernels.items():
        assert sorted(run["HGMMA"] for run in runs) == [26, 52], name  # one row of pixels; two
        for run in runs:
            assert run["WARPGROUP"] == run["R2UR"] == run["LDS"] == run["BAR"] == 0, (name, run)
            assert sum(run.values()) <= (8.5 if run["HGMMA"] == 26 else 5) * run["HGMMA"], (name, run)


def test_sm_90(tmp_path: Path) -> None:
    cubin = tmp_path / "kernel.cubin"
    check_resources(compile_for("90a", cubin), "90a")
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    check_wgmma(listing)
    loops = {name: loop for name, loop in main_loops(listing).items() if "Li96ELb" in name and "Li1E4Taps" in name}
    assert len(loops) == 6
    for name, loop in loops.items():
        # three steps of K, 32 pixels; a load of B is 16 bytes and feeds four products, one of A is 4 bytes and feeds 6 or 12
        products = 36 if "ElementType0E" in name else 72
        assert loop["HMMA"] == products, (name, loop)
        assert loop["LDS"] == products // 4 + 24, (name, loop)
        assert loop["LDG"] == loop["LDL"] == loop["STL"] == 0
        assert sum(loop.values()) <= 2.6 * products, (name, loop)


def test_two_blocks_of_a_multiprocessor_share_its_memory() -> None:
    """The sizes that docs/kernels/conv1.md and test_conv1_forward.py name."""
    ways = [(0, False), (2, False), (2, True)]
    sizes = [Kernel(element, 96, stem, 1, way, 0, False).shared for element, way in ways for stem in (False, True)]
    assert sizes == [198_784, 219_984, 100_480, 111_504, 103_552, 114_576]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "100"])
def test_other_architectures(tmp_path: Path, architecture: str) -> None:
    check_resources(compile_for(architecture, tmp_path / "kernel.cubin"), architecture)


@pytest.mark.slow
def test_the_library_links_and_loads(tmp_path: Path) -> None:
    """In a process of its own, for a registered library cannot be taken back."""
    program = shutil.which("nvcc")
    if program is None:
        pytest.skip("nvcc is not on PATH")
    if torch.version.cuda is None:
        pytest.skip("a CPU build of torch cannot load a library that links CUDA")
    home, library = Path(torch.__file__).parent, tmp_path / "_cuda.abi3.so"
    sources = ["conv1_forward.cu", "lrn_pool_backward.cu", "bindings_conv1.cpp", "bindings_cuda.cpp"]
    flags = ["-std=c++17", "-arch=sm_90a", "-shared", "-cudart", "shared", "-Xcompiler", "-fPIC", "-DUSE_CUDA"]
    torchs = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{home / 'include'}", f"-L{home / 'lib'}"]
    libraries = ["-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10"]
    inputs = [ROOT / "csrc" / source for source in sources]
    subprocess.run([program, *flags, *torchs, *inputs, "-o", library, *libraries], check=True)
    code = f"import torch; torch.ops.load_library({str(library)!r}); "
    code += "print(*(getattr(torch.ops.alexnet_kernels_cuda, n).default._schema for n in ('conv1', 'stem')), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        "conv1(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? scale, int[] padding, bool relu) -> Tensor"
        in (done.stdout)
    ), done.stderr
    assert "bool ceil_mode, bool pool_first, bool keep) -> (Tensor, Tensor, Tensor)" in done.stdout
