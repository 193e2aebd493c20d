"""``alexnet-kernels profile``: what the GPUs and the processes did while a command ran."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..profiling.process import profile as profile_command

# Everything from the first word that is no option of ours belongs to the command.
CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": False}
_WIDTH = 160  # of a table that goes into a file


def profile(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND [ARGS]...", help="What to run, with its arguments.")
    ],
    hz: Annotated[float, typer.Option(help="Samples a second, 20 to 100.")] = 50,
    devices: Annotated[
        str | None, typer.Option(help="As in cuda:0,cuda:1 or GPU-8c2a,cpu [default: all that are visible].")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write every sample here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the timeline here (PNG, SVG, PDF).")] = None,
) -> None:
    """Run a command and say what the GPUs and its processes did meanwhile.

    Exits as the command did (128 + N when signal N ended it; 127: no such command). The table goes to stderr.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=_WIDTH)
    code = profile_command(
        command,
        console,
        devices=devices,
        hz=hz,
        csv_file=csv_file,
        json_file=json_file,
        plot_file=plot_file,
    )
    raise typer.Exit(code)
