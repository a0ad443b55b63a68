"""`kvhive compare`: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from kvhive.cli import sweep as sweeps
from kvhive.cli.completion import complete_recipe
from kvhive.cli.console import (
    Device,
    Dtype,
    Json,
    MaxTokens,
    Model,
    NewTokens,
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
    recipe_bars,
)
from kvhive.cli.fitting import Fit, fitted_recipes, read_recipe
from kvhive.cli.kept_all import kept_all
from kvhive.cli.outputs import Force, check_stdout, prepared, write
from kvhive.inference.modes import QuestionMode

if TYPE_CHECKING:
    from rich.console import Console

    from kvhive.comparison.compare import Result
    from kvhive.inference.document import Document
    from kvhive.inference.prompt import Prompt

_DEFAULT_RECIPES = ["full", "h2o@0.4", "snapkv@0.4", "buzz@0.4"]
_DEFAULT_FITTED = ["full", "h2o", "snapkv", "buzz"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(compare)


def compare(
    document: Annotated[
        str, typer.Argument(metavar="DOC", help="Text, Markdown or PDF file, or - for stdin.")
    ],
    ask: Annotated[
        list[str] | None,
        typer.Option(metavar="QUESTION", help="Repeat for more. Default: a summary."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            autocompletion=complete_recipe,
            help=f"Repeat for more. Default: {', '.join(_DEFAULT_RECIPES)}.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", readable=False, help="Also write a self-contained report."),
    ] = None,
    force: Force = False,
    max_new_tokens: NewTokens = 64,
    mode: Annotated[
        QuestionMode,
        typer.Option(help="agnostic: compress before the question is seen; aware: with it."),
    ] = "agnostic",
    turns: Annotated[
        bool, typer.Option("--turns", help="The questions are turns of one conversation.")
    ] = False,
    fit: Fit = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE",
            help="Look for the smallest budget within --kl of the full cache. Repeat for more.",
        ),
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="With --sweep: the most that may be lost a token."),
    ] = None,
    by: Annotated[
        sweeps.Unit,
        typer.Option(help="With --sweep: budgets in steps of 1 % or of 16 tokens."),
    ] = "share",
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
    """Run recipes on one document and [bold]compare[/bold] them: answers, memory, speed, fidelity.

    The full cache always runs, as the reference. Every recipe reads the document, answers each
    question from a copy of its cache, and is then fed the full cache's answers to compare
    next-token distributions.

    [dim]$[/dim] kvhive compare a.pdf --ask "Who signed?" -r buzz@0.4 -r h2o@1024 --html out.html

    [dim]$[/dim] kvhive compare a.pdf --ask "Who signed?" -r h2o -r buzz --fit 24MiB

    [dim]$[/dim] kvhive compare a.pdf --ask "Who signed?" --sweep h2o --kl 0.02

    [dim]$[/dim] man bash | kvhive compare - --ask "What does set -e do?" -r 'buzz(stride=7)@2048'
    """
    from kvhive.comparison.compare import REFERENCE
    from kvhive.comparison.compare import compare as run
    from kvhive.comparison.shading import pieces
    from kvhive.html.report import report_page
    from kvhive.inference.document import Document
    from kvhive.inference.prompt import DEFAULT_QUESTION, Prompt
    from kvhive.plugins import load_plugins
    from kvhive.recipe import Recipe

    load_plugins(plugin or ())
    sweeps.check(sweep, kl, recipe, fit, html)
    typed = list(recipe or (_DEFAULT_RECIPES if fit is None else _DEFAULT_FITTED))
    recipes = [read_recipe(text, fit) for text in typed]
    for text in sweep or []:
        Recipe.without_budget(text)
    outputs = prepared({"html": html}, [document, model, *(plugin or ())], force)
    console = err() if check_stdout(outputs, as_json) else out()
    source = Document.read(document)
    questions = ask or [DEFAULT_QUESTION]
    network, tokenizer = load_model(model, dtype, device, threads)
    prompt = Prompt.build(tokenizer, source.text, questions, turns)
    check_tokens(source.name, len(prompt.spans), max_tokens)
    if sweep and kl is not None:
        settings = (max_new_tokens, mode, turns, prefill_chunk)
        sweeps.run(network, tokenizer, source.text, questions, sweep, kl, by, settings, as_json)
        return
    if fit is not None:
        recipes = fitted_recipes(network, typed, fit, prompt, max_new_tokens, prefill_chunk)
    names = dict.fromkeys(str(one) for one in [REFERENCE, *recipes])
    with recipe_bars(list(names)) as progress:
        results = run(
            network,
            tokenizer,
            source.text,
            questions,
            recipes,
            max_new_tokens=max_new_tokens,
            mode=mode,
            turns=turns,
            prefill_chunk=prefill_chunk,
            progress=progress,
        )
    facts = _facts(prompt, model, dtype, device, mode)
    notes = _notes(results, prompt, model)
    if as_json:
        print(json.dumps(as_data(results), indent=2, ensure_ascii=False))
    else:
        _print(console, results, source, facts)
    for sentence in notes:
        note(sentence)
    for output in outputs.values():
        words = pieces(source.text, prompt)
        page = report_page(results, source.name, facts, notes, words, command_line())
        write(output, page, "report")


def as_data(results: list[Result]) -> list[dict[str, Any]]:
    """Results as plain values, for JSON."""
    return [
        {
            **result.report.as_data(),
            "recipe": result.recipe,
            "reference": result.reference,
            "prefill_seconds": result.prefill_seconds,
            "decode_tokens_per_second": result.decode_rate,
            "kl_nats": result.fidelity.kl if result.fidelity else None,
            "top1_agreement": result.fidelity.top1 if result.fidelity else None,
            "answers": [
                {"question": answer.question, "answer": answer.text} for answer in result.answers
            ],
        }
        for result in results
    ]


def _facts(prompt: Prompt, model: str, dtype: str, device: str, mode: QuestionMode) -> list[str]:
    import torch

    threads = torch.get_num_threads()
    place = f"{threads} CPU thread{'s' * (threads > 1)}" if device == "cpu" else device
    seen = {"agnostic": "compressed before the question is seen", "aware": "question seen"}
    asked = ["questions as turns"] * prompt.turns
    return [f"{len(prompt.prefix):,} tokens", f"{model} in {dtype}", place, seen[mode], *asked]


def _notes(results: list[Result], prompt: Prompt, model: str) -> list[str]:
    notes = []
    measured = next((result.fidelity for result in results if result.fidelity), None)
    if measured is None:
        notes.append(
            f"The document is longer than {model} was trained on, so there is no full cache to "
            "compare with: KL divergence and top-1 agreement are missing."
        )
    elif measured.positions < 30:
        notes.append(
            f"KL divergence and top-1 agreement rest on {measured.positions} answer tokens only; "
            "ask more for steadier numbers."
        )
    notes += [sentence for result in results if (sentence := kept_all(result.report))]
    if not prompt.chat:
        notes.append(
            f'{model} has no chat template: asked in the plain form "Question: ... Answer:".'
        )
    return notes


def _print(console: Console, results: list[Result], source: Document, facts: list[str]) -> None:
    from kvhive.cli.tables import answer_tables, measure_table

    console.print(
        Text.assemble("\n", (source.name, "bold"), ("  " + ", ".join(facts), "dim"), "\n")
    )
    console.print(measure_table(results, console.width))
    console.print()
    for table in answer_tables(results, console.width):
        console.print(table)
        console.print()
