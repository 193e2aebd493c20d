"""Builds what host execution needs, once a session, by g++ alone."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", "-x", "c++"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
KERNELS = ["csrc/lrn_pool_backward.cu"]
CONV1_BACKWARD = ["csrc/conv1_backward.cu", "csrc/conv1_dgrad.cu", "tests/host/conv1_backward_driver.cpp"]
CONV1 = ["csrc/conv1_forward.cu", "tests/host/conv1_driver.cpp"]


def build(target: Path, sources: list[str], flags: list[str]) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("host execution needs g++")
    subprocess.run(
        [compiler, *FLAGS, *flags, *(str(ROOT / source) for source in sources), "-o", str(target)], check=True
    )
    return target


@pytest.fixture(scope="session")
def build_host() -> Callable[[Path, list[str], bool], Path]:
    """Builds a program of one test's own: its target, its sources, whether with sanitizers."""
    return lambda target, sources, sanitize: build(target, sources, ["-O0", *(SANITIZERS if sanitize else [])])


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("host") / "kernels.so"
    return build(target, [*KERNELS, "tests/host/driver.cpp"], ["-O2", "-fPIC", "-shared"])


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("host") / "sanitized"
    return build(target, [*KERNELS, "tests/host/driver.cpp"], ["-O0", *SANITIZERS])


@pytest.fixture(scope="session")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("host") / "beyond"
    return build(target, [*KERNELS, "tests/host/beyond_driver.cpp"], ["-O1", "-fsanitize=undefined", SANITIZERS[1]])


@pytest.fixture(scope="session")
def conv1_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("host") / "conv1.so", CONV1, ["-O1", "-fPIC", "-shared"])


@pytest.fixture(scope="session")
def conv1_sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("host") / "conv1_sanitized", CONV1, ["-O0", *SANITIZERS])


@pytest.fixture(scope="session", params=["plain", "sanitized"])
def tensor_core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("host") / "tensor_core"
    return build(target, ["tests/host/tensor_core.cu"], ["-O1", *(SANITIZERS if request.param == "sanitized" else [])])


@pytest.fixture(scope="session", params=["plain", "sanitized"])
def warpgroup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("host") / "warpgroup"
    return build(target, ["tests/host/warpgroup.cu"], ["-O1", *(SANITIZERS if request.param == "sanitized" else [])])


@pytest.fixture(scope="session", params=["plain", "sanitized"])
def plants(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    sanitize = request.param == "sanitized"
    target = tmp_path_factory.mktemp("host") / "plants"
    return build(target, ["tests/host/plants.cu"], ["-O0", *(SANITIZERS if sanitize else [])]), sanitize


@pytest.fixture(scope="session")
def conv1_backward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("host") / "conv1_backward.so"
    return build(target, CONV1_BACKWARD, ["-O2", "-fPIC", "-shared"])


@pytest.fixture(scope="session")
def conv1_backward_sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("host") / "conv1_backward"
    return build(target, CONV1_BACKWARD, ["-O1", *SANITIZERS])


@pytest.fixture
def plant(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """Builds the first convolution's backward with one place of a source changed."""

    def planted(file: str, right: str, wrong: str) -> Path:
        sources = tmp_path / "csrc"
        shutil.copytree(ROOT / "csrc", sources)
        text = (sources / file).read_text()
        assert text.count(right) == 1
        (sources / file).write_text(text.replace(right, wrong))
        changed = [str(tmp_path / source) if source.startswith("csrc") else source for source in CONV1_BACKWARD]
        return build(tmp_path / "planted.so", changed, ["-O1", "-fPIC", "-shared"])

    return planted
