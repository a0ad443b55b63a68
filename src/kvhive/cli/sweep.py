"""`kvhive compare --sweep`: what was found, as a table and as plain values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from kvhive.cli.console import note, out
from kvhive.units import MIB
from kvhive.wrapping import wrap

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvhive.comparison.result import Result
    from kvhive.comparison.sweep import Probe, Sweep
    from kvhive.inference.modes import QuestionMode

_FIGURES = 56  # letters that the columns beside a recipe's name take
Unit = Literal["share", "tokens"]


def check(
    sweep: list[str] | None,
    kl: float | None,
    recipe: list[str] | None,
    fit: str | None,
    html: Path | None,
) -> None:
    """Raises `ValueError` for options that do not go together."""
    if bool(sweep) != (kl is not None):
        raise ValueError("--sweep and --kl go together: --sweep h2o --kl 0.02")
    beside = {"--recipe": recipe, "--fit": fit, "--html": html}
    given = [name for name, value in beside.items() if value]
    if sweep and given:
        raise ValueError(f"--sweep finds budgets and prints them; leave {given[0]} out")


def run(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    questions: list[str],
    recipes: list[str],
    kl: float,
    by: Unit,
    settings: tuple[int, QuestionMode, bool, int | None],
    as_json: bool,
) -> None:
    """Look for budgets, and print what was found."""
    from kvhive.comparison.sweep import sweep

    new, mode, turns, chunk = settings
    reference, found = sweep(
        network,
        tokenizer,
        document,
        questions,
        recipes,
        kl,
        unit=by,
        max_new_tokens=new,
        mode=mode,
        turns=turns,
        prefill_chunk=chunk,
        tried=tell,
    )
    if as_json:
        print(json.dumps(as_data(found), indent=2))
    else:
        out().print(sweep_table(reference, found))
    for sentence in sweep_notes(found):
        note(sentence)


def tell(probe: Probe) -> None:
    """One budget that was tried, on stderr."""
    note(
        f"tried {probe.recipe}: KL {probe.kl:.4f} nats, {probe.result.report.nbytes / MIB:.1f} MiB"
    )


def sweep_table(reference: Result, sweeps: list[Sweep]) -> Table:
    """One line for every recipe: the smallest budget within the loss."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("smallest\nwithin the loss", no_wrap=True)
    for title in ("tokens\nkept", "cache\nMiB", "x\nsmaller", "KL\nnats", "top-1\nagree", "tried"):
        table.add_column(title, justify="right", no_wrap=True)
    names = max(16, out().width - _FIGURES)
    table.add_row(Text(f"{reference.recipe} (reference)"), *_cells(reference), "-")
    for one in sweeps:
        tried = str(len(one.probes))
        if one.found is None:
            name = f"{one.recipe.policy.name}: none"
            table.add_row(Text(wrap(name, names), style="bold"), *["-"] * 5, tried)
        else:
            name = str(one.found.recipe)
            table.add_row(Text(wrap(name, names), style="bold"), *_cells(one.found.result), tried)
    return table


def sweep_notes(sweeps: list[Sweep]) -> list[str]:
    """What a reader of the table must know."""
    notes = []
    for one in sweeps:
        if one.found is None:
            notes.append(
                f"{one.probes[0].recipe}, the largest budget, loses {one.probes[0].kl:.4f} nats: "
                f"none is within {one.limit:g}."
            )
        for small, large in one.rises:
            notes.append(
                f"The loss does not fall as budgets grow: {small.recipe} loses {small.kl:.4f} nats "
                f"and {large.recipe} {large.kl:.4f}. Bisection takes it to fall, so budgets that "
                "were not tried may do too."
            )
    return notes


def as_data(sweeps: list[Sweep]) -> list[dict[str, Any]]:
    """Sweeps as plain values, for JSON."""
    return [
        {
            "recipe": str(one.recipe.policy),
            "kl_limit": one.limit,
            "found": None if one.found is None else str(one.found.recipe),
            "monotone": not one.rises,
            "tried": [_data(probe) for probe in one.probes],
        }
        for one in sweeps
    ]


def _data(probe: Probe) -> dict[str, Any]:
    report = probe.result.report
    return {
        "recipe": str(probe.recipe),
        "kl_nats": probe.kl,
        "tokens_kept": report.tokens_kept,
        "cache_bytes": report.nbytes,
    }


def _cells(result: Result) -> list[str]:
    report, fidelity = result.report, result.fidelity
    return [
        f"{report.tokens_kept:,.0f}",
        f"{report.nbytes / MIB:.1f}",
        f"{report.ratio:.2f}",
        f"{fidelity.kl:.4f}" if fidelity else "-",
        f"{fidelity.top1:.0%}" if fidelity else "-",
    ]
