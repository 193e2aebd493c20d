"""The optional compiled libraries: ``_cpu`` (a C++ compiler) and ``_cuda`` (nvcc), built against LibTorch's stable ABI.

``ALEXNET_KERNELS_BUILD`` = ``auto`` (default): build what can be built; what cannot leaves its reason in a text file in the
package, which ``alexnet-kernels doctor`` shows, and never breaks the installation. ``on``: the CPU library is built or the
installation fails with the compiler's message. ``off``: pure Python. Everything else is in ``pyproject.toml``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

VARIABLE = "ALEXNET_KERNELS_BUILD"
PACKAGE = "alexnet_kernels"
SOURCES = {
    "cpu": ["csrc/lrn_pool_cpu.cpp", "csrc/bindings_cpu.cpp"],
    "cuda": [
        "csrc/lrn_pool_backward.cu",
        "csrc/conv1_forward.cu",
        "csrc/conv1_backward.cu",
        "csrc/conv1_dgrad.cu",
        "csrc/bindings_cuda.cpp",
        "csrc/bindings_conv1.cpp",
        "csrc/bindings_conv1_backward.cpp",
    ],
}
TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10, the oldest that is supported
LIMITED = "-DPy_LIMITED_API=0x030a0000"
# Values never depend on the instruction set: no contraction to fused multiply-add, no fast-math. The two others only say
# that nobody reads errno or the floating-point flags, without which no root is vectorised.
CPU_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]


class Unable(Exception):
    """Why a library cannot be built here, in one line or in the compiler's words."""


def mode() -> str:
    value = os.environ.get(VARIABLE, "") or "auto"
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{VARIABLE}={value!r} is no way to build; use 'auto', 'on' or 'off'")
    return value


def torch_root() -> Path:
    """Where torch lies, without importing it."""
    found = importlib.util.find_spec("torch")
    root = Path(found.origin).parent if found and found.origin else None
    if root is None or not (root / "include/torch/csrc/stable/library.h").is_file():
        raise Unable(
            "torch 2.10 or newer is not there while building; install it, then: pip install --no-build-isolation ."
        )
    return root


def cpu_compiler() -> list[str]:
    if sys.platform == "win32":
        raise Unable("not built on Windows in this version")
    named = os.environ.get("CXX")
    for words in [shlex.split(named)] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(words[0]):
            return words
    raise Unable(f"no C++ compiler: {named or 'g++, clang++ and c++'} not found on PATH; install g++ and rebuild")


def toolkit() -> Path:
    """The CUDA toolkit's root. An nvcc on PATH may be a wrapper elsewhere, so nvcc itself is asked."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home, "bin/nvcc")) if home else "nvcc")
    if nvcc is None:
        raise Unable(f"no nvcc {'in CUDA_HOME=' + home if home else 'on PATH'}; install the CUDA toolkit and rebuild")
    answer = run([nvcc, "--dryrun", "-x", "cu", os.devnull], check=False)
    top = re.search(r"^#\$ TOP=(.+)$", answer, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def check_major(nvcc: str) -> None:
    """A driver that runs torch's CUDA may be too old for the next major version, and then every launch would fail."""
    of_torch = re.search(r"^cuda\b.*'(\d+)\.", (torch_root() / "version.py").read_text(), re.MULTILINE)
    of_nvcc = re.search(r"release (\d+)\.", run([nvcc, "--version"], check=False))
    if of_torch and of_nvcc and of_torch[1] != of_nvcc[1]:
        raise Unable(
            f"{nvcc} is of CUDA {of_nvcc[1]}, torch of CUDA {of_torch[1]}; "
            f"set CUDA_HOME to a toolkit of CUDA {of_torch[1]} and rebuild"
        )


def run(command: list[str], check: bool = True) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if check and done.returncode:
        raise Unable(f"{shlex.join(command)}\n{done.stdout.strip()}")
    return done.stdout


