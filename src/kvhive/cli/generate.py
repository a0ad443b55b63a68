"""`kvhive generate`: stream an answer through a compressed cache."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from kvhive.cli.chat import Chat, is_wanted
from kvhive.cli.console import (
    Device,
    Dtype,
    Json,
    Model,
    NewTokens,
    Plugin,
    PrefillChunk,
    Quiet,
    Seed,
    Threads,
    err,
    load_model,
    note,
)
from kvhive.cli.fitting import Fit, OneRecipe, default_recipe, fitted_to, read_recipe
from kvhive.units import MIB

if TYPE_CHECKING:
    from kvhive.cache.report import Report
    from kvhive.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(generate)


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text, or - for stdin.")
    ] = None,
    recipe: OneRecipe = None,
    max_new_tokens: NewTokens = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above 0 draws one.")
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Draw among the likeliest that make up this share."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Draw among so many likeliest tokens.")
    ] = None,
    seed: Seed = 0,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Answer line after line, in one conversation on one cache."),
    ] = False,
    fit: Fit = None,
    prefill_chunk: PrefillChunk = None,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
    model: Model = "smollm2",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """[bold]Generate[/bold] text through a compressed cache, then say what the cache holds.

    [dim]$[/dim] kvhive generate "Tell me about bees." --recipe 'buzz@256'

    [dim]$[/dim] cat letter.txt | kvhive generate - --recipe h2o@0.3 --max-new-tokens 400

    [dim]$[/dim] kvhive generate --chat --recipe streaming_llm@1024
    """
    import torch

    from kvhive.cache.footprint import Workload
    from kvhive.cache.hive_cache import HiveCache
    from kvhive.inference.conversation import Conversation
    from kvhive.inference.document import STDIN, Document
    from kvhive.inference.generation import check_length, decode, end_tokens, read
    from kvhive.inference.sampling import Sampling
    from kvhive.inference.text_pieces import pieces
    from kvhive.model.chat import chat_ids
    from kvhive.plugins import load_plugins

    load_plugins(plugin or ())
    chosen, sampling = recipe or default_recipe(fit), Sampling(temperature, top_k, top_p)
    read_recipe(chosen, fit)
    talking = is_wanted(prompt, chat, as_json)
    text = Document.read(STDIN).text if prompt == STDIN else prompt
    if text is not None and not text.strip():
        raise ValueError("the prompt is empty: give a text, or - to read it from stdin")
    network, tokenizer = load_model(model, dtype, device, threads)
    if not tokenizer.chat_template:
        way = (
            "lines are asked as Question: ... Answer:"
            if talking
            else "it continues the text as it is"
        )
        note(f"{model} has no chat template: {way}.")
    torch.manual_seed(seed)
    if talking:
        parsed = fitted_to(network, chosen, fit, Workload(chunk=prefill_chunk))
        begin = partial(Conversation.begin, network, tokenizer, parsed, prefill_chunk)
        options = {"max_new_tokens": max_new_tokens, **asdict(sampling)}
        Chat(begin, options, partial(_tell, parsed)).run(text)
        return
    assert text is not None
    ids = chat_ids(tokenizer, text)
    work = Workload(tokens=len(ids) + max_new_tokens, chunk=prefill_chunk, turn=1)
    parsed = fitted_to(network, chosen, fit, work)
    cache = HiveCache.for_model(network, parsed)
    check_length(cache, len(ids), max_new_tokens, prefill_chunk)
    with err().status(Text(f"reading {len(ids):,} tokens")):
        logits = read(network, cache, ids, prefill_chunk)
    ends = end_tokens(network, tokenizer)
    answer = decode(network, cache, logits, max_new_tokens, ends, sampling)
    written = []
    for piece in pieces(tokenizer, (token for token, _ in answer)):
        written.append(piece)
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if as_json:
        told = {"prompt": text, "answer": "".join(written), **cache.report().as_data()}
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return
    sys.stdout.write("\n")
    _tell(parsed, cache.report())


def _tell(recipe: Recipe, report: Report) -> None:
    err().print(Text(f"{recipe}: {_held(report)}", style="dim"), soft_wrap=True)


def _held(report: Report) -> str:
    """What the cache holds; plainly so when nothing had to go."""
    if report.tokens_kept < report.tokens_seen:
        return str(report)
    return (
        f"{report.tokens_seen:,} tokens seen: nothing to evict, "
        f"{report.nbytes / MIB:.1f} MiB of {report.full_nbytes / MIB:.1f} MiB"
    )
