"""`kvhive report`: a run's figures, in the terminal, as CSV and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvhive.cli.console import Json, Plugin, Quiet, command_line, err, note, out
from kvhive.cli.outputs import Force, check_stdout, prepared, write

if TYPE_CHECKING:
    from rich.console import Console

    from kvhive.evaluation.report.run import Run


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(report)


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="What evaluate wrote to. Several are joined: other recipes, same items.",
        ),
    ],
    against: Annotated[
        str,
        typer.Option(metavar="RECIPE", help="What differences, ratios and intervals refer to."),
    ] = "full",
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write every figure as CSV.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a self-contained page.")
    ] = None,
    force: Force = False,
    plugin: Plugin = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what [bold]kvhive evaluate[/bold] measured: scores, losses, memory, and how sure they
    are.

    [dim]$[/dim] kvhive report runs/first --csv first.csv --html first.html
    """
    from kvhive.evaluation.report.csv import as_csv
    from kvhive.evaluation.report.join import join
    from kvhive.evaluation.report.markdown import as_markdown
    from kvhive.evaluation.report.page import report_page
    from kvhive.evaluation.report.run import Run
    from kvhive.plugins import load_plugins
    from kvhive.recipe import Recipe

    load_plugins(plugin or ())
    wanted = {"csv": csv, "markdown": markdown, "html": html}
    outputs = prepared(wanted, [*folders, *(plugin or ())], force)
    console = err() if check_stdout(outputs, json) else out()
    run = join([Run.read(folder) for folder in folders])
    recorded = against in run.settings["recipes"]  # perhaps under a name that methods had once
    run = run.against(against if recorded else str(Recipe.parse(against)))
    show(run, json, quiet, console)
    if "csv" in outputs:
        write(outputs["csv"], as_csv(run), "figures")
    if "markdown" in outputs:
        write(outputs["markdown"], as_markdown(run, command_line()), "tables")
    if "html" in outputs:
        write(outputs["html"], report_page(run, command_line()), "report")


def show(run: Run, json: bool, quiet: bool, console: Console) -> None:
    """What is missing, every task and the leaderboard, on stdout; notes on stderr."""
    from kvhive.evaluation.report.json import as_json
    from kvhive.evaluation.report.table import leaderboard, task_tables, unfinished

    if json:
        console.out(as_json(run), end="", highlight=False)
    else:
        width = console.width
        for part in (*unfinished(run), *task_tables(run, width), leaderboard(run, width)):
            console.print(part)
    for sentence in () if quiet or json else run.unclear():
        note(sentence)
