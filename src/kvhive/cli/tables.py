"""Results as tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from kvhive.cache.report import MIB
from kvhive.comparison.compare import Result

_LEAST_COLUMN = 26  # characters: narrower columns of prose are hard to read


def measure_table(results: list[Result]) -> Table:
    """One line for every recipe: memory, speed, fidelity."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("recipe", overflow="fold")
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
        table.add_row(*_cells(result))
    return table


def answer_tables(results: list[Result], width: int) -> list[Table]:
    """One table for every question: a column for each recipe where there is room, else a line."""
    wide = width // len(results) >= _LEAST_COLUMN
    return [
        (_columns if wide else _lines)(results, place) for place in range(len(results[0].answers))
    ]


def _cells(result: Result) -> list[Text]:
    report, fidelity = result.report, result.fidelity
    name = Text(result.recipe, style="bold")
    if result.reference:
        name.append(" (reference)", style="not bold dim")
    plain = [
        f"{report.tokens_kept:,.0f}",
        f"{report.nbytes / MIB:.1f}",
        f"{report.ratio:.2f}",
        f"{result.prefill_seconds:.2f}",
        "-" if result.decode_rate is None else f"{result.decode_rate:.1f}",
        f"{fidelity.kl:.3f}" if fidelity else "-",
        f"{fidelity.top1:.0%}" if fidelity else "-",
    ]
    return [name, *map(Text, plain)]


def _columns(results: list[Result], place: int) -> Table:
    table = _frame(results, place)
    for result in results:
        table.add_column(Text(result.recipe), ratio=1, overflow="fold")
    table.add_row(*(_answer(result, results, place) for result in results))
    return table


def _lines(results: list[Result], place: int) -> Table:
    table = _frame(results, place)
    table.show_header = False
    table.add_column(style="bold", overflow="fold", max_width=_LEAST_COLUMN)
    table.add_column(overflow="fold", ratio=1)
    for result in results:
        table.add_row(Text(result.recipe), _answer(result, results, place))
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
