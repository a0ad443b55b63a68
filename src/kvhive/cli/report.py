"""`kvhive report`: a run's figures, in the terminal, as CSV and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvhive.cli.console import Plugin, command_line, err, note, out

if TYPE_CHECKING:
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
    plugin: Plugin = None,
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
    from kvhive.html.page import check_writable, write_page
    from kvhive.plugins import load_plugins
    from kvhive.recipe import Recipe

    load_plugins(plugin or ())
    for path in (csv, markdown, html):
        if path is not None:
            check_writable(path)
    run = join([Run.read(folder) for folder in folders])
    recorded = against in run.settings["recipes"]  # perhaps under a name that methods had once
    run = run.against(against if recorded else str(Recipe.parse(against)))
    show(run)
    if csv is not None:
        write_page(csv, as_csv(run.scores))
        err().print(f"figures: {csv}", soft_wrap=True)
    if markdown is not None:
        write_page(markdown, as_markdown(run, command_line()))
        err().print(f"tables: {markdown}", soft_wrap=True)
    if html is not None:
        write_page(html, report_page(run, command_line()))
        err().print(f"report: {html}", soft_wrap=True)


def show(run: Run) -> None:
    """The leaderboard and every task, on stdout; warnings on stderr."""
    from kvhive.evaluation.report.table import leaderboard, task_tables

    console = out()
    for table in (*task_tables(run, console.width), leaderboard(run, console.width)):
        console.print(table)
    for sentence in run.unclear():
        note(sentence)
