"""Result files of benchmarks: ``<folder>/<gpu or cpu>/<date>-<digest of the measured sources>.json``, written once.

A row is a dictionary with ``section`` (``"ceilings"``, ``"layers"``, ``"model"``, ``"launch"`` ...) and ``case``; rows of all
but the first have ``contenders``, name to ``{"status": "ok" | "wrong" | "failed", "milliseconds": ...}``, and, where both sides
were right, ``ours``, ``baseline`` and ``ratio``. A contender that is not ``"ok"`` never has a time that counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .._files import write_text

SCHEMA = 1
Row = dict[str, Any]
_STATES = ("ok", "wrong", "failed")


@dataclass(frozen=True)
class Results:
    """One run: when, of which sources, on what, and its rows; ``complete`` where all that the suite has was tried, and ``file``
    where it was read."""

    date: str
    digest: str
    environment: dict[str, str]
    rows: tuple[Row, ...]
    device: str
    complete: bool = False
    file: str = ""

    def section(self, name: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row["section"] == name)


def slug(name: str) -> str:
    """A device's name as a folder: ``"NVIDIA H200"`` is ``nvidia-h200``."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def write(
    folder: Path,
    device: str,
    date: datetime,
    digest: str,
    environment: Mapping[str, str],
    rows: Sequence[Row],
    complete: bool = False,
) -> Path:
    """Write a run below ``folder``; a part of the suite unless it is said to be ``complete``.

    Raises:
        FileExistsError: the file is there; results are not written twice.
        ValueError: a row that :func:`read` would refuse.
    """
    written = date.isoformat(timespec="seconds")
    results = Results(written, digest, dict(environment), tuple(rows), slug(device), complete)
    for row in results.rows:
        _check(row)
    target = folder / results.device / f"{date:%Y-%m-%d-%H%M%S}-{digest}.json"
    if target.exists():
        raise FileExistsError(f"{target} exists: result files are not written twice")
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, **asdict(results)}
    del content["file"]
    write_text(target, json.dumps(content, indent=1) + "\n")
    return target


def read(path: Path) -> Results:
    """The run in a file; one from before ``complete`` was written counts as a part.

    Raises:
        ValueError: it is no result file, or of another schema; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, this version reads {SCHEMA}")
        rows = tuple(content["rows"])
        for row in rows:
            _check(row)
        environment = {str(name): str(value) for name, value in content["environment"].items()}
        date, digest, device = (str(content[name]) for name in ("date", "digest", "device"))
        return Results(date, digest, environment, rows, device, content.get("complete") is True, path.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no result file: {what}") from error


def read_all(folder: Path) -> tuple[list[Results], list[str]]:
    """The runs below ``folder``, oldest first, and a line for each file that is none."""
    found, skipped = [], []
    for path in sorted(folder.glob("*/*.json")):
        try:
            found.append(read(path))
        except ValueError as error:
            skipped.append(str(error))
    return sorted(found, key=lambda results: results.date), skipped


def _check(row: Row) -> None:
    where = f"row {row['case']!r}"
    if row["section"] == "ceilings":
        if not row["per second"] > 0:
            raise ValueError(f"{where}: per second is {row['per second']!r}, more than 0 is possible")
        return
    for name, entry in row.get("contenders", {}).items():
        if entry["status"] not in _STATES:
            raise ValueError(f"{where}: {name} has status {entry['status']!r}; there are {', '.join(_STATES)}")
    for side in ("ours", "baseline"):
        if side in row and not row["contenders"][row[side]]["milliseconds"] > 0:
            raise ValueError(f"{where}: {row[side]} is named as {side} and has no time")
