"""The page of `kvhive show`: the document, shaded by how many heads kept each word."""

from __future__ import annotations

from dataclasses import dataclass

from kvhive.cache.report import Report
from kvhive.comparison.shading import Word
from kvhive.comparison.survivors import Survivors
from kvhive.html.hive_map import HiveMap
from kvhive.html.look import Look
from kvhive.templates import COLOURS, SHADES, render


@dataclass(frozen=True)
class _Shaded:
    """A word, or the space between two (shade None). shade: 0 to `SHADES`."""

    text: str
    shade: int | None = None
    kept: bool = False
    title: str = ""


def kept_page(
    words: list[Word],
    tokens: list[str],
    survivors: Survivors,
    report: Report,
    name: str,
    facts: list[str],
    command: str,
) -> str:
    """A self-contained page.

    tokens: the text of every token seen, for the map. name: the document's. facts: recipe, model
    and so on. command: what made the page. All plain text.
    """
    heads = len(survivors.rows)
    return render(
        "show.html.j2",
        kind="show",
        heading=name,
        facts=facts,
        command=command,
        report=str(report),
        recipe=report.recipe,
        heads=heads,
        shaded=[_shaded(word, heads) for word in words],
        map=HiveMap.of(survivors, COLOURS[0]),
        look=Look(1),
        tokens=tokens,
    )


def _shaded(word: Word, heads: int) -> _Shaded:
    if word.share is None:
        return _Shaded(word.text)
    title = f"kept by {word.share * heads:.0f} of {heads} heads"
    if word.tokens > 1:
        title += f" (mean of {word.tokens} tokens)"
    return _Shaded(word.text, round(word.share * SHADES), word.share > 0, title)
