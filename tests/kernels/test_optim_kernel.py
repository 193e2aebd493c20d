"""The optimiser's kernel by itself: what it is compiled to, and that it leaves its neighbours alone."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from cross_compile import Compiled, compile_shipped

from alexnet_kernels.kernels import optim as kernel
from alexnet_kernels.kernels._launch import block_of

OPTIM = "alexnet_kernels.kernels.optim"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PER_THREAD = kernel.CONFIGS["sgd"].block // (32 * kernel.CONFIGS["sgd"].num_warps)


@pytest.mark.parametrize("dtype", kernel.DTYPES)
@pytest.mark.parametrize("size", [1, 15, 4095, 4096, 4097, 8192])
def test_writes_just_its_own_elements(size: int, dtype: torch.dtype) -> None:
    """Each tensor inside a larger one; power of two coefficients and integers, so that the numbers are exact."""
    kinds = (dtype, dtype, torch.float32, torch.float32)
    around = [torch.full((size + 32,), 3.0, dtype=kind, device=DEVICE) for kind in kinds]
    w, g, b, m = (t[16 : 16 + size] for t in around)
    g.copy_(torch.arange(size) % 32)
    kernel.sgd([w], [g], [b], [m if dtype != torch.float32 else w], 0.25, 0.5, 0.0, False, False, None, kernel.Table())
    buffer = 1.5 + torch.arange(size, device=DEVICE) % 32
    assert torch.equal(b, buffer) and torch.equal(w.float(), 3 - 0.25 * buffer)
    assert all(bool((t[:16] == 3).all() and (t[16 + size :] == 3).all()) for t in around)


def test_many_tensors_in_one_launch() -> None:
    sizes = [5, 4096, 0, 9000, 1]
    weights = [torch.zeros(size, device=DEVICE) for size in sizes]
    grads = [torch.full((size,), float(i + 1), device=DEVICE) for i, size in enumerate(sizes)]
    table = kernel.Table()
    kernel.sgd(weights, grads, weights, weights, 1.0, 0.0, 0.0, False, True, None, table)
    assert all(torch.equal(w, g) for w, g in zip(weights, grads, strict=True))
    assert table.chunks is not None and table.chunks.tolist() == [[0, 0], [1, 0], [3, 0], [3, 1], [3, 2], [4, 0]]


@pytest.mark.skipif(not INTERPRETED, reason="records what the interpreter reads and writes")
def test_chunks_beyond_int32() -> None:
    """The first element of a chunk is 64 bits wide: the last chunk of a tensor of 2^33 elements."""

    @triton.jit
    def first(chunks, out, BLOCK: tl.constexpr):
        start, _, _ = block_of(tl.load(chunks + 1), 2**33, BLOCK)
        tl.store(out, start)

    out = torch.zeros(1, dtype=torch.int64)
    first[(1,)](torch.tensor([0, 2**21 - 1], dtype=torch.int32), out, BLOCK=4096)
    assert out.item() == 2**33 - 4096


def fits(compiled: Compiled) -> None:
    assert compiled.spill_bytes == 0, compiled
    assert compiled.count("STL") == compiled.count("LDL") == 0, compiled
    assert compiled.registers <= 128 and compiled.shared_bytes <= 16_384, compiled  # 65,536 registers: two blocks an SM
    if "unaligned" not in compiled.label:  # a full chunk travels 16 bytes a thread at a time
        moving, half = "plain" not in compiled.label, "float32" not in compiled.label
        wide = PER_THREAD // 4 * (1 + moving)
        narrow = PER_THREAD // 8 if half else PER_THREAD // 4
        assert compiled.opcodes["LDG.E.128"] == wide + narrow, compiled
        assert compiled.opcodes["STG.E.128"] == wide + (narrow if half else 0), compiled
    # as torch rounds: decay, momentum and step are one fused operation each, and momentum's product is rounded before the sum
    if compiled.label.endswith("aligned"):
        assert compiled.opcodes["FFMA"] == 2 * 3 * PER_THREAD and compiled.opcodes["FADD"] >= 2 * PER_THREAD, compiled


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_sm_90(dtype: str) -> None:
    compiled = compile_shipped(OPTIM, 90, rf"{dtype} (un)?aligned$")
    assert len(compiled) == 2
    for one in compiled.values():
        fits(one)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_everywhere(arch: int) -> None:
    compiled = compile_shipped(OPTIM, arch)
    assert len(compiled) == 24
    for one in compiled.values():
        fits(one)
