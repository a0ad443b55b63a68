"""How far `kvhive evaluate` is: a bar on a terminal, plain lines where stderr goes into a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kvhive.cli.console import err, note

if TYPE_CHECKING:
    from kvhive.evaluation.scheduler import State

Show = Callable[["State"], None]
_LINES = 10  # of progress in a pipe


@contextmanager
def progress(quiet: bool) -> Iterator[Show]:
    """What `evaluate(progress=...)` wants. quiet: nothing is shown, notes neither."""
    if quiet:
        yield lambda state: None
    elif err().is_terminal:
        with _bar() as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Show]:
    """With the time left."""
    columns = (
        BarColumn(bar_width=28, complete_style="yellow", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("{task.description}", style="dim", markup=False),
    )
    with Progress(*columns, console=err(), transient=True) as bars:
        bar: Any = bars.add_task("loading", total=None)

        def show(state: State) -> None:
            if state.note:
                note(state.note)
                return
            text = f"{_times(state)}  {state.unit}"
            bars.update(bar, total=state.total, completed=state.done, description=text)

        yield show


def _lines() -> Show:
    """A line at the beginning, whenever another tenth is done, and at the end."""
    shown = -1

    def show(state: State) -> None:
        nonlocal shown
        if state.note:
            note(state.note)
            return
        tenth = _LINES * state.done // max(1, state.total)
        if tenth > shown:
            shown = tenth
            text = f"{state.done} of {state.total} done  {_times(state)}  {state.unit}".rstrip()
            err().print(text, markup=False, soft_wrap=True)

    return show


def _times(state: State) -> str:
    left = "" if state.left is None else f"  {clock(state.left)} left"
    return f"{clock(state.elapsed)}{left}"


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
