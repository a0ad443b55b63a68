"""`kvhive profile`: what was learnt about a model, layer by layer."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from kvhive.cli.calibrate import facts, use
from kvhive.cli.console import Json, Plugin, Quiet, command_line, out
from kvhive.cli.outputs import Force, check_stdout, prepared, write
from kvhive.cli.shades import shade_of

if TYPE_CHECKING:
    from kvhive.calibration import Profile
    from kvhive.learning import Picture


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(profile)


def profile(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What kvhive calibrate wrote.")],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", readable=False, help="Write a page instead of printing."),
    ] = None,
    force: Force = False,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the [bold]profile[/bold] of a model: where it comes from, and what it says.

    [dim]$[/dim] kvhive profile mine.safetensors --html mine.html
    """
    from kvhive.calibration import Profile
    from kvhive.html.profile import profile_page
    from kvhive.learning import CALIBRATIONS
    from kvhive.plugins import load_plugins

    load_plugins(plugin or ())
    outputs = prepared({"html": html}, [file, *(plugin or ())], force)
    check_stdout(outputs, as_json)
    loaded = Profile.load(file)
    pictures = CALIBRATIONS[loaded.method].pictures(loaded)
    for output in outputs.values():
        told = Path(file).name, use(loaded, file), command_line()
        write(output, profile_page(loaded, pictures, *told), "page")
    if as_json:
        print(json.dumps(as_data(loaded, pictures), ensure_ascii=False))
    elif not outputs:
        _print(loaded, pictures, file)


def as_data(profile: Profile, pictures: tuple[Picture, ...]) -> dict[str, Any]:
    """A profile as plain values, for JSON: where it comes from, and its numbers by layer."""
    tables = [
        {"meaning": one.meaning, "columns": list(one.columns), "layers": one.values.tolist()}
        for one in pictures
    ]
    return {**facts(profile), "tables": tables}


def _print(profile: Profile, pictures: tuple[Picture, ...], file: str) -> None:
    console = out()
    console.print(Text.assemble((Path(file).name, "bold"), (f"  {profile.date}", "dim")))
    lines = ("method", profile.method), ("learnt from", profile.data)
    for name, value in (*lines, ("model", profile.fingerprint), ("use it", use(profile, file))):
        console.print(Text.assemble((f"{name:<12}", "dim"), value), soft_wrap=True)
    for picture in pictures:
        console.print()
        console.print(Text(picture.meaning, style="bold"))
        console.print(heat(picture, console.width))


def heat(picture: Picture, width: int) -> Text:
    """A line for every layer, a block for every column; without numbers where they do not fit into
    `width` letters.
    """
    texts = picture.texts()
    cell = 2 + max(map(len, chain(picture.columns, *texts)))
    wide = 6 + cell * len(picture.columns) <= width
    lines = [_head(picture, cell)] if wide else []
    for layer, (row, shades) in enumerate(zip(texts, picture.shades(), strict=True)):
        line = Text(f"{layer:>5} ", style="dim")
        for text, share in zip(row, shades, strict=True):
            line.append(f"{text:^{cell}}" if wide else "  ", style=shade_of(share))
        lines.append(line)
    return Text("\n", end="").join(lines)


def _head(picture: Picture, cell: int) -> Text:
    titles = "".join(f"{column:^{cell}}" for column in picture.columns)
    return Text(f"layer {titles}".rstrip(), style="dim")
