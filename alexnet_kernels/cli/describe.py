"""``alexnet-kernels describe``: the network as tables, as data and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .. import describe as network
from ..geometry import VARIANTS


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
    lang: Annotated[str, typer.Option(help="Language: en or zh.")] = "en",
    plot: Annotated[
        Path | None, typer.Option(help="Draw the network and each layer to this PNG.", metavar="FILE.png")
    ] = None,
) -> None:
    """Describe a network layer by layer: shapes, parameters, connections, and who owns and sends what on two devices."""
    what = network.describe(variant, num_classes=num_classes, input_size=input_size, batch=batch, lrn_scope=lrn_scope)
    report = network.report(what, notes=notes, as_json=as_json, as_markdown=as_markdown, lang=lang)
    if plot is not None:
        typer.echo(network.draw(what, plot, lang=lang) or f"wrote {plot}", err=True)
    if isinstance(report, str):
        typer.echo(report)
    else:
        Console().print(report)
