"""``alexnet-kernels report``: result files as tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..profiling.report import write_report


def report(
    results: Annotated[Path, typer.Argument(help="The folder of result files, one folder a device in it.")] = Path(
        "bench/results"
    ),
    out: Annotated[Path, typer.Option(help="Where report.md and its figures go.")] = Path("bench/out/report"),
) -> None:
    """Turn the latest benchmark results of each device into Markdown tables and figures. Measures nothing."""
    written, skipped = write_report(results, out)
    for line in skipped:
        typer.echo(f"skipped: {line}", err=True)
    for path in written:
        typer.echo(f"wrote {path}")
