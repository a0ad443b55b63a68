"""`kvhive plan`: what fits a memory, from a model's config alone."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from kvhive.cli.console import (
    MOST,
    Dtype,
    Json,
    Model,
    Plugin,
    PrefillChunk,
    Quiet,
    err,
    note,
    out,
)
from kvhive.wrapping import wrap

if TYPE_CHECKING:
    from kvhive.cache.footprint import Workload
    from kvhive.model.outline import Outline
    from kvhive.planning import Planned

_FIGURES = 66  # letters that the columns beside a recipe's name take
_DEFAULT_RECIPES = ["full", "h2o@0.4", "snapkv@0.4", "buzz@0.4", "streaming_llm@0.4"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(plan)


def plan(
    context: Annotated[
        str,
        typer.Option(
            metavar="TOKENS", help="Tokens read and written by each row: 4096, or 32k for 32,768."
        ),
    ],
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What weights and cache must fit: 40GiB, 24 GB."),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=MOST, metavar="ROWS", help="Rows read at once.")
    ] = 1,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            help=f"Repeat for more. Default: {', '.join(_DEFAULT_RECIPES)}.",
        ),
    ] = None,
    prefill_chunk: PrefillChunk = None,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
    model: Model = "smollm2",
    dtype: Dtype = "bfloat16",
) -> None:
    """[bold]Plan[/bold] memory from a model's config alone: weights, caches, and what fits.

    Nothing is loaded: a folder with a config.json will do. What the model itself works with while
    it reads (activations) comes on top; it is less the smaller --prefill-chunk is.

    [dim]$[/dim] kvhive plan --model smollm2 --context 8k --batch 8 --memory 2GiB

    [dim]$[/dim] kvhive plan -m ./llama --context 32k --memory 40GiB -r full -r h2o@4096
    """
    from kvhive.cache.footprint import Workload
    from kvhive.planning import plan as planned
    from kvhive.plugins import load_plugins
    from kvhive.recipe import Recipe
    from kvhive.units import parse_bytes, parse_tokens

    load_plugins(plugin or ())
    recipes = [Recipe.parse(text) for text in dict.fromkeys(recipe or _DEFAULT_RECIPES)]
    work = Workload(batch, parse_tokens(context), prefill_chunk, turn=1)
    size = None if memory is None else parse_bytes(memory)
    outline = _outline(model, dtype)
    rows = [planned(outline, one, work, size) for one in recipes]
    if as_json:
        print(json.dumps(as_data(rows, outline, work, size), indent=2))
    else:
        _print(rows, outline, work, size, f"{model} in {dtype}")
    for sentence in _notes(rows, outline, work, size):
        note(sentence)


def as_data(
    rows: list[Planned], outline: Outline, work: Workload, memory: int | None
) -> dict[str, Any]:
    """A plan as plain values, for JSON."""
    return {
        "parameters": outline.parameters,
        "weight_bytes": outline.weight_bytes,
        "trained_length": outline.trained_length,
        "context": work.tokens,
        "batch": work.batch,
        "prefill_chunk": work.chunk,
        "memory_bytes": memory,
        "recipes": [
            {
                "recipe": str(row.recipe),
                "cache_bytes": row.cache,
                "cache_bytes_while_reading": row.reading,
                "total_bytes": outline.weight_bytes + row.reading,
                "fits": row.fits,
                "largest_batch": row.largest_batch,
                "longest_context": row.longest_context,
            }
            for row in rows
        ],
    }


def _outline(model: str, dtype: str) -> Outline:
    with err().status(Text(f"laying out {model}")):
        from kvhive.model.config import load_config
        from kvhive.model.loading import DTYPES, be_quiet
        from kvhive.model.outline import Outline

        if dtype not in DTYPES:
            raise ValueError(f"plan: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        be_quiet()
        return Outline.of_config(load_config(model), dtype)


def _print(
    rows: list[Planned], outline: Outline, work: Workload, memory: int | None, name: str
) -> None:
    from kvhive.units import bytes_text

    weights = f"{outline.parameters:,} parameters, {bytes_text(outline.weight_bytes)}"
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        header_style="bold",
    )
    table.add_column("recipe", no_wrap=True)
    titles = ["cache\nheld", "cache while\nreading", "with\nweights"]
    titles += ["fits"] if memory else []
    titles += ["largest\nbatch", "longest\ncontext"] if memory else []
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    names = max(12, out().width - _FIGURES)
    for row in rows:
        sizes = (row.cache, row.reading, outline.weight_bytes + row.reading)
        cells = [bytes_text(size) for size in sizes]
        if memory:
            cells += ["yes" if row.fits else "no"]
            cells += [f"{number:,}" for number in (row.largest_batch, row.longest_context)]
        table.add_row(Text(wrap(str(row.recipe), names), style="bold"), *cells)
    rows_text = f"{work.batch:,} row{'s' * (work.batch > 1)}"
    asked = [f"{work.tokens:,} tokens", rows_text]
    asked += [f"memory {bytes_text(memory)}"] if memory else []
    console = out()
    console.print(Text.assemble("\n", (name, "bold"), (f"  {weights}", "dim")))
    console.print(Text(", ".join(asked) + "\n", style="dim"))
    console.print(table)
    console.print()


def _notes(rows: list[Planned], outline: Outline, work: Workload, memory: int | None) -> list[str]:
    assert work.tokens is not None
    notes = [
        "Sizes are bounds. What the model works with while it reads (activations) is not in them."
    ]
    if any((row.recipe.positions or row.recipe.policy.position_rule) == "cache" for row in rows):
        notes.append(
            "Recipes that count positions in the cache hold some keys twice; here that is counted "
            "for every key it may happen to, and is often less."
        )
    trained = outline.trained_length
    if trained is not None and work.tokens > trained:
        notes.append(
            f"{work.tokens:,} tokens are more than the {trained:,} the model was trained on; only "
            "recipes that count positions in the cache can read them, in chunks."
        )
    if getattr(outline.config, "quantization_config", None) is not None:
        notes.append("The config names quantized weights; they are counted as if they were not.")
    if memory is not None and not any(row.fits for row in rows):
        notes.append(_what_would(rows, outline, work, memory))
    held = [outline.shapes[index] for index in outline.stock_layers() if index in outline.shapes]
    if held and work.chunk is None:
        notes.append(
            f"{len(held)} layers are not compressed (sliding windows); until the next token they "
            f"hold on to the whole prompt. --prefill-chunk keeps that small."
        )
    return notes


def _what_would(rows: list[Planned], outline: Outline, work: Workload, memory: int) -> str:
    """What to change so that something fits."""
    from kvhive.cache.footprint import footprint
    from kvhive.units import bytes_text

    if outline.weight_bytes >= memory:
        return (
            f"Nothing fits: the weights alone take {bytes_text(outline.weight_bytes)}; name more "
            "memory, or a smaller --dtype."
        )
    best = min(rows, key=lambda row: row.reading)
    ways = []
    if best.largest_batch:
        ways.append(f"--batch {best.largest_batch}")
    if best.longest_context:
        ways.append(f"--context {best.longest_context}")
    chunked = footprint(best.recipe, outline, replace(work, chunk=512)).while_reading
    if work.chunk is None and outline.weight_bytes + (chunked or memory) <= memory:
        ways.append("--prefill-chunk 512")
    ways.append(f"--memory {bytes_text(outline.weight_bytes + best.reading).replace(' ', '')}")
    return f"Nothing fits; {best.recipe} would with {', or '.join(ways)}."
