"""`kvhive evaluate`: recipes on tasks, with every result kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvhive.cli.completion import complete_recipe
from kvhive.cli.console import (
    MOST,
    Device,
    Dtype,
    Json,
    Model,
    Plugin,
    Quiet,
    Seed,
    Threads,
    err,
    note,
)
from kvhive.cli.console import out as console
from kvhive.cli.evaluation_progress import progress

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
            help="A task, 'passkey(lengths=(512, 2048))', or a group: generated (needs no data), "
            "suite, ruler, long, all. Repeat for more. Default: suite; without data, generated.",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="MODES",
            help="agnostic: the question comes after compression; aware: it is compressed too; "
            "stream: texts without a question. Default: all that the engine can do.",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=10**6, metavar="ITEMS", help="Items a task.")
    ] = 60,
    seed: Seed = 0,
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
            max=MOST,
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
    engine: Annotated[
        str,
        typer.Option(
            metavar="ENGINE",
            help="Who runs the model: transformers, or an engine such as vllm (pip install "
            "kvhive-vllm), for mode aware and tasks with written answers.",
        ),
    ] = "transformers",
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            max=1024,
            help="Processes; with --ray workers, 1: as many as fit.",
        ),
    ] = 1,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Spread over a Ray cluster, or 'auto'.")
    ] = None,
    plugin: Plugin = None,
    json: Json = False,
    quiet: Quiet = False,
    model: Model = "smollm2",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Measure what recipes cost and what they lose, on tasks, with error bars.

    Every item is run with the full cache, with every recipe, and without its context. Results are
    written item by item: a run that was stopped goes on where it was. Then see [bold]kvhive
    report FOLDER[/bold].

    [dim]$[/dim] kvhive evaluate -r buzz@0.4 -r h2o@0.4 --limit 20 --out runs/first
    """
    from kvhive.evaluation.data.source import named
    from kvhive.evaluation.scheduler import evaluate as run
    from kvhive.evaluation.settings import Settings
    from kvhive.model.loading import be_quiet

    if not task:
        task = ["suite" if named(data) else "generated"]
        if not (named(data) or quiet):
            note(
                "no data was given, so the generated tasks are run; for all: --data FOLDER, "
                "--data hub, or --data builtin"
            )
    settings = Settings(
        model=model,
        recipes=tuple(recipe or _RECIPES),
        tasks=tuple(task),
        modes=_modes(mode, engine),
        limit=limit,
        seed=seed,
        data=data,
        block=prefill_block,
        hold=hold,
        dtype=dtype,
        device=device,
        threads=threads,
        plugins=tuple(plugin or ()),
        engine=engine,
    )
    be_quiet()
    try:
        with progress(quiet) as seen:
            run(settings, out, jobs=jobs, ray=ray, progress=seen)
    except KeyboardInterrupt:
        if not quiet:
            note(f"stopped; what is done is in {str(out)!r}: the same command goes on from there")
        raise typer.Exit(STOPPED) from None
    _summary(out, json, quiet)


def _modes(text: str | None, engine: str) -> tuple[str, ...]:
    from kvhive.evaluation.engine import TRANSFORMERS
    from kvhive.inference.modes import MODES

    if text is None:
        return MODES if engine == TRANSFORMERS else ("aware",)
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _summary(folder: Path, json: bool, quiet: bool) -> None:
    from kvhive.cli.report import show
    from kvhive.evaluation.report.run import Run

    show(Run.read(folder), json, quiet, console())
    if not quiet:
        text = f"results: {folder}; see also: kvhive report {folder} --html report.html"
        err().print(text, markup=False, soft_wrap=True)
