"""Compile the launches a kernel module ships for a GPU that need not be there; print what became of them as JSON.

    python cross_compile.py MODULE ARCH [REGULAR_EXPRESSION]

MODULE has ``shipped()`` (labels and ``Launch``es planned on meta tensors), ARCH is 80, 90 or 100, and only labels that the
expression finds are compiled. It needs a process of its own: under ``TRITON_INTERPRET=1`` nothing can be compiled. Tests call
:func:`compile_shipped`, which starts that process.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.MULTILINE)
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Compiled:
    """One kernel as the machine would run it. Instructions are counted in the listing, not as executed."""

    label: str
    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    loop_instructions: int  # in the longest loop
    elements_per_thread: float
    opcodes: dict[str, int]  # by full name, LDG.E.128
    ptx: str
    serialized: int  # complaints of ptxas that it had to wait for each wgmma
    registers_feed: int  # wgmma whose first operand comes by way of registers, not straight from shared memory
    outstanding: list[int]  # for each loop with wgmma, how many may be unfinished when the next step begins
    blocks_per_sm: int

    def count(self, opcode: str) -> int:
        """How many instructions are ``opcode``, with any suffixes."""
        return sum(n for name, n in self.opcodes.items() if name.split(".")[0] == opcode)


@functools.cache
def compile_shipped(module: str, arch: int, pattern: str = "") -> dict[str, Compiled]:
    """What :func:`main` prints, by label; cached, since a file's tests look at the same listing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), environment.get("PYTHONPATH"))))
    command = [sys.executable, __file__, module, str(arch), pattern]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cross-compiling {module} for sm_{arch} failed:\n{done.stderr[-4000:]}")
    return {row["label"]: Compiled(**row) for row in json.loads(done.stdout)}


def _signature(launch: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[Any]]]:
    """Types, constants and divisibilities: what Triton's launcher finds in the arguments of a call."""
    import torch

    types = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.uint8: "*u8",
        torch.int64: "*i64",
        torch.int32: "*i32",
    }
    names = launch.kernel.arg_names
    signature, constants, attributes = dict.fromkeys(names, "constexpr"), dict(launch.constants), {}
    for place, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            continue
        if hasattr(value, "block_shape"):
            signature[name] = f"tensordesc<{types[value.base.dtype][1:]}{list(value.block_shape)}>"
            continue
        if isinstance(value, torch.Tensor):
            signature[name], divisible = types[value.dtype], True
        elif isinstance(value, int):
            signature[name], divisible = ("i32" if value < 2**31 else "i64"), value % 16 == 0
        else:
            signature[name], divisible = "fp32", False
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _longest_loop(instructions: list[tuple[int, str, str]]) -> int:
    """Instructions between the farthest backward branch and its target; 0 without one."""
    longest = 0
    for address, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            longest = max(longest, sum(int(target[1], 16) <= a <= address for a, _, _ in instructions))
    return longest


def _wgmma_loops(ttgir: str) -> list[int]:
    """The least ``pendings`` of the waits of each loop that has a wgmma; a loop ends where its own brace does."""
    loops = re.findall(r"^( *)(?:%\S+ = )?scf\.for .*?\n(.*?)^\1\}", ttgir, re.MULTILINE | re.DOTALL)
    return [
        min(map(int, re.findall(r"warp_group_dot_wait .*?pendings = (\d+)", body)), default=-1)
        for _, body in loops
        if "ttng.warp_group_dot " in body
    ]


def _serialized(tools: Path, ptx: str, arch: int) -> int:
    """How often ptxas says so; a hint that it only gives when it is asked to be verbose."""
    if "wgmma" not in ptx:
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [tools / "ptxas", f"-arch=sm_{arch}a", "-v", source.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return said.count("serialized")


def _compile(label: str, launch: Any, arch: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from alexnet_kernels.kernels._launch import resident

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    signature, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        listing, usage = (
            subprocess.run([tools / "cuobjdump", what, cubin.name], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-sass", "-res-usage")
        )
    found = [(int(a, 16), opcode, operands) for a, opcode, operands in _INSTRUCTION.findall(listing) if opcode != "NOP"]
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        label,
        launch.name,
        resources["REG"],
        resources["STACK"] + resources["LOCAL"],
        kernel.metadata.shared,
        len(found),
        _longest_loop(found),
        launch.elements / (32 * launch.num_warps),
        dict(Counter(opcode for _, opcode, _ in found)),
        kernel.asm["ptx"],
        _serialized(tools, kernel.asm["ptx"], arch),
        len(re.findall(r"ttng\.warp_group_dot [^\n]*: *tensor<", kernel.asm["ttgir"])),
        _wgmma_loops(kernel.asm["ttgir"]),
        resident(resources["REG"], kernel.metadata.shared, launch.num_warps),
    )


def main(module: str, arch: str, pattern: str = "") -> None:
    launches = importlib.import_module(module).shipped()
    chosen = {label: launch for label, launch in launches if re.search(pattern, label)}
    print(json.dumps([asdict(_compile(label, launch, int(arch))) for label, launch in chosen.items()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
