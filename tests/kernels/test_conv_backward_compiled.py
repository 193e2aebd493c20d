"""What the compiler makes of the gradients of a convolution, for GPUs that need not be there."""

from __future__ import annotations

import pytest
from cross_compile import Compiled, compile_shipped

MODULE = "alexnet_kernels.kernels.conv_backward"
SHARED_LIMIT = 232_448  # bytes a block, sm_90
# registers, a little above what docs/kernels/conv_backward.md states, by kernel and layer; one block a multiprocessor has 255
REGISTERS = {
    "input_tile conv2": 104,
    "input_tile conv3": 252,
    "input_tile conv4": 176,
    "input_tile conv5": 176,
    "weight_tile conv2": 160,
    "weight_tile conv3": 254,
    "weight_tile conv4": 184,
    "weight_tile conv5": 136,
}


def fits(compiled: Compiled) -> None:
    assert compiled.spill_bytes == 0, compiled
    assert compiled.count("STL") == compiled.count("LDL") == 0, compiled
    assert compiled.shared_bytes <= SHARED_LIMIT, compiled


def runs_ahead(compiled: Compiled) -> None:
    """One loop; its wgmma read both operands from shared memory, and the next step begins before they are done."""
    assert compiled.count("HGMMA") and not compiled.serialized and not compiled.registers_feed, compiled
    assert len(compiled.outstanding) == 1 and compiled.outstanding[0] >= 1, compiled
    if compiled.kernel.endswith("tile"):
        assert compiled.count("UTMALDG") and not compiled.count("LDGSTS"), compiled
        layer = next(word for word in compiled.label.split() if word.startswith("conv"))
        assert compiled.registers <= REGISTERS[f"{compiled.kernel} {layer}"], compiled
    else:
        assert compiled.count("LDGSTS"), compiled


def check_sm_90(compiled: Compiled) -> None:
    fits(compiled)
    if "nhwc" in compiled.label and "float32" not in compiled.label and compiled.kernel != "sum_shares":
        runs_ahead(compiled)
    elif (
        "tf32" in compiled.label and compiled.kernel != "sum_shares"
    ):  # one order of tf32 goes through registers to be turned
        assert compiled.count("HGMMA") and not compiled.serialized, compiled


# Half a second to a second a kernel. Fast: the network's middle batch in bf16, and one layer in rows.
FAST = r"bfloat16 nhwc conv([2-5] batch 256( mask bias)?|2 batch 8( mask bias)?)$"


def test_alexnet_on_sm_90() -> None:
    compiled = compile_shipped(MODULE, 90, FAST)
    assert {c.kernel for c in compiled.values()} == {
        "input_tile",
        "input_rows",
        "weight_tile",
        "weight_rows",
        "sum_shares",
    }
    assert len(compiled) == 20
    for one in compiled.values():
        check_sm_90(one)


@pytest.mark.slow
def test_everything_on_sm_90() -> None:
    compiled = compile_shipped(MODULE, 90)
    assert len(compiled) == 208
    for one in compiled.values():
        check_sm_90(one)


@pytest.mark.slow
def test_rows_on_sm_80() -> None:
    """GPUs without wgmma take rows: their operands are fetched ahead by cp.async, those of descriptors would not be."""
    compiled = compile_shipped(MODULE, 80, r"^(input_rows|weight_rows|sum_shares) ")
    assert compiled
    for one in compiled.values():
        fits(one)
        if "nhwc" in one.label and one.kernel != "sum_shares":
            assert one.count("LDGSTS") and (one.count("HMMA") or "ieee" in one.label), one


@pytest.mark.slow
def test_alexnet_on_sm_100() -> None:
    compiled = compile_shipped(MODULE, 100, r"bfloat16 nhwc conv[2-5] batch (8|64|256)")
    assert compiled
    for one in compiled.values():
        fits(one)
