"""Importing is free, files are written whole, docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import alexnet_kernels
from alexnet_kernels._files import make_folder, require, write_atomically, write_text


def test_importing_loads_neither_triton_nor_torchvision() -> None:
    code = (
        "import json, sys, torch; before = set(sys.modules)\n"
        "import alexnet_kernels; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    heavy = {"triton", "torchvision", "matplotlib", "PIL", "rich", "typer", "skimage", "pynvml"}
    assert not heavy & {name.split(".")[0] for name in loaded}


def test_the_module_is_the_command() -> None:
    found = subprocess.run([sys.executable, "-m", "alexnet_kernels", "--version"], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, alexnet_kernels.__version__)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")

    def fails(temporary: Path) -> None:
        temporary.write_text("half of it")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_an_impossible_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*gone.*choose a folder that exists"):
        write_text(tmp_path / "gone" / "x.json", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"^cannot write .*folder: Is a directory; choose the name of a file"):
        write_text(tmp_path / "folder", "")
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(OSError, match=rf"^cannot make the folder .*{place}: .*; choose another one"):
            make_folder(tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(("package", "name"), [("matplotlib", "matplotlib"), ("PIL", "Pillow")])
def test_what_is_not_installed_is_named_with_the_remedy(
    package: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"^{name} is needed for x.png: pip install 'alexnet-kernels\[bench\]'"):
        require(package, "x.png")


def _modules() -> list[str]:
    found = pkgutil.walk_packages(alexnet_kernels.__path__, "alexnet_kernels.")
    others = ("kernels", "__main__", "_cpu", "_cuda")  # Triton; a program; libraries that torch loads, not Python
    return [m.name for m in found if not m.name.startswith(tuple(f"alexnet_kernels.{name}" for name in others))]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    scope = {**vars(module), "torch": importlib.import_module("torch"), "alexnet_kernels": alexnet_kernels}
    failed, _ = doctest.testmod(module, extraglobs=scope, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize("name", _modules())
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert (importlib.import_module(name).__doc__ or "").strip()
