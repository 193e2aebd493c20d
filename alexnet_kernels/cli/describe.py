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

_OF_KERNELS, _OF_BOTH = ("only", "arch"), ("kernels", "as_json")
_NUMBERS = {  # of a launch, and the headings of their columns
    "programs": "programs",
    "warps": "warps",
    "stages": "stages",
    "registers": "registers",
    "spill_bytes": "spilled\nbytes",
    "shared_bytes": "shared\nbytes",
    "blocks_per_sm": "CTAs\nan SM",
}


def describe(
    context: typer.Context,
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
    _check_given(context, kernels)
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


def _check_given(context: typer.Context, kernels: bool) -> None:
    """That no option was given which the other of the two listings has: it would be ignored.

    Raises:
        ValueError: one was.
    """
    given = [p for p in context.command.params if _is_given(context, str(p.name))]
    strangers = [p for p in given if (p.name in _OF_KERNELS) != kernels and p.name not in _OF_BOTH]
    if strangers:
        names = ", ".join(p.opts[0] for p in strangers)
        if kernels:
            raise ValueError(f"--kernels lists launches, not a network: leave out {names}")
        raise ValueError(f"without --kernels no launches are listed: leave out {names}, or add --kernels")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _kernels(only: str, arch: int, as_json: bool) -> None:
    try:
        rows = doctor.shipped_kernels(only, arch)
    except ValueError as error:  # of the function's argument, which is an option here
        raise ValueError(str(error).replace("pattern=", "--only ", 1)) from error
    if as_json:
        typer.echo(json.dumps({"schema": 1, "arch": arch, "kernels": rows}, indent=2))
        return
    console = Console()
    any_width = console.options.update(width=10_000)
    for table in (_table(rows, arch), _table(rows, arch, narrow=True)):
        needed = console.measure(table, options=any_width)
        if needed.maximum <= console.width:
            break
    Console(width=max(console.width, needed.minimum)).print(table)  # folds labels, cuts no number


def _table(rows: list[dict[str, object]], arch: int, *, narrow: bool = False) -> Table:
    """One row a launch; ``narrow``, its tile stands below its label, which may fold."""
    table = Table(title=f"compiled for sm_{arch}", box=None, padding=(0, 1, 0, 0))
    table.add_column("kernel", no_wrap=not narrow, overflow="fold")
    if not narrow:
        table.add_column("tile", justify="right", no_wrap=True)
    for heading in _NUMBERS.values():
        widest = max(map(len, heading.split("\n")))  # rich would count its longest word
        table.add_column(heading, justify="right", no_wrap=True, min_width=widest)
    for row in rows:
        label, tile = str(row["label"]), str(row["tile"])
        names = [f"{label}\ntile {tile}" if tile else label] if narrow else [label, tile]
        table.add_row(*names, *(f"{row[name]:,}" for name in _NUMBERS))
    return table
