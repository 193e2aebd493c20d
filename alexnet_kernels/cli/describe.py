"""``alexnet-kernels describe``: the network as tables, as data and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .. import describe as network
from .. import doctor
from ..geometry import VARIANTS

_WIDTH = 140  # of the table of kernels, whose labels say too much for 80 columns


def describe(
    variant: Annotated[str, typer.Argument(help=f"Which network: {', '.join(VARIANTS)}.")] = "paper",
    num_classes: Annotated[int | None, typer.Option(help="Classes, if not the variant's own.")] = None,
    input_size: Annotated[str | None, typer.Option(help="Side of the image, or HEIGHTxWIDTH.")] = None,
    batch: Annotated[int, typer.Option(help="Images a step, for the bytes that cross between two devices.")] = 128,
    lrn_scope: Annotated[
        str | None, typer.Option(help="Normalise inside a 'tower' or across all channels ('global').")
    ] = None,
    notes: Annotated[
        bool, typer.Option("--notes", help="Set the original notes beside the truth, row by row.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="List the Triton kernels instead, compiled for a GPU that need not be here."),
    ] = False,
    only: Annotated[
        str, typer.Option(help="With --kernels: those that this regular expression finds; '' for all, some minutes.")
    ] = "conv.* bfloat16 .*batch 256",
    arch: Annotated[int, typer.Option(help="With --kernels: 80, 90 or 100.")] = 90,
    lang: Annotated[str, typer.Option(help="Language: en or zh.")] = "en",
    plot: Annotated[
        Path | None, typer.Option(help="Draw the network and each layer to this PNG.", metavar="FILE.png")
    ] = None,
) -> None:
    """Describe a network layer by layer: shapes, parameters, connections, and who owns and sends what on two devices."""
    if kernels:
        _kernels(only, arch, as_json)
        return
    what = network.describe(variant, num_classes=num_classes, input_size=input_size, batch=batch, lrn_scope=lrn_scope)
    report = network.report(what, notes=notes, as_json=as_json, as_markdown=as_markdown, lang=lang)
    if plot is not None:
        typer.echo(network.draw(what, plot, lang=lang) or f"wrote {plot}", err=True)
    if isinstance(report, str):
        typer.echo(report)
    else:
        Console().print(report)


def _kernels(only: str, arch: int, as_json: bool) -> None:
    rows = doctor.shipped_kernels(only, arch)
    if as_json:
        typer.echo(json.dumps({"schema": 1, "arch": arch, "kernels": rows}, indent=2))
        return
    table = Table(title=f"compiled for sm_{arch}", box=None)
    table.add_column("kernel", no_wrap=True)
    for name in ("tile", "programs", "warps", "stages", "registers", "spilled", "shared bytes", "CTAs an SM"):
        table.add_column(name, justify="right", no_wrap=name == "tile")
    for row in rows:
        numbers = ("programs", "warps", "stages", "registers", "spill_bytes", "shared_bytes", "blocks_per_sm")
        table.add_row(str(row["label"]), str(row["tile"]), *(f"{row[name]:,}" for name in numbers))
    Console(width=_WIDTH).print(table)
