"""``alexnet-kernels``: the commands, and errors as one line instead of a traceback."""

from __future__ import annotations

import sys

import typer

from .. import __version__
from .compare import compare
from .describe import describe
from .doctor import doctor
from .profile import CONTEXT, profile
from .report import report

app = typer.Typer(
    name="alexnet-kernels",
    help="AlexNet as its 2012 authors ran it, on two devices, in custom kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(compare)
app.command()(describe)
app.command()(doctor)
app.command(context_settings=CONTEXT)(profile)
app.command()(report)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; exit 0, 1 (results disagree), 2 (a wrong argument) or what a command chose."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
