"""``alexnet-kernels compare``: the two-device network beside the stock one, on real photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import geometry, images
from .._files import check_plottable, check_writable, write_text
from ..comparison import Comparison
from ..comparison import compare as run_comparison
from ..comparison.report import plot, show
from ..comparison.run import parse_devices


def compare(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Image files or folders; by default the photographs of scikit-image.")
    ] = None,
    variant: Annotated[str, typer.Option(help=f"One of {', '.join(geometry.VARIANTS)}.")] = "paper",
    batch: Annotated[int | None, typer.Option(help="Images a step [default: 16, 128 on a GPU].")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, tf32 (CUDA), bf16 or fp16.")] = "fp32",
    devices: Annotated[
        str | None, typer.Option(help="Two devices, as in cuda:0,cuda:1 or cpu,cpu [default: what is there].")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Samples of each time.", min=1)] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios here (PNG, SVG, PDF).")] = None,
) -> None:
    """Run stock torch.nn, ours on one device and ours on two, with the same weights on the same photographs.

    Exits 1 when a result disagrees with fp64 by more than its dtype explains.
    """
    for path in (json_file, plot_file):
        if path is not None:
            check_writable(path)
    if plot_file is not None:
        check_plottable(plot_file)
    console, status = Console(), Console(stderr=True)
    pair, why = parse_devices(devices)
    console.print(why, highlight=False)
    chosen = geometry.variant(variant)
    loaded = images.load(images.find(files) if files else images.default_photographs(), chosen)
    for name, reason in loaded.skipped:
        console.print(f"skipped {name}: {reason}", markup=False, highlight=False)
    named = ", ".join(Path(name).name for name in loaded.names[:6]) + (", ..." if len(loaded.names) > 6 else "")
    console.print(f"{len(loaded.names)} images ({named}), {len(loaded.skipped)} skipped", markup=False, highlight=False)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=status) as progress:
        task = progress.add_task("starting", total=None)
        result = run_comparison(
            chosen,
            loaded,
            batch=batch if batch is not None else 128 if pair[0].type == "cuda" else 16,
            dtype=dtype,
            devices=pair,
            rounds=rounds,
            progress=lambda text: progress.update(task, description=text),
        )
        progress.update(task, description="done")
    show(result, console)
    _judge(result, console)  # before anything is written: whatever becomes of the files, the verdict has been said
    if json_file is not None:
        write_text(json_file, json.dumps(result.to_json(), indent=1) + "\n")
    if plot_file is not None:
        plot(result, plot_file)
    if result.disagreements:
        raise typer.Exit(1)


def _judge(result: Comparison, console: Console) -> None:
    for row in result.disagreements:
        message = (
            f"wrong: {row.worst} of '{row.contender}' is {row.error:.2e} from fp64, {row.tolerance:.2e} is allowed"
        )
        console.print(message, markup=False, highlight=False)
    if not result.disagreements:
        console.print("all results agree with fp64", highlight=False)
