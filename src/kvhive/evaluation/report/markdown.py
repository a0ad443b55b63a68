"""A run as Markdown: the leaderboard and every task, for documents and pull requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvhive.evaluation.report.run import NO_LEADERBOARD, Run
from kvhive.evaluation.report.table import (
    score_cells,
    score_title,
    score_titles,
    standing_cells,
)

_SHOWN = ("kvhive", "torch", "transformers", "machine", "threads", "model_sha256")


def as_markdown(run: Run, command: str) -> str:
    """The text of the file. command: what made it."""
    settings, facts = run.settings, run.facts
    how = {name: settings[name] for name in ("model", "dtype", "limit", "seed", "block", "hold")}
    engine = facts.get("engine")
    shown = {**how, "engine": engine, **{name: facts[name] for name in _SHOWN}}
    lines = [
        "<!-- kvhive report -->",
        f"# {run.name}",
        "",
        *_unfinished(run),
        ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None) + ".",
        "± is half of a 95 % bootstrap interval, paired on the same items in comparisons. MiB",
        *(
            ["of an engine are those of the keys and values kept, without its pages' rest; they"]
            if engine
            else []
        ),
        "are counted when decoding begins. Skill is (score - floor) / (full - floor); the floor is",
        "the full cache without the context.",
        *(f"\n**{sentence}.**" for sentence in run.unclear()),
        "",
        "## leaderboard: mean skill",
        "",
        *_leaderboard(run),
    ]
    for task, mode in run.parts:
        scores = run.headline(task, mode)
        if scores:
            titles = ("recipe", *score_titles(scores[0]))
            lines += [
                "",
                f"## {score_title(scores[0])}",
                "",
                *_table(titles, map(score_cells, scores)),
            ]
    return "\n".join([*lines, "", f"Made by `{command}`.", ""])


def _unfinished(run: Run) -> list[str]:
    head, *parts = run.unfinished() or [""]
    return [f"**{head}; missing:**", "", *(f"- {part}" for part in parts), ""] if head else []


def _leaderboard(run: Run) -> list[str]:
    if not run.ranked:
        return [f"{NO_LEADERBOARD}."]
    titles = ("recipe", "kept", "bytes", *run.modes)
    return _table(titles, (standing_cells(one, run.modes) for one in run.standings))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    head = [_line(titles), _line(["---", *["---:"] * (len(titles) - 1)])]
    return [*head, *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
