"""Files that commands write: checked before the work, told of when they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from kvhive.cli.console import err
from kvhive.files import Output, check_distinct, expanded

Force = Annotated[bool, typer.Option("--force", help="Replace files that kvhive did not make.")]

MARKS = {  # what a file of ours has near its front
    "html": '<meta name="generator" content="kvhive">',
    "csv": "task,mode,recipe,measure,",
    "markdown": "<!-- kvhive report -->",
}


def prepared(
    wanted: Mapping[str, Path | None], reads: Iterable[str | Path], force: bool
) -> dict[str, Output]:
    """The outputs that were asked for, by kind ("html", "csv", "markdown"). reads: files and
    folders that the command reads. Raises as `Output.prepare` does.
    """
    inputs = list(_files(reads))
    outputs = {
        kind: Output.prepare(path, MARKS[kind], inputs, force)
        for kind, path in wanted.items()
        if path is not None
    }
    check_distinct(list(outputs.values()))
    return outputs


def write(output: Output, text: str, what: str) -> None:
    """Write it, and say so on stderr unless it went to stdout."""
    output.write(text)
    if output.path is not None:
        err().print(Text.assemble(f"{what}: ", (output.name, "bold")), soft_wrap=True)


def check_stdout(outputs: Mapping[str, Output], as_json: bool) -> bool:
    """Whether an output goes to stdout, so that tables must not.

    Raises `ValueError` when JSON would go there too.
    """
    to_stdout = [output.name for output in outputs.values() if output.path is None]
    if to_stdout and as_json:
        raise ValueError(f"--json and {to_stdout[0]!r} both go to stdout: name a file")
    return bool(to_stdout)


def _files(names: Iterable[str | Path]) -> Iterator[Path]:
    for name in names:
        path = expanded(name)
        yield from path.iterdir() if path.is_dir() else [path]
