"""What the device can do at best: matrix products, a copy in memory, reading what is in the cache.

    pytest bench/test_ceilings.py --benchmark-only

Every share in a result is of these, measured in the same run. Operands are random: zeros are faster, and no network has them.
On a CPU the quickest of several ways counts: torch's matrix product, which is MKL's; a 3x3 convolution, which is oneDNN's; and
for bf16, for which few CPUs have instructions, the product of the operands cast to fp32. On an AMD EPYC with AVX-512 the
convolution does twice what the product does (2 cores, fp32: 504 and 224 GFLOP/s, the best of several runs, 2026-11-25). Of
eighteen shapes none was certainly quicker than 16x128x30x30, and in NCHW each does less than in channels_last.
The L2 read is a lower bound, of a simple kernel that reads 16 MiB again and again and keeps a sum.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alexnet_kernels.profiling import timer

from .cases import TRACKS, precision
from .rows import watched

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDE = {"fp32": 2048, "bf16": 1024} if DEVICE.type == "cpu" else dict.fromkeys(("bf16", "tf32", "fp32"), 8192)
COPY = (4 << 30) if DEVICE.type == "cuda" else (256 << 20)
L2_BYTES, L2_ROUNDS = 16 << 20, 32


Way = tuple[float, Callable[[], object]]  # how much a call does, and the call


def _row(name: str, ceiling: str, unit: str, budget, *ways: Way) -> dict[str, object]:
    """What the quickest of ``ways`` does in its time."""
    with watched(DEVICE) as seen:
        found = timer.measure(
            {str(i): [call] for i, (_, call) in enumerate(ways)},
            device=DEVICE,
            samples=budget.samples,
            sample_ms=budget.sample_ms,
            seconds=3 * budget.seconds,
        )
    amounts = {str(i): amount for i, (amount, _) in enumerate(ways)}
    best = max(found, key=lambda i: amounts[i] / found[i].median)
    timing, amount = found[best], amounts[best]
    row = {
        "section": "ceilings",
        "case": name,
        "ceiling": ceiling,
        "device": DEVICE.type,
        "watched": seen,
        "unit": unit,
    }
    return {
        **row,
        "amount": amount,
        "milliseconds": timing.median,
        "iqr": timing.iqr,
        "per second": amount / timing.median * 1e3,
        "contenders": {},
    }


def _convolution(dtype: torch.dtype) -> Way:
    """A 3x3 convolution without padding, whose every product counts: the quickest shape and layout that was found."""
    maps, weight = torch.randn(16, 128, 30, 30), torch.randn(128, 128, 3, 3)
    maps, weight = (t.to(dtype, memory_format=torch.channels_last) for t in (maps, weight))
    return 2.0 * 16 * 28 * 28 * weight.numel(), lambda: torch.nn.functional.conv2d(maps, weight)


@pytest.mark.parametrize("track", SIDE)
def test_matmul(track: str, collect, budget) -> None:
    side = SIDE[track]

    def measure() -> dict[str, object]:
        with precision(track):
            a, b = (torch.randn(side, side, device=DEVICE, dtype=TRACKS[track]) for _ in range(2))
            ways: list[Way] = [(2.0 * side**3, lambda: a @ b)]
            if DEVICE.type == "cpu":
                ways.append(_convolution(TRACKS[track]))
            if DEVICE.type == "cpu" and track == "bf16":
                ways.append((2.0 * side**3, lambda: (a.float() @ b.float()).bfloat16()))
            return _row(f"matmul {side} {track}", track, "FLOP", budget, *ways)

    collect(measure)


def test_copy(collect, budget) -> None:
    """Bytes read and written, of a buffer that no cache holds."""
    source = torch.randn(COPY // 4, device=DEVICE)
    target = torch.empty_like(source)
    name = f"copy {COPY >> 20} MiB"
    collect(lambda: _row(name, "copy", "B", budget, (2.0 * source.nbytes, lambda: target.copy_(source))))
    assert torch.equal(source, target)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU: a CPU's caches are a core's own")
def test_l2_read(collect, budget) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def read(x, out, BLOCKS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
        lane = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.int32)
        for i in tl.range(0, ROUNDS):  # each program another block in each round, so that none stays in its own cache
            block = (tl.program_id(0) + i * 37) % BLOCKS
            total ^= tl.load(x + block * BLOCK + lane)
        tl.store(out + tl.program_id(0) * BLOCK + lane, total)

    block = 4096
    blocks = L2_BYTES // (4 * block)
    x = torch.randint(-(2**31), 2**31 - 1, (blocks * block,), dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(x)

    def call() -> None:
        read[(blocks,)](x, out, blocks, L2_ROUNDS, block, num_warps=8)

    call()
    rows = x.view(blocks, block)
    want = torch.zeros_like(rows[0])
    for i in range(L2_ROUNDS):
        want ^= rows[i * 37 % blocks]
    assert torch.equal(out[:block], want)
    collect(lambda: _row("L2 read 16 MiB", "l2", "B", budget, (float(L2_BYTES) * L2_ROUNDS, call)))