def headers() -> list[str]:
    return ["-isystem", str(torch_root() / "include"), f"-I{sysconfig.get_path('include')}", TORCH, LIMITED]


def libraries(*names: str) -> list[str]:
    """Linked by name only: at run time they are those of the torch that is already loaded."""
    return [f"-L{torch_root() / 'lib'}", *(f"-l{name}" for name in names)]


def cpu_command(output: str) -> list[str]:
    flags = [*CPU_FLAGS, "-shared", *headers(), *SOURCES["cpu"]]
    return [*cpu_compiler(), *flags, "-o", output, *libraries("torch_cpu", "torch")]


def cuda_command(output: str) -> list[str]:
    missing = [source for source in SOURCES["cuda"] if not Path(source).is_file()]
    if missing:
        raise Unable(f"no CUDA sources in this version ({', '.join(missing)})")
    if not any((torch_root() / "lib").glob("*torch_cuda.*")):
        raise Unable("this torch has no CUDA")
    nvcc = str(toolkit() / "bin/nvcc")
    check_major(nvcc)
    known = run([nvcc, "--list-gpu-arch"], check=False)
    codes = [("80", "80"), ("90a", "90a"), ("100", "100")]
    targets = [
        f"-gencode=arch=compute_{arch},code=sm_{code}" for arch, code in codes if f"compute_{arch.rstrip('a')}" in known
    ]
    flags = [
        "-O3",
        "-std=c++17",
        "-shared",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "--threads=0",
        "-DUSE_CUDA",
        *headers(),
    ]
    targets.append("-gencode=arch=compute_80,code=compute_80")  # PTX, for what comes later
    return [nvcc, *flags, *targets, *SOURCES["cuda"], "-o", output, *libraries("torch_cuda", "torch_cpu", "torch")]


COMMANDS = {"cpu": cpu_command, "cuda": cuda_command}


def why_not(name: str) -> str | None:
    """What can be known before compiling."""
    if mode() == "off":
        return f"{VARIABLE}=off when it was installed"
    try:
        COMMANDS[name]("")
    except Unable as reason:
        if mode() == "on" and name == "cpu":
            raise SystemExit(f"{VARIABLE}=on, but the library for the CPU cannot be built: {reason}") from None
        return str(reason)
    return None


def note(folder: Path, name: str, reason: str | None) -> None:
    """Leave the reason in the package, in place of the library; None: there is a library and no reason."""
    text = folder / PACKAGE / f"_{name}.txt"
    text.unlink(missing_ok=True)
    if reason is not None:
        text.parent.mkdir(parents=True, exist_ok=True)
        text.with_suffix(".abi3.so").unlink(missing_ok=True)
        text.write_text(reason + "\n", encoding="utf-8")


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        for name, reason in REASONS.items():
            if reason is not None:
                note(Path() if self.editable_mode else Path(self.build_lib), name, reason)


class BuildLibraries(build_ext):
    def run(self) -> None:
        self.folder = Path() if self.inplace else Path(self.build_lib)  # while it builds, `inplace` is off
        super().run()

    def build_extensions(self) -> None:
        built = []
        for extension in self.extensions:
            name = extension.name.rpartition("._")[2]
            output = Path(self.get_ext_fullpath(extension.name))
            output.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.announce(run(COMMANDS[name](str(output))), level=2)
            except Unable as reason:
                if mode() == "on":
                    raise SystemExit(
                        f"{VARIABLE}=on, and the library {extension.name} does not compile:\n{reason}"
                    ) from None
                self.warn(f"{extension.name} was not built: {reason}")
                note(self.folder, name, str(reason))
                continue
            note(self.folder, name, None)
            built.append(extension)
        self.extensions = built


REASONS = {name: why_not(name) for name in COMMANDS}

setup(
    ext_modules=[
        Extension(f"{PACKAGE}._{name}", SOURCES[name], py_limited_api=True)
        for name, reason in REASONS.items()
        if reason is None
    ],
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
