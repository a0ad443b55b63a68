"""Inline SVG: quality against bytes with intervals, score by turn, and needle heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

from kvhive.evaluation.statistics import Interval

WIDTH, HEIGHT = 520, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 40


@dataclass(frozen=True)
class Point:
    """A recipe in a plot of quality against bytes. front: whether no other beats it."""

    name: str
    colour: str
    across: float
    up: Interval
    front: bool


@dataclass(frozen=True)
class _Frame:
    """Maps values to pixels and draws axes."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """Pixels from the left."""
        span = (self.right - self.left) or 1.0
        return LEFT + (value - self.left) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        span = (self.high - self.low) or 1.0
        return HEIGHT - BOTTOM - (value - self.low) / span * (HEIGHT - TOP - BOTTOM)

    def axes(self, across: str, up: str, whole: bool = False) -> str:
        """Grid lines, numbers, and what they stand for."""
        parts = []
        for value in ticks(self.low, self.high):
            y = self.y(value)
            ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            parts.append(f'<line class="grid" {ends}/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        for value in ticks(self.left, self.right):
            if whole and value != int(value):
                continue
            place = f'x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}"'
            parts.append(f'<text {place} text-anchor="middle">{value:g}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>'
        )
        parts.append(f'<text x="{LEFT}" y="{TOP - 3}" class="what">{escape(up)}</text>')
        return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers within [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** floor(log10(span / 4))
    step *= next(times for times in (1, 2, 5, 10) if span / (step * times) <= 8)
    first = -(-low // step)
    values = []
    while first * step <= high + 1e-9:
        values.append(round(first * step, 12))
        first += 1
    return values


def quality_plot(points: Sequence[Point], across: str, up: str) -> str:
    """Every recipe with its interval; the Pareto front is ringed and joined."""
    bounds = [one.up.bounds for one in points]
    lows, highs = [low for low, _ in bounds], [high for _, high in bounds]
    room = (max(highs) - min(lows)) * 0.08 or 0.5
    most = max(one.across for one in points) * 1.06
    frame = _Frame(0.0, most, min(lows) - room, max(highs) + room)
    best = sorted((one for one in points if one.front), key=lambda one: one.across)
    line = " ".join(f"{frame.x(one.across):.1f},{frame.y(one.up.value):.1f}" for one in best)
    parts = [frame.axes(across, up), f'<polyline class="front" points="{line}"/>']
    for one, (low, high) in zip(points, bounds, strict=True):
        x, y = frame.x(one.across), frame.y(one.up.value)
        top, bottom = frame.y(high), frame.y(low)
        between = "" if one.up.half is None else f" ({low:.4g} .. {high:.4g})"
        label = f"{one.name}: {one.up.value:.4g}{between}"
        ring = _ring(one.name, x, y) if one.front else ""
        parts.append(
            f'<g style="--c:{one.colour}"><line class="whisker" x1="{x:.1f}" x2="{x:.1f}" '
            f'y1="{top:.1f}" y2="{bottom:.1f}"/>{ring}<circle class="dot" cx="{x:.1f}" '
            f'cy="{y:.1f}" r="4.5"><title>{escape(label)}</title></circle></g>'
        )
    return _svg("".join(parts), f"{up} against {across}")


def _ring(name: str, x: float, y: float) -> str:
    """The mark of the Pareto front, with the recipe's name on the side that has room."""
    left = x > WIDTH * 0.7
    side = f'x="{x - 11:.1f}" text-anchor="end"' if left else f'x="{x + 11:.1f}"'
    label = f'<text class="name" {side} y="{y + 4:.1f}">{escape(name)}</text>'
    return f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="7.5"/>{label}'


def turn_plot(lines: Mapping[str, Mapping[int, float]], colours: Mapping[str, str], up: str) -> str:
    """A line for every recipe over the turns of a conversation."""
    values = [value for line in lines.values() for value in line.values()]
    turns = [turn for line in lines.values() for turn in line]
    room = (max(values) - min(values)) * 0.08 or 0.5
    frame = _Frame(float(min(turns)), float(max(turns)), min(values) - room, max(values) + room)
    parts = [frame.axes("turn", up, whole=True)]
    for name, line in lines.items():
        points = " ".join(
            f"{frame.x(float(turn)):.1f},{frame.y(value):.1f}" for turn, value in line.items()
        )
        parts.append(
            f'<polyline class="line" style="--c:{colours[name]}" points="{points}">'
            f"<title>{escape(name)}</title></polyline>"
        )
    return _svg("".join(parts), f"{up} by turn")


def heat_map(cells: Mapping[tuple[float, float], float], name: str, low: float, high: float) -> str:
    """(length, depth) -> score as a coloured table; dark is `high`."""
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells})
    head = "".join(f'<th scope="col">{length:g}</th>' for length in lengths)
    rows = []
    for depth in depths:
        row = [f'<th scope="row">{depth:.0%}</th>']
        for length in lengths:
            value = cells.get((length, depth))
            row.append(_cell(value, low, high))
        rows.append(f"<tr>{''.join(row)}</tr>")
    return (
        f'<table class="heat"><caption>{escape(name)}</caption><thead><tr><th>depth</th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(value: float | None, low: float, high: float) -> str:
    if value is None:
        return "<td></td>"
    share = (value - low) / (high - low) if high > low else 1.0
    strength = 100 * min(1.0, max(0.0, share))
    return f'<td style="--a:{strength:.0f}%">{value:.2f}</td>'


def _svg(inside: str, label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{inside}</svg>'
    )
