"""The command line: parse, call, print. What it does is done by the library."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from kvhive import __version__
from kvhive.cli import (
    calibrate,
    compare,
    doctor,
    evaluate,
    generate,
    lm_eval,
    plan,
    profile,
    recipes,
    report,
    show,
    train_less,
)
from kvhive.cli.console import REFUSED, Commands, failed

app = typer.Typer(
    name="kvhive",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"kvhive {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Small KV caches for large language models: what survives, how much, and how it is held.

    Start with [bold]kvhive compare FILE --ask "..."[/bold], and see what there is with
    [bold]kvhive recipes[/bold].
    """


compare.register(app)
show.register(app)
generate.register(app)
plan.register(app)
recipes.register(app)
calibrate.register(app)
train_less.register(app)
profile.register(app)
evaluate.register(app)
report.register(app)
lm_eval.register(app)
doctor.register(app)


def main() -> None:
    """The entry point. Whatever goes wrong ends in one sentence and a non-zero exit code."""
    for place, word in enumerate(sys.argv):
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            failed(f"word {place} of the command is not text in UTF-8: {word!a}; rename it")
            sys.exit(REFUSED)
    try:
        app()
    except Exception as error:
        if os.environ.get("KVHIVE_DEBUG"):
            raise
        failed(f"unexpected {type(error).__name__}: {error} (a bug: KVHIVE_DEBUG=1 shows where)")
        sys.exit(1)
