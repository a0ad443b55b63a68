"""The page of `kvhive compare`: table, plot, answers and hive maps."""

from __future__ import annotations

import json
from html import escape
from itertools import takewhile

from kvhive.cache.report import MIB
from kvhive.comparison.compare import Answer, Result
from kvhive.html.hive_map import hive_map, summary
from kvhive.html.page import COLOURS, GREY, page
from kvhive.html.plot import plot

_COLUMNS = (
    "recipe",
    "tokens kept<br><small>mean of a head</small>",
    "cache<br><small>MiB</small>",
    "smaller<br><small>times</small>",
    "prefill<br><small>seconds</small>",
    "decode<br><small>tokens/s</small>",
    "KL divergence<br><small>nats, lower is better</small>",
    "top-1<br><small>agreement</small>",
)
_MAP_NOTE = (
    "What each cache still holds of the document. Every line is a KV head, layers from top to "
    "bottom; a token is coloured where it survived. Above, the share of all heads that hold it. "
    "Point at a map to read the words."
)
_MEASURED = (
    "Memory is counted, not estimated: every byte the cache holds after reading the document, "
    "bookkeeping included. KL divergence and top-1 agreement compare next-token distributions "
    "while the full cache's own answers are fed to every cache."
)


def report_page(
    results: list[Result],
    name: str,
    facts: list[str],
    notes: list[str],
    tokens: list[str],
    command: str,
) -> str:
    """A self-contained page.

    name: the document's. facts: model, precision and so on. notes: sentences under the table.
    tokens: the text of every token seen, for the maps. command: what made the page. All plain text.
    """
    colours = _colours(results)
    parts = [
        "<h2>Side by side</h2>",
        _table(results, colours),
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        _plot_section(results, colours),
        "<h2>Answers</h2>",
        *(_question(results, colours, place) for place in range(len(results[0].answers))),
        _maps(results, colours),
        words_data(tokens),
    ]
    footer = f"{_MEASURED}<code>{escape(command)}</code>"
    return page("compare", name, facts, "\n".join(parts), footer, script="map.js")


def _colours(results: list[Result]) -> list[str]:
    rest = iter(range(len(results)))
    return [GREY if r.reference else COLOURS[next(rest) % len(COLOURS)] for r in results]


def _table(results: list[Result], colours: list[str]) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in _COLUMNS)
    largest = max(result.report.nbytes for result in results)
    rows = [_row(result, colour, largest) for result, colour in zip(results, colours, strict=True)]
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(result: Result, colour: str, largest: int) -> str:
    report, fidelity = result.report, result.fidelity
    share = report.tokens_kept / max(report.tokens_seen, 1)
    width = 100 * report.nbytes / largest
    rate = "-" if result.decode_rate is None else f"{result.decode_rate:.1f}"
    cells = [
        f"{report.tokens_kept:,.0f} <small>{share:.0%}</small>",
        f'{report.nbytes / MIB:.1f}<span class="bar" style="width:{width:.0f}%"></span>',
        f"{report.ratio:.2f}",
        f"{result.prefill_seconds:.2f}",
        rate,
        f"{fidelity.kl:.3f}" if fidelity else "-",
        f"{fidelity.top1:.0%}" if fidelity else "-",
    ]
    return (
        f'<tr style="--c:{colour}"><th scope="row">{_who(result)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
    )


def _who(result: Result) -> str:
    kind = "dot open" if result.reference else "dot"
    note = " <small>reference</small>" if result.reference else ""
    return f'<i class="{kind}"></i>{escape(result.recipe)}{note}'


def _plot_section(results: list[Result], colours: list[str]) -> str:
    drawing = plot(results, colours)
    return f"<h2>Quality against memory</h2>\n{drawing}" if drawing else ""


def _question(results: list[Result], colours: list[str], place: int) -> str:
    full = next((result.answers[place] for result in results if result.reference), None)
    cards = []
    for result, colour in zip(results, colours, strict=True):
        answer = result.answers[place]
        note = "" if result.reference or full is None else _agreement(answer, full)
        cards.append(
            f'<div class="answer" style="--c:{colour}"><p class="who">{escape(result.recipe)}'
            f"<small>{note}</small></p><p>{_marked(answer, full)}</p></div>"
        )
    question = escape(results[0].answers[place].question)
    return f'<h3>{question}</h3>\n<div class="answers">{"".join(cards)}</div>'


def _agreement(answer: Answer, full: Answer) -> str:
    return "same as full" if answer.tokens == full.tokens else "differs"


def _marked(answer: Answer, full: Answer | None) -> str:
    """The answer, underlined from the first word that is not the full cache's."""
    if not answer.text:
        return "<small>(nothing)</small>"
    if full is None or answer.tokens == full.tokens:
        return escape(answer.text)
    pairs = zip(answer.text.split(" "), full.text.split(" "), strict=False)
    same = " ".join(mine for mine, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    rest = answer.text[len(same) :]
    gap = rest[: len(rest) - len(rest.lstrip())]
    return f'{escape(same + gap)}<span class="other">{escape(rest.lstrip())}</span>'


def _maps(results: list[Result], colours: list[str]) -> str:
    shown = [pair for pair in zip(results, colours, strict=True) if not pair[0].reference]
    if not shown:
        return ""
    figures = [_figure(result, colour) for result, colour in shown]
    return f'<h2>Hive map</h2><p class="note">{_MAP_NOTE}</p>{"".join(figures)}'


def _figure(result: Result, colour: str) -> str:
    caption = f"<b>{escape(result.recipe)}</b> &ensp;{escape(summary(result.survivors))}"
    drawing = hive_map(result.survivors, colour)
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def words_data(tokens: list[str]) -> str:
    """Token texts for the hover script; no "<" is left in them that could end the element."""
    data = json.dumps(tokens, ensure_ascii=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="words">{data}</script>'
