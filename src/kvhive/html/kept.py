"""The page of `kvhive show`: the document, shaded by how many heads kept each word."""

from __future__ import annotations

from html import escape

from kvhive.cache.report import Report
from kvhive.comparison.shading import Word
from kvhive.comparison.survivors import Survivors
from kvhive.html.hive_map import hive_map, summary
from kvhive.html.page import COLOURS, page
from kvhive.html.report import words_data

_MAP_NOTE = (
    "Every line is a KV head, layers from top to bottom; a token is coloured where it survived. "
    "Above, the share of all heads that hold it. Point at the map to read the words."
)
_MOST = 0.6  # from this share on letters must be dark, whatever the page's own colour


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

    tokens: the text of every token seen, for the map. name: the document's. facts: model, recipe
    and so on. command: what made the page. All plain text.
    """
    heads = len(survivors.rows)
    body = (
        f'<p class="note">{escape(str(report))}. {escape(summary(survivors))}.</p>'
        f'<p class="scale">kept by no head <i></i> by all {heads} heads</p>'
        f'<p class="text">{"".join(_span(word, heads) for word in words)}</p>'
        f'<h2>Hive map</h2><p class="note">{_MAP_NOTE}</p>'
        f"<figure>{hive_map(survivors, COLOURS[0])}</figure>{words_data(tokens)}"
    )
    footer = f"A word of several tokens shows their mean.<code>{escape(command)}</code>"
    return page("show", name, facts, body, footer, script="map.js")


def _span(word: Word, heads: int) -> str:
    text = escape(word.text)
    if word.share is None:
        return text
    title = f"kept by {word.share * heads:.0f} of {heads} heads"
    if word.tokens > 1:
        title += f" (mean of {word.tokens} tokens)"
    kind = "gone" if not word.share else "most" if word.share >= _MOST else "some"
    return f'<span class="{kind}" style="--a:{100 * word.share:.0f}%" title="{title}">{text}</span>'
