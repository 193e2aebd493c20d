"""The list of all shipped launches, and ``describe --kernels``, which compiles them and prints what they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_kernels import doctor
from alexnet_kernels.kernels import catalogue
from alexnet_kernels.kernels._launch import Launch, resident


def test_every_file_that_ships_launches_is_listed() -> None:
    files = Path(catalogue.__file__).parent.glob("*.py")
    shipping = {file.stem for file in files if "def shipped(" in file.read_text()}
    assert shipping == set(catalogue.FAMILIES)
    assert {name.split()[0] for name, _ in catalogue.launches()} == shipping


@pytest.mark.parametrize(
    ("family", "constants", "tile"),
    [
        ("conv", {"BLOCK": (128, 128, 64, 64, 0)}, "128x(128+64)x64"),
        ("conv", {"BLOCK": (128, 128, 0, 32, 16)}, "128x128x(32+16)"),
        ("conv", {"BLOCK": (128, 64, 64, 8)}, "128x64x64"),
        ("weights", {"BLOCK_M": 128, "REST_M": 64, "BLOCK_N": 256, "REST_N": 0, "BLOCK_K": 64}, "(128+64)x256x64"),
        ("lrn", {"BLOCK": 256}, "256"),
    ],
)
def test_a_tile_is_rows_columns_depth(family: str, constants: dict[str, object], tile: str) -> None:
    assert catalogue._tile(Launch(None, (1,), (), constants, 4, 1)) == tile, family


def test_the_command_compiles_for_a_gpu_that_is_not_there() -> None:
    """In a process of its own: an interpreted function cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    only = "^lrn vector_forward bfloat16 nhwc 96x55x55 size 5 groups 1$"
    command = [sys.executable, "-m", "alexnet_kernels", "describe", "--kernels", "--only", only]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    data = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=True).stdout
    (row,) = json.loads(data)["kernels"]
    assert row["label"] == only[1:-1] and row["spill_bytes"] == 0
    assert row["blocks_per_sm"] == resident(row["registers"], row["shared_bytes"], row["warps"]) > 1
    assert f"{row['registers']}" in printed and "CTAs" in printed


def test_what_cannot_be_listed_says_why() -> None:
    with pytest.raises(ValueError, match="pattern='conv9' finds none of the launches of lrn, pool,"):
        doctor.shipped_kernels("conv9")
    with pytest.raises(ValueError, match=r"pattern='\(' is no regular expression .*; put a backslash before"):
        doctor.shipped_kernels("(")
    with pytest.raises(ValueError, match="arch=75 is none of the GPUs"):
        doctor.shipped_kernels(arch=75)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="nothing is interpreted where there is a GPU")
def test_an_interpreted_kernel_is_not_compiled() -> None:
    with pytest.raises(RuntimeError, match="unset it to compile"):
        doctor.shipped_kernels("^optim ")
