"""Results as tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from kvhive.comparison.result import Result
from kvhive.comparison.results import measures
from kvhive.named import with_name
from kvhive.wrapping import wrap

_LEAST_COLUMN = 26  # characters: narrower columns of prose are hard to read
_LEAST_NAME, _FIGURES = 16, 64  # characters: a recipe's name; all its figures


def measure_table(results: list[Result], width: int) -> Table:
    """One line for every recipe: memory, speed, fidelity; names are broken to fit `width`."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("recipe", no_wrap=True)
    for title in (
        "tokens\nkept",
        "cache\nMiB",
        "x\nsmaller",
        "prefill\ns",
        "decode\ntok/s",
        "KL\nnats",
        "top-1\nagree",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        table.add_row(*_cells(result, max(_LEAST_NAME, width - _FIGURES)))
    return table


def answer_tables(results: list[Result], width: int) -> list[Table]:
    """One table for every question: a column for each recipe where there is room, else a line."""
    wide = width // len(results) >= _LEAST_COLUMN
    return [
        _columns(results, place, width) if wide else _lines(results, place)
        for place in range(len(results[0].answers))
    ]


def _cells(result: Result, width: int) -> list[Text]:
    name = Text(wrap(with_name(result.recipe), width), style="bold")
    if result.reference:
        name.append(" (reference)", style="not bold dim")
    return [name, *map(Text, measures(result))]


def _columns(results: list[Result], place: int, width: int) -> Table:
    table = _frame(results, place)
    for result in results:
        room = width // len(results) - 2
        table.add_column(Text(wrap(with_name(result.recipe), room)), ratio=1, overflow="fold")
    table.add_row(*(_answer(result, results, place) for result in results))
    return table


def _lines(results: list[Result], place: int) -> Table:
    table = _frame(results, place)
    table.show_header = False
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for result in results:
        table.add_row(
            Text(wrap(with_name(result.recipe), _LEAST_COLUMN)), _answer(result, results, place)
        )
    return table


def _frame(results: list[Result], place: int) -> Table:
    return Table(
        title=Text(results[0].answers[place].question, style="bold yellow"),
        title_justify="left",
        box=box.HORIZONTALS,
        border_style="dim",
        header_style="bold",
        show_edge=False,
        pad_edge=False,
        expand=True,
    )


def _answer(result: Result, results: list[Result], place: int) -> Text:
    """The answer; quiet where it only repeats the full cache's."""
    answer = result.answers[place]
    full = next((other.answers[place] for other in results if other.reference), None)
    repeats = full is not None and not result.reference and answer.tokens == full.tokens
    if not answer.text:
        return Text("(nothing)", style="dim")
    return Text(answer.text, style="dim" if repeats else "")
