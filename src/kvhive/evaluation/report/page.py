"""The page of `kvhive report`: leaderboard, plots, turns, heat maps, and every number's items."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from kvhive.cache.report import MIB
from kvhive.evaluation.report.charts import Point, heat_map, quality_plot, turn_plot
from kvhive.evaluation.report.run import NO_LEADERBOARD, Run, front
from kvhive.evaluation.settings import NONE
from kvhive.evaluation.statistics import FULL, Interval, Score, Standing, by_fact
from kvhive.html.page import COLOURS, GREY, page

_SKILL_NOTE = (
    "Skill is (score - floor) / (full - floor): 100 % like the full cache, 0 % like a model that "
    "was never shown the context; perplexities in nats. The mean is over the tasks whose full "
    "cache is at least 4 standard errors above the floor. Click a heading to sort, a number to "
    "see its items."
)
_MEASURED = (
    "Intervals are 95 % of 2,000 bootstrap draws of items, paired with the full cache on the same "
    "items. Memory is counted, not estimated: every byte a cache holds when decoding begins."
)
_DIALOG = (
    '<dialog id="items"><form method="dialog"><button>close</button></form><div></div></dialog>'
)
_LONGEST_TEXT = 400  # characters of an answer shown


def report_page(run: Run, command: str) -> str:
    """A self-contained page. command: what made it."""
    colours = _colours(run)
    parts = [
        f"<style>\n{_resource('page.css')}</style>",
        *_unfinished(run),
        "<h2>Leaderboard</h2>",
        "" if run.ranked else f'<p class="note warn">{NO_LEADERBOARD}.</p>',
        _leaderboard(run),
        f'<p class="note">{_SKILL_NOTE}</p>',
        _legend(colours),
        *(f'<p class="note warn">{escape(sentence)}.</p>' for sentence in run.unclear()),
        *(_part(run, task, mode, colours) for task, mode in run.parts),
        _conditions(run),
        _DIALOG,
        f'<script type="application/json" id="run">{_data(run)}</script>',
        f"<script>\n{_resource('page.js')}</script>",
    ]
    settings = run.settings
    facts = [
        f"{settings['model']} in {settings['dtype']}",
        f"{len(run.standings)} recipes",
        f"{len(run.parts)} tasks and modes",
        f"{len({(row['task'], row['mode'], row['item']) for row in run.rows})} items",
        f"seed {settings['seed']}",
    ]
    footer = f"{_MEASURED}<code>{escape(command)}</code>"
    return page("report", run.name, facts, "\n".join(parts), footer, script="map.js")


def _unfinished(run: Run) -> list[str]:
    """A warning on top of the page."""
    head, *parts = map(escape, run.unfinished() or [""])
    lines = "".join(f"<li>{part}</li>" for part in parts)
    return [f'<div class="note warn"><p>{head}; missing:</p><ul>{lines}</ul></div>'] if head else []


def _colours(run: Run) -> dict[str, str]:
    names = [one.recipe for one in run.standings if one.recipe != FULL]
    # Recipes of one policy share a colour: budgets lie along the plots anyway.
    policies = list(dict.fromkeys(_policy(name) for name in names))
    colours = {name: COLOURS[policies.index(_policy(name)) % len(COLOURS)] for name in names}
    return {FULL: GREY, **colours, NONE: GREY}


def _policy(recipe: str) -> str:
    return recipe.partition("@")[0]


def _legend(colours: Mapping[str, str]) -> str:
    shown = {_policy(name): colour for name, colour in colours.items() if name != NONE}
    dots = (
        f'<span><i class="dot" style="--c:{colour}"></i>{escape(name)}</span>'
        for name, colour in shown.items()
    )
    return f'<p class="legend">{"".join(dots)}</p>'


def _leaderboard(run: Run) -> str:
    modes = run.modes
    parts = [part for part in run.parts if run.headline(*part)]
    titles = ["recipe", "kept", "bytes", *(f"skill<br><small>{mode}</small>" for mode in modes)]
    for task, mode in parts:
        measure = run.headline(task, mode)[0].measure.name
        titles.append(f"{escape(task)}<br><small>{mode}, {escape(measure)}</small>")
    head = "".join(
        f'<th scope="col" aria-sort="none"><button>{title}</button></th>' for title in titles
    )
    rows = "".join(_standing(run, one, modes, parts) for one in run.standings)
    return (
        f'<div class="wide"><table class="sortable" id="leaderboard"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _standing(run: Run, one: Standing, modes: list[str], parts: list[tuple[str, str]]) -> str:
    cells = [_number(one.kept, f"{one.kept:.0%}"), _number(one.bytes, f"{one.bytes:.0%}")]
    for mode in modes:
        skill = one.skills.get(mode)
        cells.append(_number(None if skill is None else skill.value, _percent(skill)))
    for task, mode in parts:
        found = [score for score in run.headline(task, mode) if score.recipe == one.recipe]
        cells.append(_score_cell(found[0]) if found else "<td></td>")
    return f'<tr><th scope="row">{escape(one.recipe)}</th>{"".join(cells)}</tr>'


def _number(value: float | None, text: str) -> str:
    sort = "" if value is None else f' data-v="{value:.6g}"'
    return f"<td{sort}>{text}</td>"


def _percent(figure: Interval | None) -> str:
    if figure is None:
        return "-"
    half = "-" if figure.half is None else f"{100 * figure.half:.1f}"
    return f"{figure.value:.1%}<br><small>± {half}</small>"


def _score_cell(score: Score) -> str:
    """A score that opens its items."""
    share = "" if score.ratio is None else f"{score.ratio.value:.0%} of {escape(score.against)}"
    ratio = share and f"<br><small>{share}</small>"
    key = escape(json.dumps([score.task, score.mode, score.recipe, score.measure.name]))
    value = score.score.value
    dim = "" if score.clear else ' class="dim"'
    link = f'<a href="#items" data-items="{key}">{value:.3g}</a>'
    return f'<td data-v="{value:.6g}"{dim}>{link}{ratio}</td>'


def _part(run: Run, task: str, mode: str, colours: Mapping[str, str]) -> str:
    scores = run.headline(task, mode)
    if not scores:
        return ""
    measure = scores[0].measure
    rows = run.of(task, mode)
    figures = [_quality(scores, colours)]
    turns = {
        name: line
        for name, line in by_fact(rows, measure.name, "turn").items()
        if name != NONE and len(line) > 1
    }
    if turns:
        figures.append(turn_plot(turns, colours, measure.name))
    maps = _heat_maps(run, task, mode, scores)
    return (
        f"<h2>{escape(task)} <small>{mode}</small></h2>{_score_table(run, task, mode)}"
        f'<div class="charts">{"".join(figures)}</div>{maps}'
    )


def _quality(scores: list[Score], colours: Mapping[str, str]) -> str:
    shown = [one for one in scores if one.recipe != NONE]
    sign = -1 if shown[0].measure.lower_is_better else 1
    best = front([(one.nbytes, sign * one.score.value) for one in shown])
    points = [
        Point(one.recipe, colours[one.recipe], one.nbytes / MIB, one.score, on_front)
        for one, on_front in zip(shown, best, strict=True)
    ]
    return quality_plot(points, "cache memory (MiB)", _title(shown[0]))


def _title(score: Score) -> str:
    arrow = "lower is better" if score.measure.lower_is_better else "higher is better"
    return f"{score.measure.name}, {arrow}"


def _score_table(run: Run, task: str, mode: str) -> str:
    part = [one for one in run.scores if (one.task, one.mode) == (task, mode)]
    measures = list(dict.fromkeys(one.measure.name for one in part))
    head = "".join(
        f'<th scope="col" aria-sort="none"><button>{escape(title)}</button></th>'
        for title in ("recipe", "tokens kept", "MiB", *measures)
    )
    found = {(one.recipe, one.measure.name): one for one in part}
    rows = []
    for recipe in dict.fromkeys(one.recipe for one in part):
        first = next(one for one in part if one.recipe == recipe)
        cells = [
            _number(first.kept, f"{first.kept:,.0f}"),
            _number(first.nbytes, f"{first.nbytes / MIB:.2f}"),
        ]
        cells += [
            _score_cell(found[recipe, name]) if (recipe, name) in found else "<td></td>"
            for name in measures
        ]
        name = "no context" if recipe == NONE else recipe
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _heat_maps(run: Run, task: str, mode: str, scores: list[Score]) -> str:
    """Length by depth, where a task's items say where their needle lies."""
    name = scores[0].measure.name
    grids: dict[str, dict[tuple[float, float], list[float]]] = {}
    for row in run.of(task, mode):
        for probe in row["probes"]:
            facts = {**row["facts"], **probe["facts"]}
            if name in probe["scores"] and {"length", "depth"} <= facts.keys():
                cell = (float(facts["length"]), float(facts["depth"]))
                in_cell = grids.setdefault(row["recipe"], {}).setdefault(cell, [])
                in_cell.append(probe["scores"][name])
    means = {
        recipe: {cell: sum(in_cell) / len(in_cell) for cell, in_cell in grid.items()}
        for recipe, grid in grids.items()
    }
    values = [value for grid in means.values() for value in grid.values()]
    if not values:
        return ""
    drawn = (heat_map(grid, recipe, min(values), max(values)) for recipe, grid in means.items())
    return f'<h3>{escape(name)} by length and depth</h3><div class="heats">{"".join(drawn)}</div>'


def _conditions(run: Run) -> str:
    shown = {**run.settings, **run.facts}
    lines = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(_plain(value))}</td></tr>"
        for name, value in shown.items()
    )
    return f'<h2>Conditions</h2><table class="conditions"><tbody>{lines}</tbody></table>'


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {one}" for name, one in value.items())
    return "-" if value is None else str(value)


def _data(run: Run) -> str:
    """Rows for the item list, without what the page does not show."""
    slim = [
        [
            *(row["task"], row["mode"], row["recipe"], row["item"], row["scores"]),
            [[probe["scores"], probe.get("text", "")[:_LONGEST_TEXT]] for probe in row["probes"]],
            {**row["facts"], "kept": row["kept"], "bytes": row["bytes"]},
        ]
        for row in run.rows
    ]
    text = json.dumps(slim, ensure_ascii=False, separators=(",", ":"))
    return text.replace("</", "<\\/").replace("<!--", "<\\u0021--")


def _resource(name: str) -> str:
    return files("kvhive.evaluation.report").joinpath(name).read_text(encoding="utf-8")
