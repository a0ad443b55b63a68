"""`kvhive doctor`: what is installed here, what works, and whether a model is supported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvhive.cli.checks import SECTIONS, Check
from kvhive.cli.checks import model as about_model
from kvhive.cli.completion import complete_model
from kvhive.cli.console import Json, Quiet, err, out


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(doctor)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Also tell whether this model is supported, from its config alone.",
            autocompletion=complete_model,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check this installation: versions, extras, devices, folders; and a model.

    Ends with exit code 1 when something is broken.

    [dim]$[/dim] kvhive doctor

    [dim]$[/dim] kvhive doctor --model meta-llama/Llama-3.1-8B
    """
    with err().status("looking"):
        sections = {name: list(checks()) for name, checks in SECTIONS.items()}
        if model is not None:
            sections[f"model {model}"] = list(about_model(model))
    broken = [one.name for checks in sections.values() for one in checks if one.broken]
    if as_json:
        print(json.dumps(as_data(sections), indent=2, ensure_ascii=False))
    else:
        out().print(Group(*_report(sections)))
        out().print(Text(f"broken: {', '.join(broken)}" if broken else "nothing is broken"))
    if broken:
        raise typer.Exit(1)


def as_data(sections: dict[str, list[Check]]) -> dict[str, object]:
    """The report for machines: `ok`, and every check by section and name."""
    return {
        "ok": not any(one.broken for checks in sections.values() for one in checks),
        **{
            name: {
                one.name: {"value": one.value, "ok": not one.broken, "advice": one.advice or None}
                for one in checks
            }
            for name, checks in sections.items()
        },
    }


def _report(sections: dict[str, list[Check]]) -> Iterator[Text | Padding]:
    for name, checks in sections.items():
        yield Text(name, style="bold yellow")
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, min_width=14)
        table.add_column(overflow="fold")
        for one in checks:
            value = Text(one.value, style="red" if one.broken else "")
            if one.advice:
                value.append(f"\n{one.advice}", style="dim")
            table.add_row(Text(one.name, style="bold red" if one.broken else "dim"), value)
        yield Padding(table, (0, 0, 1, 2))
