"""`kvhive evaluate`: recipes on tasks, with every result kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kvhive.cli.completion import complete_recipe
from kvhive.cli.console import Device, Dtype, Model, Plugin, Threads, err, note

if TYPE_CHECKING:
    from kvhive.evaluation.scheduler import State

STOPPED = 130  # as shells report a program that was interrupted
_RECIPES = ["buzz@0.4", "h2o@0.4", "streaming_llm@0.4"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(evaluate)


def evaluate(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where results go; an unfinished run goes on.")
    ],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            autocompletion=complete_recipe,
            help=f"Repeat for more. The full cache always runs. Default: {', '.join(_RECIPES)}.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            metavar="TASK",
            help="A task, 'passkey(lengths=(512, 2048))', or a group: suite, ruler, all. "
            "Repeat for more. Default: suite.",
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(metavar="MODES", help="Whether the question is compressed too.")
    ] = "agnostic,aware",
    limit: Annotated[int, typer.Option(min=1, metavar="ITEMS", help="Items a task.")] = 60,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|hub|builtin",
            envvar="KVHIVE_DATA",
            help="Where texts come from: a folder, the Hugging Face hub, or made up.",
        ),
    ] = None,
    prefill_block: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Feed prompts in blocks, every recipe evicting after each: memory is bounded. "
            "Default: in one step, shared by all recipes.",
        ),
    ] = None,
    hold: Annotated[
        bool,
        typer.Option(
            "--hold",
            help="Evict nothing after the prompt: questions and answers are read in one step. "
            "Several times faster; what eviction while decoding loses is not seen.",
        ),
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", "-j", min=1, help="Processes; with --ray workers, 1: as many as fit."
        ),
    ] = 1,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Spread over a Ray cluster, or 'auto'.")
    ] = None,
    plugin: Plugin = None,
    model: Model = "smollm2",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Measure what recipes cost and what they lose, on tasks, with error bars.

    Every item is run with the full cache, with every recipe, and without its context. Results are
    written item by item: a run that was stopped goes on where it was. Then see [bold]kvhive
    report FOLDER[/bold].

    [dim]$[/dim] kvhive evaluate -r buzz@0.4 -r h2o@0.4 -t passkey --limit 20 --out runs/first
    """
    from kvhive.evaluation.scheduler import evaluate as run
    from kvhive.evaluation.settings import Settings
    from kvhive.model.loading import be_quiet

    settings = Settings(
        model=model,
        recipes=tuple(recipe or _RECIPES),
        tasks=tuple(task or ("suite",)),
        modes=tuple(part.strip() for part in mode.split(",") if part.strip()),
        limit=limit,
        seed=seed,
        data=data,
        block=prefill_block,
        hold=hold,
        dtype=dtype,
        device=device,
        threads=threads,
        plugins=tuple(plugin or ()),
    ).checked()
    be_quiet()
    try:
        with _bar() as progress:
            run(settings, out, jobs=jobs, ray=ray, progress=progress)
    except KeyboardInterrupt:
        note(f"stopped; what was finished is in {str(out)!r}: the same command goes on from there")
        raise typer.Exit(STOPPED) from None
    _summary(out)


def _summary(folder: Path) -> None:
    from kvhive.cli.report import show
    from kvhive.evaluation.report.run import Run

    show(Run.read(folder))
    err().print(f"results: {folder}; see also: kvhive report {folder} --html report.html")


@contextmanager
def _bar() -> Iterator[Callable[[State], None]]:
    """A bar with the time left on stderr."""
    columns = (
        BarColumn(bar_width=28, complete_style="yellow", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("{task.description}", style="dim"),
    )
    console = err()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar: Any = progress.add_task("loading", total=None)

        def update(state: State) -> None:
            if state.note:
                note(state.note)
                return
            left = "" if state.left is None else f"  {_clock(state.left)} left"
            progress.update(
                bar,
                total=state.total,
                completed=state.done,
                description=f"{_clock(state.elapsed)}{left}  {state.unit}",
            )

        yield update


def _clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
