"""``alexnet-kernels doctor``: environment, versions, GPUs, and each backend with its reason when it cannot run."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..doctor import Diagnosis, diagnose


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, to paste into a bug report.")] = False,
) -> None:
    """Say what this machine has, which backends work on it, and why the others do not."""
    diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json(), indent=1))
    else:
        _show(diagnosis, Console())


def _show(diagnosis: Diagnosis, console: Console) -> None:
    facts = Table(box=SIMPLE_HEAD, show_header=False)
    sections = (
        {"alexnet-kernels": diagnosis.version, **diagnosis.packages},
        diagnosis.system,
        diagnosis.variables or {"environment variables": "none that matter are set"},
        {gpu["device"]: ", ".join(list(gpu.values())[1:]) for gpu in diagnosis.gpus} or {"GPUs": "none visible"},
    )
    for section in sections:
        for name, value in section.items():
            facts.add_row(name, escape(value))
        facts.add_section()
    facts.add_row("compiled", escape(diagnosis.library))
    facts.add_row("rebuild", escape(diagnosis.rebuild))
    console.print(facts)
    backends = Table(box=SIMPLE_HEAD)
    for column in ("backend", "device", "", "detail"):
        backends.add_column(column, overflow="fold")
    for check in diagnosis.backends:
        backends.add_row(check.backend, check.device, "works" if check.works else "-", escape(check.detail))
    console.print(backends)
    for problem in diagnosis.problems:
        console.print(f"problem: {problem}", style="red", markup=False, highlight=False)
