"""What every command shares: where it prints, how it fails, and its common options."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer.core import TyperGroup

from kvhive.cli.completion import complete_model
from kvhive.plugins import told_as_plugins

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EXPECTED = (ValueError, TypeError, OSError, ImportError, MemoryError)
REFUSED = 2
MOST = 2**31 - 1  # tokens: more than any memory holds
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)  # of the command that runs


def _hush(wanted: bool) -> bool:
    _quiet.set(wanted)
    return wanted


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="smollm2, a folder, a .gguf file or a Hugging Face id.",
        rich_help_panel="Model",
        autocompletion=complete_model,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(metavar="NAME", help="bfloat16, float16 or float32.", rich_help_panel="Model"),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, mps ...", rich_help_panel="Model")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="CPU threads. Default: torch's own choice.",
        rich_help_panel="Model",
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST,
        metavar="TOKENS",
        help="Read in steps of so many tokens and evict after each, so that memory stays small.",
    ),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        help="A Python file (or module) with tasks or methods of your own. Repeat for more.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no notes.", callback=_hush),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
MaxTokens = Annotated[
    int, typer.Option(min=1, max=MOST, metavar="TOKENS", help="Refuse a longer document.")
]
NewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", min=1, max=MOST, metavar="TOKENS", help="The longest answer."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of everything that is drawn.")]


def out() -> Console:
    """Results: stdout, as it is now."""
    return Console(highlight=False)


def err() -> Console:
    """Progress and notes: stderr, so that results can be piped; nothing with --quiet."""
    return Console(stderr=True, highlight=False, quiet=_quiet.get())


def failed(message: str) -> None:
    """One red sentence on stderr."""
    sentence = " ".join(message.split())
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), (sentence, "red")), soft_wrap=True)


def note(message: str) -> None:
    """One quiet sentence on stderr."""
    err().print(Text.assemble(("note: ", "bold"), (message, "dim")), soft_wrap=True)


class Commands(TyperGroup):
    """Ends a command that was given something it cannot use with one sentence and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; no traceback for what a user can cause."""
        _quiet.set(False)
        try:
            with told_as_plugins():
                return super().invoke(ctx)
        except typer.BadParameter as error:
            failed(error.format_message())
        except BrokenPipeError:  # the reader of a pipe has left; Typer ends quietly
            raise
        except _EXPECTED as error:
            if os.environ.get("KVHIVE_DEBUG"):
                raise
            failed(_sentence(error))
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            failed("out of memory; give a shorter text, or read it with --prefill-chunk 512")
        raise typer.Exit(REFUSED)


def load_model(
    name: str, dtype: str, device: str, threads: int | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`kvhive.model.loading.load` with a sign of life, and without the advice transformers logs."""
    with err().status(Text(f"loading {name}")):
        import torch

        from kvhive.model.loading import be_quiet, load

        be_quiet()
        if threads is not None:
            torch.set_num_threads(threads)
        return load(name, dtype=dtype, device=device)


def check_tokens(name: str, tokens: int, most: int) -> None:
    """Raises `ValueError` for a document of more than `most` tokens."""
    if tokens > most:
        raise ValueError(
            f"{name} has {tokens:,} tokens, more than --max-tokens {most:,}: give a part of it, or "
            "raise the limit (reading time grows with the square of the length)"
        )


def command_line() -> str:
    """The command as it was typed, for the footer of a page."""
    return shlex.join(["kvhive", *sys.argv[1:]])


@contextmanager
def recipe_bars(recipes: list[str]) -> Iterator[Any]:
    """A progress bar for every recipe on stderr, or lines where that is no terminal; yields what
    `compare(progress=...)` wants.
    """
    console = err()
    if not console.is_terminal:
        yield _progress_lines(console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28, complete_style="yellow", finished_style="green"),
        TextColumn("{task.fields[doing]}", style="dim"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bars: dict[str, TaskID] = {}

        def add(recipe: str) -> None:
            bars[recipe] = progress.add_task(recipe, total=1.0, start=False, doing="waiting")

        def update(recipe: str, doing: str, share: float) -> None:
            if recipe not in bars:
                add(recipe)
            progress.start_task(bars[recipe])
            progress.update(bars[recipe], completed=share, doing=doing)
            if share >= 1:
                progress.stop_task(bars[recipe])

        for recipe in recipes:
            add(recipe)
        yield update


def _progress_lines(console: Console) -> Callable[[str, str, float], None]:
    """A line whenever a recipe begins something else."""
    doing_now: dict[str, str] = {}

    def update(recipe: str, doing: str, share: float) -> None:
        if doing_now.get(recipe) != doing:
            doing_now[recipe] = doing
            console.print(Text(f"{recipe}: {doing}", style="dim"), soft_wrap=True)

    return update


def _sentence(error: BaseException) -> str:
    """What the error says; a file's name where the system says only why."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    if isinstance(error, MemoryError):
        return "out of memory; give a shorter text, or read it with --prefill-chunk 512"
    return str(error) or type(error).__name__
