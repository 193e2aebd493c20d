"""What the compiler makes of every launch a kernel module ships, for GPUs that need not be there."""

from __future__ import annotations

import re

import pytest
from cross_compile import Compiled, compile_shipped

LRN = "alexnet_kernels.kernels.lrn"
SHARED_LIMIT = 232_448  # bytes a block, sm_90
# instructions a lane can issue per byte of memory traffic on an H200: 132 SMs · 128 lanes · 1.755 GHz / 4.3 TB/s
PER_BYTE = 6.9


def fits(compiled: Compiled) -> None:
    assert compiled.spill_bytes == 0, compiled
    assert compiled.count("STL") == compiled.count("LDL") == 0, compiled
    assert compiled.shared_bytes <= SHARED_LIMIT, compiled


def itemsize(compiled: Compiled) -> int:
    return 4 if "float32" in compiled.label else 2


def keeps_up_with_memory(compiled: Compiled, per_element: float) -> None:
    """Issuing the instructions takes no longer than moving the bytes: each tensor once."""
    tensors = 2 if "forward" in compiled.kernel else 3
    assert per_element < PER_BYTE * tensors * itemsize(compiled), compiled


def moves_vectors(compiled: Compiled) -> None:
    """A thread's 8 channels travel 16 bytes at a time and stay in its registers: no shared memory, no barrier."""
    vectors = compiled.elements_per_thread * itemsize(compiled) / 16
    reads = vectors
    if compiled.kernel == "vector_backward":  # both x and g; four channels beside a vector are 16 bytes in fp32
        reads = 2 * vectors + (2 * compiled.elements_per_thread / 8 if itemsize(compiled) == 4 else 0)
    assert compiled.opcodes["LDG.E.128"] == reads, compiled
    assert compiled.opcodes["STG.E.128"] == vectors, compiled
    assert compiled.count("STG") == vectors, compiled
    assert compiled.shared_bytes == compiled.count("BAR") == compiled.count("SHFL") == 0, compiled
    keeps_up_with_memory(compiled, compiled.instructions / compiled.elements_per_thread)


def walks_channels(compiled: Compiled) -> None:
    """One loop of 8 channels a step, and nothing through shared memory."""
    assert compiled.loop_instructions > 0, compiled
    assert compiled.shared_bytes == compiled.count("BAR") == 0, compiled
    assert compiled.count("STG") == 8, compiled
    keeps_up_with_memory(compiled, compiled.loop_instructions / 8)


CHECKS = {"vector": moves_vectors, "ring": walks_channels, "general": fits}


# A second or less a kernel, a process a form. Fast: conv1's map, in the two towers; the other launches differ in one constant.
@pytest.mark.parametrize("form", CHECKS)
def test_lrn_on_sm_90(form: str) -> None:
    compiled = compile_shipped(LRN, 90, rf"^{form}_.* 96x55x55 .*groups 2$")
    assert {c.kernel for c in compiled.values()} == {f"{form}_forward", f"{form}_backward"}
    for one in compiled.values():
        fits(one)
        CHECKS[form](one)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_lrn_everywhere(arch: int) -> None:
    compiled = compile_shipped(LRN, arch)
    assert len(compiled) > 60
    for one in compiled.values():
        fits(one)
        if arch == 90:
            CHECKS[one.kernel.split("_")[0]](one)


POOLED = ("pool", "fused", "fused_backward")
# conv1's map, in the two towers, in bf16: up to ten seconds a kernel
SHIPPED = {
    "pool": r"^(pool_forward|cell_backward) bfloat16 .* 96x55x55 window 3-3-2",
    "fused": r"^strip_forward bfloat16 256x96x55x55 groups 2$",
    "fused_backward": r"^vector_gradient bfloat16 256x96x55x55 groups 2 bias$",
}
# registers, and instructions an element of x, a little above what docs/kernels/ states
LIMITS = {
    "pool_forward nhwc": (64, 18),
    "cell_backward nhwc": (72, 15),
    "strip_forward": (128, 32),
    "ring_normalise": (56, 24),
    "vector_gradient": (128, 58),
}
PAPER_ROWS = 55 * 55 / (27 * 27)  # elements of x for each of y


def per_element(compiled: Compiled) -> float:
    """Instructions an element of x, those outside the longest loop left out where a loop does the work."""
    work = compiled.loop_instructions or compiled.instructions
    if compiled.kernel == "pool_forward":
        return compiled.instructions / compiled.elements_per_thread / PAPER_ROWS
    if compiled.kernel == "strip_forward":  # a turn of the loop is two rows of four columns
        return work / (8 * 16 / itemsize(compiled))
    return work / 8 if compiled.kernel.startswith("ring") else work / compiled.elements_per_thread


def keeps_its_limits(compiled: Compiled) -> None:
    innermost = f"{compiled.kernel} nhwc" if "nhwc" in compiled.label else compiled.kernel
    registers, instructions = LIMITS.get(innermost, (255, 1000))
    assert compiled.registers <= registers and per_element(compiled) <= instructions, (per_element(compiled), compiled)
    if "nhwc" in compiled.label or compiled.kernel in ("strip_forward", "vector_gradient"):
        assert compiled.opcodes["LDG.E.128"] and compiled.opcodes["STG.E.128"], compiled


@pytest.mark.parametrize("module", POOLED)
def test_pool_on_sm_90(module: str) -> None:
    compiled = compile_shipped(f"alexnet_kernels.kernels.{module}", 90, SHIPPED[module])
    assert compiled
    for one in compiled.values():
        fits(one)
        keeps_its_limits(one)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("module", POOLED)
def test_pool_everywhere(module: str, arch: int) -> None:
    compiled = compile_shipped(f"alexnet_kernels.kernels.{module}", arch)
    assert len(compiled) > 20
    for one in compiled.values():
        fits(one)
        if arch == 90 and re.search(r"bfloat16 (256x96|.* 96x55x55 window 3-3-2)", one.label):
            keeps_its_limits(one)
