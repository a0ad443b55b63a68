"""Plots in pixels."""

from __future__ import annotations

import re

import pytest

from kvhive.html.chart import BOTTOM, LEFT, RIGHT, TOP, Value, quality_chart, ticks, turn_chart
from kvhive.html.labels import place_labels
from kvhive.html.look import Look, looks


def value(name: str, across: float, up: float, front: bool = False) -> Value:
    return Value(name, Look(1), across, up, up - 0.1, up + 0.1, front)


def test_plots_mark_the_front_and_show_intervals():
    drawn = quality_chart([value("a", 1.0, 0.2, True), value("b", 2.0, 0.1)], "MiB", "exact")
    first, second = drawn.points
    assert (first.ringed, second.ringed) == (True, False)
    assert [label.text for label in drawn.labels] == ["a"]
    assert drawn.front == f"{first.x},{first.y}"
    assert first.whisker[0] < first.y < first.whisker[1]
    assert first.title == "a: 0.2 (0.1 to 0.3) at 1"
    assert drawn.summary == f"exact, against MiB: {first.title}; {second.title}"
    assert LEFT < first.x < second.x <= RIGHT
    assert TOP <= first.y < second.y <= BOTTOM


def test_all_have_names_where_there_is_no_front():
    drawn = quality_chart([value("a", 1.0, 0.2), value("b", 2.0, 0.1)], "MiB", "exact")
    assert [label.text for label in drawn.labels] == ["a", "b"]


def test_turns_are_lines_with_names_at_their_ends():
    lines = {"full": {1: 0.5, 2: 0.4}, "a": {1: 0.3, 2: 0.3}}
    drawn = turn_chart(lines, {"full": Look(0), "a": Look(1)}, "x")
    assert [line.recipe for line in drawn.lines] == ["full", "a"]
    assert [tick.text for tick in drawn.across] == ["1", "2"]
    assert [label.text for label in drawn.labels] == ["full", "a"]
    assert drawn.summary == "x, by turn: full: 0.4 at turn 2; a: 0.3 at turn 2"


def test_names_of_many_lines_are_left_out():
    lines = {f"a{place}": {1: 0.1 * place, 2: 0.2 * place} for place in range(9)}
    drawn = turn_chart(lines, looks(lines), "x")
    assert len(drawn.lines) == 9
    assert drawn.labels == []


def test_a_name_that_would_cover_others_is_left_out():
    crowd = [(float(x), float(y)) for x in range(0, 421, 10) for y in range(20, 231, 10)]
    assert place_labels([("a name", 210.0, 120.0)], crowd, (0, 420), (20, 230)) == []


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.13, 0.21), (-3.0, 900.0), (2.0, 2.0), (-0.04, 0.3)]
)
def test_ticks_are_few_and_round(low, high):
    values = ticks(low, high)
    assert 1 <= len(values) <= 10
    assert all(low - 1e-9 <= one <= high + 1e-9 for one in values)
    assert "-0" not in [f"{one:g}" for one in values]


@pytest.mark.parametrize("count", [2, 5, 9])
def test_labels_of_close_points_lie_apart(count):
    """Boxes worked out anew: six pixels a letter, thirteen a line."""
    points = [(200.0 + place, 120.0 + 2 * place) for place in range(count)]
    named = [(f"recipe{place}@0.4", x, y) for place, (x, y) in enumerate(points)]
    labels = place_labels(named, points, (0, 420), (20, 230))
    assert [label.text for label in labels] == [text for text, *_ in named]
    boxes = []
    for label in labels:
        width = 6 * len(label.text)
        left = label.x - {"start": 0, "middle": width / 2, "end": width}[label.anchor]
        boxes.append((left, label.y - 4 - 6.5, left + width, label.y - 4 + 6.5))
    for place, one in enumerate(boxes):
        assert one[0] >= 0
        assert one[2] <= 420
        for other in boxes[:place]:
            across = one[2] <= other[0] or other[2] <= one[0]
            assert across or one[3] <= other[1] + 0.2 or other[3] <= one[1] + 0.2
        for x, y in points:
            assert not (one[0] < x < one[2] and one[1] < y < one[3])


def test_a_label_far_from_its_point_is_led_to_it():
    named = [("a", 50.0, 100.0)]
    crowd = [(50.0 + dx, 100.0 + dy) for dx in range(-40, 41, 8) for dy in (-16, -8, 0, 8, 16)]
    (label,) = place_labels(named, crowd, (0, 420), (20, 230))
    assert re.match(r"M50\.0 100\.0L", label.leader)


def test_looks_differ_until_all_are_used():
    of = looks([f"policy{place}" for place in range(33)])
    assert len(set(of.values())) == 32
    assert Look(0) not in of.values()
    assert of["policy0"] == of["policy32"]
