"""`kvhive train-less`: train the kernels of the store `less`; a short way to `kvhive calibrate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvhive.cli.calibrate import Data, Replace, Written, calibrate
from kvhive.cli.console import Device, Dtype, Json, Model, Quiet, Threads


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("train-less")(train_less)


def _setting(metavar: str, meaning: str) -> Any:
    """Of the training; its range is checked, and its default known, where it is used."""
    return typer.Option(metavar=metavar, help=meaning, rich_help_panel="Training")


def train_less(
    output: Written,
    data: Data = None,
    rank: Annotated[
        int | None,
        _setting("R", "Features of a token; the state costs as much as R tokens. Default: 8."),
    ] = None,
    hidden: Annotated[
        int | None, _setting("N", "Hidden units of every kernel. Default: 28.")
    ] = None,
    tokens: Annotated[
        int | None,
        _setting("N", "Length of a piece of text; what is read may be as long. Default: 4096."),
    ] = None,
    pieces: Annotated[int | None, _setting("N", "Most pieces that are read. Default: 48.")] = None,
    epochs: Annotated[
        int | None, _setting("N", "How often they are gone through. Default: 20.")
    ] = None,
    force: Replace = False,
    as_json: Json = False,
    quiet: Quiet = False,
    model: Model = "smollm2",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """[bold]Train[/bold] the kernels of the store [bold]less[/bold], layer by layer, into a file.

    Layers that are done are kept in FILE.partial: the same command goes on after a stop. The same
    as kvhive calibrate --for "less(...)", which takes all settings. Then see the loss curve with
    [bold]kvhive profile FILE[/bold].

    [dim]$[/dim] kvhive train-less --data reports.txt --data mails.txt -o mine.safetensors

    [dim]$[/dim] kvhive compare report.txt -r "h2o@0.1+less(profile='mine.safetensors')"
    """
    settings = {
        "rank": rank,
        "hidden": hidden,
        "tokens": tokens,
        "pieces": pieces,
        "epochs": epochs,
    }
    told = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    calibrate(
        f"less({told})",
        output,
        data,
        force,
        as_json=as_json,
        quiet=quiet,
        model=model,
        dtype=dtype,
        device=device,
        threads=threads,
    )
