"""`kvhive show`: the document itself, shaded by what survived."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from kvhive.cli.console import (
    Device,
    Dtype,
    Json,
    MaxTokens,
    Model,
    Plugin,
    PrefillChunk,
    Quiet,
    Threads,
    check_tokens,
    command_line,
    err,
    load_model,
    note,
    out,
)
from kvhive.cli.fitting import Fit, OneRecipe, default_recipe, fitted_to, read_recipe
from kvhive.cli.kept_all import kept_all
from kvhive.cli.outputs import Force, check_stdout, prepared, write
from kvhive.cli.shades import SHADES, shade_of

if TYPE_CHECKING:
    from kvhive.cache.report import Report
    from kvhive.comparison.shading import Word

_GONE = "#767676"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(show)


def show(
    document: Annotated[
        str, typer.Argument(metavar="DOC", help="Text, Markdown or PDF file, or - for stdin.")
    ],
    recipe: OneRecipe = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", readable=False, help="Write a page instead of printing."),
    ] = None,
    force: Force = False,
    fit: Fit = None,
    prefill_chunk: PrefillChunk = None,
    max_tokens: MaxTokens = 32_768,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
    model: Model = "smollm2",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """[bold]Show[/bold] a document with its words shaded by how many heads of the model kept them.

    [dim]$[/dim] kvhive show report.txt --recipe buzz@0.4

    [dim]$[/dim] kvhive show report.txt --recipe 'h2o(recent=64)@512' --html kept.html
    """
    from kvhive.cache.footprint import Workload
    from kvhive.cache.hive_cache import HiveCache
    from kvhive.comparison.shading import pieces, shade
    from kvhive.comparison.survivors import Survivors
    from kvhive.html.kept import kept_page
    from kvhive.inference.document import Document
    from kvhive.inference.generation import check_length, read
    from kvhive.inference.prompt import Prompt
    from kvhive.plugins import load_plugins

    load_plugins(plugin or ())
    chosen = recipe or default_recipe(fit)
    read_recipe(chosen, fit)
    outputs = prepared({"html": html}, [document, model, *(plugin or ())], force)
    check_stdout(outputs, as_json)
    source = Document.read(document)
    network, tokenizer = load_model(model, dtype, device, threads)
    prompt = Prompt.build(tokenizer, source.text, [])
    check_tokens(source.name, len(prompt.spans), max_tokens)
    work = Workload(tokens=len(prompt.prefix), chunk=prefill_chunk, turn=1)
    parsed = fitted_to(network, chosen, fit, work)
    cache = HiveCache.for_model(network, parsed)
    check_length(cache, len(prompt.prefix), 0, prefill_chunk)
    with err().status(Text(f"{parsed}: reading {len(prompt.prefix):,} tokens")):
        read(network, cache, prompt.prefix, prefill_chunk)
    survivors = Survivors.of(cache)
    words = shade(source.text, prompt, survivors)
    for output in outputs.values():
        facts, texts = [str(parsed), f"{model} in {dtype}"], pieces(source.text, prompt)
        told = (cache.report(), source.name, facts, command_line())
        write(output, kept_page(words, texts, survivors, *told), "page")
    if sentence := kept_all(cache.report()):
        note(sentence)
    if as_json:
        print(json.dumps(as_data(words, len(survivors.rows), cache.report()), ensure_ascii=False))
    elif not outputs:
        console = out()
        console.print(shaded_text(words))
        console.print(_legend(len(survivors.rows)))
        console.print(Text.assemble((f"{parsed}  ", "bold"), str(cache.report())), soft_wrap=True)


def as_data(words: list[Word], heads: int, report: Report) -> dict[str, Any]:
    """What was kept as plain values, for JSON: each word with the share of heads that hold it."""
    held = [{"word": word.text, "kept": word.share} for word in words if word.share is not None]
    return {**report.as_data(), "heads": heads, "words": held}


def shaded_text(words: list[Word]) -> Text:
    """The document for the terminal; a word's ground is the brighter the more heads kept it."""
    text = Text()
    for word in words:
        text.append(word.text, style=_style(word.share))
    return text


def _style(share: float | None) -> str:
    if share is None:
        return ""
    if not share:
        return _GONE
    return shade_of(share)


def _legend(heads: int) -> Text:
    legend = Text("\nkept by ", style="dim")
    legend.append(" no ", style=_GONE)
    steps = len(SHADES)
    for place, style in enumerate(SHADES, start=1):
        limit = f"< {heads * place / steps:.0f}" if place < steps else f"<= {heads}"
        legend.append(f" {limit} ", style=style)
    legend.append(f" of {heads} heads", style="dim")
    return legend
