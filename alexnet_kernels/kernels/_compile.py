"""Planned launches, compiled for a GPU that need not be there, and what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._launch import Launch, resident

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"  # cuobjdump and ptxas come with Triton
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Compiled:
    """One launch as machine code; ``asm`` holds the stages on the way, ``cubin``, ``ptx`` and ``ttgir`` among them."""

    registers: int  # of a thread
    spill_bytes: int  # of a thread
    shared_bytes: int  # of a block
    num_warps: int
    asm: dict[str, Any]

    @property
    def blocks_per_sm(self) -> int:
        """Blocks (CTAs) that one multiprocessor of an H100 or H200 holds at once."""
        return resident(self.registers, self.shared_bytes, self.num_warps)


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """``launch`` for sm_``arch``: 80, 90 or 100.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET=1`` there is nothing that could be compiled.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError(f"TRITON_INTERPRET=1 makes {launch.name} a Python function; unset it to compile")
    signature, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = inspect(kernel.asm["cubin"], "-res-usage")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = found["STACK"] + found["LOCAL"]
    return Compiled(found["REG"], spilled, kernel.metadata.shared, launch.num_warps, dict(kernel.asm))


def inspect(cubin: bytes, what: str) -> str:
    """What cuobjdump says of machine code: ``"-res-usage"``, ``"--dump-sass"``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[Any]]]:
    """Types, constants and divisibilities: what Triton's launcher finds in the arguments of a call."""
    names = launch.kernel.arg_names
    signature, constants, attributes = dict.fromkeys(names, "constexpr"), dict(launch.constants), {}
    for place, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):  # Triton makes constants of these
            constants[name] = value
            continue
        divisible = False
        if hasattr(value, "block_shape"):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            signature[name], divisible = "*" + _TYPES[value.dtype], True
        elif isinstance(value, int):
            signature[name], divisible = ("i32" if value < 2**31 else "i64"), value % 16 == 0
        else:
            signature[name] = "fp32"
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes
