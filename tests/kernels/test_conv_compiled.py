"""What the compiler makes of the convolution's launches, for GPUs that need not be there.

That there are tensor core instructions says little: a kernel can have them and wait for each. So the pipelines are looked at.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from cross_compile import Compiled, compile_shipped

from alexnet_kernels.kernels import conv

MODULE = "alexnet_kernels.kernels.conv"
SHARED_LIMIT = 232_448  # bytes a block, sm_90
# One of each kind: 3 to 10 seconds in all.
REPRESENTATIVE = (
    r"^(batch_tile paper conv[234] bfloat16 batch 256|batch_tile paper conv3 tf32 batch 256|group_major paper conv2 bfloat16"
    r"|pixel_pair paper conv3|pointer_rows paper conv2 bfloat16 batch 256|pointer_rows paper conv3 (bfloat16|ieee) batch 1$)"
)
# Registers a thread, a little above what docs/kernels/conv.md states, and blocks on a multiprocessor.
LIMITS = {
    "batch_tile paper conv2 bfloat16 batch 256": (192, 2),
    "batch_tile paper conv3 bfloat16 batch 256": (192, 2),
    "batch_tile paper conv4 bfloat16 batch 256": (128, 1),
    "batch_tile paper conv3 tf32 batch 256": (240, 2),
    "group_major paper conv2 bfloat16 batch 256": (192, 2),
    "pixel_pair paper conv3 bfloat16 batch 256": (168, 1),
    "pointer_rows paper conv2 bfloat16 batch 256": (232, 2),
    "pointer_rows paper conv3 bfloat16 batch 1": (40, 5),
}


@functools.cache
def planned() -> dict[str, dict[str, Any]]:
    return dict(conv.tiles())


def fits(compiled: Compiled) -> None:
    assert compiled.spill_bytes == 0, compiled
    assert compiled.count("STL") == compiled.count("LDL") == 0, compiled
    assert compiled.shared_bytes <= SHARED_LIMIT, compiled
    # The ReLU: max alone would drop a NaN, which the interpreter does not do.
    assert "max.NaN.f32" in compiled.ptx, compiled


def keeps_tensor_cores_busy(compiled: Compiled) -> None:
    """sm_90: warpgroup products straight from shared memory, none waited for before the next is begun, in one main loop."""
    tile = planned()[compiled.label]
    assert compiled.shared_bytes <= tile["shared bytes"] + 512, compiled
    if " ieee " in compiled.label:
        assert compiled.count("HGMMA") == 0 < compiled.count("FFMA"), compiled
        return
    assert compiled.count("HGMMA") and not compiled.serialized, compiled
    if " small " in compiled.label:  # 3 channels: single elements, which no asynchronous copy moves
        return
    copies = "LDGSTS" if tile["form"] == "pointer_rows" else "UTMALDG"
    assert compiled.count(copies), compiled
    if " tf32x3 " in compiled.label:  # which splits its operands, in registers
        assert compiled.registers_feed == 3, compiled
        return
    assert compiled.registers_feed == 0 and compiled.shared_bytes >= tile["shared bytes"], compiled
    if tile["form"] == "pixel_pair":  # 2 KW products a step on two accumulators, waited for once
        assert compiled.outstanding == [0] and compiled.count("HGMMA") >= 10, compiled
        return
    parts = 1 + (tile["block_n"] & (tile["block_n"] - 1) > 0)  # accumulators
    # 48 channels take a second loop, over what a step leaves.
    assert compiled.outstanding == [parts] * tile["loops"], compiled


def test_one_of_each_kind_on_sm_90() -> None:
    compiled = compile_shipped(MODULE, 90, REPRESENTATIVE)
    assert {c.kernel for c in compiled.values()} == {"batch_tile", "pixel_pair", "pointer_rows"}
    assert LIMITS.keys() <= compiled.keys()
    for one in compiled.values():
        fits(one)
        keeps_tensor_cores_busy(one)
    for label, (registers, blocks) in LIMITS.items():
        assert compiled[label].registers <= registers, compiled[label]
        assert compiled[label].blocks_per_sm == blocks, compiled[label]


@pytest.mark.slow
def test_all_on_sm_90() -> None:
    compiled = compile_shipped(MODULE, 90)
    assert compiled.keys() == planned().keys()
    for one in compiled.values():
        fits(one)
        keeps_tensor_cores_busy(one)


@pytest.mark.slow
def test_pointer_rows_on_sm_80() -> None:
    """The form that is taken there: asynchronous copies and tensor cores, in the 163 KB a block may have."""
    compiled = compile_shipped(MODULE, 80, "^pointer_rows")
    assert len(compiled) > 15
    for one in compiled.values():
        fits(one)
        assert one.shared_bytes <= 166_912 and (one.count("LDGSTS") or " small " in one.label), one
        assert one.count("HMMA") or " ieee " in one.label, one


@pytest.mark.slow
def test_all_but_pairs_on_sm_100() -> None:
    """Triton 3.6 makes a trap of a step with several products on one accumulator: ``conv.plan`` refuses pairs there."""
    compiled = compile_shipped(MODULE, 100, "^(?!pixel_pair)")
    assert len(compiled) > 35
    for one in compiled.values():
        fits(one)
        assert one.count("UTCHMMA") or " ieee " in one.label or " tf32x3 " in one.label, one
        assert one.count("UTMALDG") or one.label.startswith("pointer_rows"), one
