"""Plots of recipes, worked out in pixels; `chart.html.j2` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, log10

from kvhive.html.labels import Label, place_labels
from kvhive.html.look import Look

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 44, 410, 24, 232  # where values are drawn
_MOST_NAMES = 8  # lines with names at their ends; the names of more would cover them


@dataclass(frozen=True)
class Value:
    """One recipe in a plot of quality against bytes.

    low, high: its interval, or the value itself. front: whether no other recipe beats it.
    """

    recipe: str
    look: Look
    across: float
    up: float
    low: float
    high: float
    front: bool = False


@dataclass(frozen=True)
class Tick:
    """A number at an axis. at: pixels from the left or from the top."""

    at: float
    text: str


@dataclass(frozen=True)
class Point:
    """A value in pixels. whisker: the ends of its interval; title: its figures in words."""

    recipe: str
    look: Look
    x: float
    y: float
    whisker: tuple[float, float] | None
    ringed: bool
    title: str


@dataclass(frozen=True)
class Line:
    """A recipe's values, joined: "x,y x,y"."""

    recipe: str
    look: Look
    points: str


@dataclass(frozen=True)
class Chart:
    """All that is drawn. summary: the plot in words. front: the line through the best, or ""."""

    up_title: str
    across_title: str
    summary: str
    up: list[Tick]
    across: list[Tick]
    points: list[Point] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    front: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    bottom: int = BOTTOM


@dataclass(frozen=True)
class _Scale:
    """Maps values in [low, high] to pixels from `start` to `end`."""

    low: float
    high: float
    start: int
    end: int

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return round(self.start + (value - self.low) / span * (self.end - self.start), 1)

    def ticks(self, whole: bool = False) -> list[Tick]:
        values = [one for one in ticks(self.low, self.high) if not whole or one == int(one)]
        return [Tick(self(one), f"{one:g}") for one in values]


def quality_chart(values: Sequence[Value], across_title: str, up_title: str) -> Chart:
    """Every recipe with its interval; where some are on the front, those alone have names."""
    up = _scale_up([edge for one in values for edge in (one.low, one.high)])
    most = max(one.across for one in values) or 1.0
    across = _Scale(0.0, most * 1.06, LEFT, RIGHT)
    points = [_point(one, across, up) for one in values]
    best = sorted((point for point in points if point.ringed), key=lambda point: point.x)
    return Chart(
        up_title,
        across_title,
        f"{up_title}, against {across_title}: " + "; ".join(point.title for point in points),
        up.ticks(),
        across.ticks(),
        points=points,
        labels=place_labels(
            [(point.recipe, point.x, point.y) for point in best or points],
            [(point.x, point.y) for point in points],
            (LEFT, WIDTH),
            (TOP, BOTTOM),
        ),
        front=" ".join(f"{point.x},{point.y}" for point in best),
    )


def turn_chart(
    lines: Mapping[str, Mapping[int, float]], look_of: Mapping[str, Look], up_title: str
) -> Chart:
    """A line for every recipe over the turns of a conversation; a few of them have names."""
    up = _scale_up([value for line in lines.values() for value in line.values()])
    turns = [turn for line in lines.values() for turn in line]
    across = _Scale(min(turns), max(turns), LEFT, RIGHT - 90)  # room for names at the ends
    ends = {name: list(line.items())[-1] for name, line in lines.items()}
    told = (f"{name}: {value:.4g} at turn {turn}" for name, (turn, value) in ends.items())
    return Chart(
        up_title,
        "turn",
        f"{up_title}, by turn: " + "; ".join(told),
        up.ticks(),
        across.ticks(whole=True),
        lines=[
            Line(name, look_of[name], " ".join(f"{across(t)},{up(v)}" for t, v in line.items()))
            for name, line in lines.items()
        ],
        labels=place_labels(
            [(name, across(turn), up(value)) for name, (turn, value) in ends.items()]
            if len(ends) <= _MOST_NAMES
            else [],
            [],
            (LEFT, WIDTH),
            (TOP, BOTTOM),
        ),
    )


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers within [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** floor(log10(span / 4))
    step *= next(times for times in (1, 2, 5, 10) if span / (step * times) <= 8)
    first, last = -floor(-low / step), floor(high / step + 1e-9)
    return [round(count * step, 12) for count in range(first, last + 1)]


def _scale_up(values: Sequence[float]) -> _Scale:
    room = (max(values) - min(values)) * 0.08 or 0.5
    return _Scale(min(values) - room, max(values) + room, BOTTOM, TOP)


def _point(value: Value, across: _Scale, up: _Scale) -> Point:
    sure = value.low == value.high
    interval = "" if sure else f" ({value.low:.4g} to {value.high:.4g})"
    title = f"{value.recipe}: {value.up:.4g}{interval} at {value.across:.3g}"
    whisker = None if sure else (up(value.high), up(value.low))
    x, y = across(value.across), up(value.up)
    return Point(value.recipe, value.look, x, y, whisker, value.front, title)
