"""`kvhive calibrate`: learn once about a model what a method has to know, into a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from kvhive.cli.console import (
    Device,
    Dtype,
    Json,
    Model,
    Plugin,
    Quiet,
    Threads,
    err,
    load_model,
    note,
    out,
)
from kvhive.cli.evaluation_progress import clock
from kvhive.files import Output, expanded

if TYPE_CHECKING:
    from kvhive.calibration import Profile

STOPPED = 130  # what shells say of a command that Ctrl-C ended
_LINES = 10  # of progress in a pipe
_AT_ONCE = 1.0  # seconds
_MADE_UP = "made-up books"

Written = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="The profile: FILE.safetensors."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="Text, Markdown or PDF like those that will be read. Repeat for more. "
        "Default: made-up prose.",
    ),
]
Replace = Annotated[bool, typer.Option("--force", help="Replace the profile if there is one.")]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(calibrate)


def calibrate(
    method: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="METHOD",
            help='What will use it, with settings of the learning: zigzag, "zigzag(window=64)".',
        ),
    ],
    output: Written,
    data: Data = None,
    force: Replace = False,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
    model: Model = "smollm2",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """[bold]Calibrate[/bold]: learn once about a model what a method has to know, into a file.

    Texts are read piece by piece, and what is done is kept in FILE.partial: the same command goes
    on after a stop. Then see [bold]kvhive profile FILE[/bold].

    [dim]$[/dim] kvhive calibrate --for zigzag --data reports.txt -o mine.safetensors

    [dim]$[/dim] kvhive compare report.txt -r "snapkv@0.2/zigzag(profile='mine.safetensors')"
    """
    from kvhive.learning import CALIBRATIONS, partial_file
    from kvhive.learning import calibrate as learn
    from kvhive.plugins import load_plugins
    from kvhive.spec import parse

    load_plugins(plugin or ())
    parsed = parse(CALIBRATIONS, method)
    place = _place(output, [model, *(data or ()), *(plugin or ())], force)
    texts, named = _texts(data)
    network, tokenizer = load_model(model, dtype, device, threads)
    if partial_file(place).exists():
        note(f"going on where an earlier run was stopped ({partial_file(place)})")
    start = time.monotonic()
    try:
        with _progress(str(parsed)) as tick:
            profile = learn(network, tokenizer, parsed, texts, named, place, tick, force)
    except KeyboardInterrupt:
        note(f"stopped; {_how_to_go_on(partial_file(place))}")
        raise typer.Exit(STOPPED) from None
    told = as_data(profile, str(output), time.monotonic() - start)
    if as_json:
        print(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        _print(told)
    if remark := parsed.remark(profile):
        note(remark)
    if data is None:
        note("it was learnt from made-up text; texts like yours, given with --data, suit better")


def as_data(profile: Profile, file: str, seconds: float) -> dict[str, Any]:
    """A profile that was just made as plain values, for JSON."""
    return {
        "file": file,
        **facts(profile),
        "seconds": round(seconds, 3),
        "use": use(profile, file),
    }


def facts(profile: Profile) -> dict[str, str]:
    """Where a profile comes from."""
    return {
        "method": profile.method,
        "fingerprint": profile.fingerprint,
        "data": profile.data,
        "date": profile.date,
    }


def use(profile: Profile, file: str) -> str:
    """A recipe that reads the profile in `file`."""
    from kvhive.stores import STORES

    method = profile.method
    before = f"{STORES[method].example}+" if method in STORES else "snapkv@0.2/"
    return f"{before}{method}(profile={file!r})"


def _place(output: Path, reads: list[str], force: bool) -> Path:
    """Where the profile goes. Raises `OSError` or `ValueError` as `Output.prepare` does, for
    stdout, and for a file that is there unless it is to be replaced.
    """
    path = Output.prepare(output, "", [expanded(name) for name in reads], force=True).path
    if path is None:
        raise ValueError("a profile is no text for stdout: name a file with --output")
    if path.exists() and not force:
        raise FileExistsError(
            f"cannot write {str(output)!r}: there is a file already; choose another name, or "
            "replace it with --force"
        )
    return path


def _texts(data: list[str] | None) -> tuple[list[str], str]:
    """The texts to learn from, and what they are. Raises as `Document.read`."""
    if data is None:
        from kvhive.evaluation.data.made_up import records

        return [str(one["text"]) for one in records("books", seed=0)], _MADE_UP
    from kvhive.inference.document import Document

    documents = [Document.read(name) for name in dict.fromkeys(data)]
    return [one.text for one in documents], ", ".join(one.name for one in documents)


def _how_to_go_on(kept: Path) -> str:
    if kept.exists():
        return f"what is done is in {str(kept)!r}: the same command goes on from there"
    return "nothing was done yet"


def _print(told: dict[str, Any]) -> None:
    console = out()
    head = f"  {told['method']}, {told['date']}, in {clock(told['seconds'])}"
    console.print(Text.assemble((told["file"], "bold"), (head, "dim")), soft_wrap=True)
    console.print(Text(f"learnt from {told['data']}"), soft_wrap=True)
    console.print(Text.assemble("use it: ", (f'-r "{told["use"]}"', "bold")), soft_wrap=True)
    console.print(
        Text.assemble("see it: ", (f"kvhive profile {told['file']}", "bold")), soft_wrap=True
    )


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None]]:
    """What `learn(tick=...)` wants: a bar with the time left, or lines where stderr is a pipe."""
    console, start = err(), time.monotonic()
    given = 0.0  # the share that an earlier run left: it is told at once

    def times(share: float) -> str:
        nonlocal given
        elapsed = time.monotonic() - start
        given = share if elapsed < _AT_ONCE else given
        left = elapsed * (1 - share) / (share - given) if share > given else None
        return clock(elapsed) + ("" if left is None else f"  {clock(left)} left")

    if not console.is_terminal:
        shown = -1

        def line(share: float) -> None:
            nonlocal shown
            told = times(share)
            if int(share * _LINES) > shown:
                shown = int(share * _LINES)
                console.print(f"{share:.0%} done  {told}", markup=False, soft_wrap=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28, complete_style="yellow", finished_style="green"),
        TaskProgressColumn(),
        TextColumn("{task.fields[times]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(what, total=1.0, times="")
        yield lambda share: bars.update(bar, completed=share, times=times(share))
