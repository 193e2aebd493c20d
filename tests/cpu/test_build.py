"""The optional build: every mode, with and without a compiler, and a library that does not load."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from alexnet_kernels import _extension, dispatch
from alexnet_kernels import functional as F

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What a distribution is made from, nothing built."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    for path in (*ROOT.glob("*.md"), ROOT / "CITATION.cff"):
        shutil.copy(path, copy)
    (copy / "bench/results").mkdir(parents=True)
    shutil.copy(ROOT / "bench/results/PENDING.md", copy / "bench/results")
    for name in ("csrc", "docs", "alexnet_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "_*.txt", "__pycache__"))
    return copy


def python(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_HOME": "/nowhere", "PIP_NO_INPUT": "1", **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.fixture
def build(copy: Path, tmp_path: Path):
    """``python setup.py build`` of a copy, into ``tmp_path/lib``."""

    def run(**variables: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        done = python("setup.py", "-q", "build", "--build-lib", tmp_path / "lib", cwd=copy, **variables)
        return done, tmp_path / "lib" / "alexnet_kernels"

    return run


@pytest.fixture
def broken_compiler(tmp_path: Path) -> str:
    path = tmp_path / "c++"
    path.write_text("#!/bin/sh\necho 'lrn_pool_cpu.cpp:1: error: the planted one' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def libraries(package: Path) -> list[str]:
    return [path.name for path in package.iterdir() if path.suffix == ".so"]


def test_off_builds_nothing(build) -> None:
    done, package = build(ALEXNET_KERNELS_BUILD="off")
    assert done.returncode == 0, done.stderr
    assert libraries(package) == []
    assert "ALEXNET_KERNELS_BUILD=off" in (package / "_cpu.txt").read_text()


def test_without_a_compiler_the_reason_stays(build, monkeypatch: pytest.MonkeyPatch) -> None:
    done, package = build(CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert libraries(package) == []
    monkeypatch.setattr(_extension, "_FOLDER", package)
    _extension.why_not.cache_clear()
    try:
        for name, reason in (("cpu", "no C++ compiler: no-such-compiler not found"), ("cuda", "")):
            assert reason in str(_extension.why_not(name))
        with dispatch.recording() as used:
            F.local_response_norm(torch.ones(1, 4, 2), 3)
        assert used == {"reference"}
    finally:
        _extension.why_not.cache_clear()


def test_a_failed_build_breaks_nothing_unless_asked_for(build, broken_compiler: str) -> None:
    done, package = build(CXX=broken_compiler)
    assert done.returncode == 0, done.stderr
    assert libraries(package) == []
    assert "error: the planted one" in (package / "_cpu.txt").read_text()
    done, _ = build(CXX=broken_compiler, ALEXNET_KERNELS_BUILD="on")
    assert done.returncode != 0
    assert "ALEXNET_KERNELS_BUILD=on" in done.stderr and "error: the planted one" in done.stderr


def test_a_toolkit_of_another_major_version_builds_no_cuda(build, tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    major = torch.version.cuda.partition(".")[0]
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/cuda'\necho 'Cuda compilation tools, release 5{major}.1, V'\n")
    nvcc.chmod(0o755)
    done, package = build(CXX="no-such-compiler", CUDA_HOME=str(tmp_path / "cuda"))
    assert done.returncode == 0, done.stderr
    assert f"nvcc is of CUDA 5{major}, torch of CUDA {major}; set CUDA_HOME" in (package / "_cuda.txt").read_text()


def test_an_unknown_mode_is_an_error(build) -> None:
    done, _ = build(ALEXNET_KERNELS_BUILD="yes")
    assert done.returncode != 0
    assert "ALEXNET_KERNELS_BUILD='yes' is no way to build; use 'auto', 'on' or 'off'" in done.stderr


@pytest.mark.slow
def test_on_builds_the_library_and_it_stands_alone(build) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    done, package = build(ALEXNET_KERNELS_BUILD="on")
    assert done.returncode == 0, done.stderr
    assert libraries(package) == ["_cpu.abi3.so"]
    code = (
        "import torch, alexnet_kernels as ak; print(ak.explain('local_response_norm', torch.ones(1, 4, 2), 3).backend)"
    )
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=package.parent
    )
    assert (ran.stdout.strip(), ran.returncode) == ("cpu", 0), ran.stderr


def test_the_source_distribution_holds_what_is_compiled(copy: Path, tmp_path: Path) -> None:
    done = python("setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=copy, ALEXNET_KERNELS_BUILD="off")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(copy).as_posix() for path in (copy / "csrc").rglob("*") if path.is_file()}
    assert len(sources) > 15 and sources <= names
    assert {"setup.py", "constraints.txt", "CITATION.cff", "alexnet_kernels/py.typed"} <= names
    pages = [Path(name) for name in names if name.endswith(".md")]
    assert {"README.md", "README.zh.md", "docs/README.md"} <= {page.as_posix() for page in pages}
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", (copy / page).read_text(encoding="utf-8")):
            target = os.path.normpath(page.parent / link)
            assert link.startswith(("http:", "https:")) or target in names, f"{page} links to {link}"
    assert not any(name.endswith(".so") for name in names)


# What a user runs, in a place of its own.
USE = """
import sys, warnings
warnings.simplefilter("error")
import torch, alexnet_kernels as ak
from alexnet_kernels import functional as F
assert ak.__file__.startswith(sys.argv[1]), ak.__file__
x = torch.randn(2, 16, 7, 7, requires_grad=True)
y = torch.nn.functional.max_pool2d(F.local_response_norm(x, 5, k=2.0), 3, 2)
torch.testing.assert_close(y, torch.nn.functional.max_pool2d(torch.nn.functional.local_response_norm(x, 5, k=2.0), 3, 2))
y.sum().backward()
print(ak.explain("local_response_norm", x, 5).backend)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "backend"), [("g++", "cpu"), ("no-such-compiler", "reference")])
def test_pip_installs_the_wheel_with_and_without_a_compiler(
    copy: Path, tmp_path: Path, compiler: str, backend: str
) -> None:
    """``python -m build`` (the sdist, and the wheel from it), the wheel in a place of its own, and what ``doctor`` says there."""
    if compiler == "g++" and shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    pytest.importorskip("build")
    done = python("-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ".", cwd=copy, CXX=compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    done = python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert libraries(site / "alexnet_kernels") == (["_cpu.abi3.so"] if backend == "cpu" else [])
    ran = python("-c", USE, site, cwd=tmp_path, PYTHONPATH=str(site))
    assert (ran.stdout.strip(), ran.returncode) == (backend, 0), ran.stderr
    doctor = python("-m", "alexnet_kernels", "doctor", cwd=tmp_path, PYTHONPATH=str(site), COLUMNS="300")
    said = "cpu: loaded" if backend == "cpu" else "no C++ compiler: no-such-compiler not found"
    assert doctor.returncode == 0 and said in doctor.stdout, doctor.stdout + doctor.stderr


def test_a_missing_symbol_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library says that was built against another torch."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    source = "extern void of_another_torch(); void call() { of_another_torch(); }"
    command = ["g++", "-shared", "-fPIC", "-Wl,-z,now", "-x", "c++", "-", "-o", str(tmp_path / "_cpu.abi3.so")]
    subprocess.run(command, input=source, text=True, check=True)
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    _extension.why_not.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="undefined symbol: .*of_another_torch") as said:
            results = [F.local_response_norm(torch.ones(1, 4, 2), 3) for _ in range(3)]
        assert len(said) == 1 and torch.equal(results[0], results[2])
        assert "of_another_torch" in str(_extension.why_not("cpu"))
    finally:
        _extension.why_not.cache_clear()


@pytest.mark.parametrize("content", [b"not a library", b""])
def test_a_library_that_does_not_load_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (tmp_path / "_cpu.abi3.so").write_bytes(content)
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    _extension.why_not.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as said, dispatch.recording() as used:
            warnings.simplefilter("always")
            for _ in range(3):
                F.local_response_norm(torch.ones(1, 4, 2), 3)
        assert used == {"reference"}
        (warning,) = (w for w in said if "does not load" in str(w.message))
        assert "file too short" in str(warning.message) or "invalid ELF header" in str(warning.message)
        assert "pip install --no-build-isolation" in str(warning.message)
        assert "does not load" in _extension.describe("cpu")
    finally:
        _extension.why_not.cache_clear()


def test_a_library_that_lacks_an_operation_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if _extension.why_not("cpu") is not None:
        pytest.skip(str(_extension.why_not("cpu")))
    monkeypatch.setitem(_extension.OPERATIONS, "cpu", ("lrn", "from_the_future"))
    _extension.why_not.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="it has no from_the_future"):
            assert "does not load: it has no from_the_future" in str(_extension.why_not("cpu"))
    finally:
        _extension.why_not.cache_clear()
