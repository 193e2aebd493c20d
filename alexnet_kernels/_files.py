"""Writing files so that nothing is lost: the whole new content, or the old file untouched; and what can be known beforehand."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """``write(temporary)`` beside ``path`` (same suffix), then rename; the temporary never outlives a failure.

    Raises:
        OSError: the folder does not exist or cannot be written, or ``path`` is a folder itself, naming ``path``.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        try:
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}; choose the name of a file") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """``text`` into ``path``, atomically, UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def make_folder(path: Path) -> None:
    """``path`` and the folders that it stands in, where they are not there yet.

    Raises:
        OSError: one of them is a file, or may not be made, naming ``path``.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {path}: {error.strerror}; choose another one") from error


def check_writable(path: Path) -> None:
    """Before long work: whether its result could be written.

    Raises:
        OSError: the folder is not there or not writable, or ``path`` is a folder itself.
    """
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise OSError(f"cannot write {path}: choose a file in a folder that exists and is writable")


def check_plottable(path: Path) -> None:
    """Before long work: whether its picture could be drawn.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the suffix of ``path`` is no format of a picture.
    """
    require("matplotlib", str(path))
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"plot_file={str(path)!r} must end in one of .{', .'.join(formats)}")


def require(package: str, purpose: str) -> None:
    """That ``package`` of the extra ``bench`` (by the name it is imported by) can be imported, for ``purpose``.

    Raises:
        ImportError: it cannot, with the remedy.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        name = {"PIL": "Pillow"}.get(package, package)
        raise ImportError(f"{name} is needed for {purpose}: pip install 'alexnet-kernels[bench]' ({error})") from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
