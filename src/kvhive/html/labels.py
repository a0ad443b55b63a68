"""Names beside the points of a plot, put where they cover neither a point nor one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LETTER, _LINE = 6.0, 13.0  # pixels: the width of a letter, the height of a line
_GAP, _MARK = 11.0, 6.0  # from a point to its name; half of what a point covers

Box = tuple[float, float, float, float]  # left, top, right, bottom
Range = tuple[float, float]


@dataclass(frozen=True)
class Label:
    """A text at (x, y), its base line. leader: the path from a point too far away, or ""."""

    text: str
    x: float
    y: float
    anchor: str
    leader: str


def place_labels(
    named: Sequence[tuple[str, float, float]],
    points: Sequence[tuple[float, float]],
    across: Range,
    up: Range,
) -> list[Label]:
    """A label for every (text, x, y) that has a free place near it, in the first of them.

    points: all that must not be covered. across, up: the pixels that labels must stay within.
    """
    taken: list[Box] = [(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in points]
    labels = []
    for text, x, y in named:
        for label, box in _places(text, x, y):
            if _fits(box, taken, across, up):
                taken.append(box)
                labels.append(label)
                break
    return labels


def _places(text: str, x: float, y: float) -> Iterator[tuple[Label, Box]]:
    """Right, left, above, below; then ever further up and down on either side, with a leader."""
    width = _LETTER * len(text)
    yield _beside(text, x + _GAP, y, "start", width)
    yield _beside(text, x - _GAP, y, "end", width)
    for away in (-_LINE - 2, _LINE + 2):
        yield _beside(text, x, y + away, "middle", width)
    for step in range(1, 12):
        for away in (-_LINE * step, _LINE * step):
            for side, anchor in ((1, "start"), (-1, "end")):
                end = x + side * (_GAP + 6)
                leader = f"M{x:.1f} {y:.1f}L{end - side * 2:.1f} {y + away:.1f}"
                yield _beside(text, end, y + away, anchor, width, leader)


def _beside(
    text: str, x: float, y: float, anchor: str, width: float, leader: str = ""
) -> tuple[Label, Box]:
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    box = (left, y - _LINE / 2, left + width, y + _LINE / 2)
    return Label(text, round(x, 1), round(y + 4, 1), anchor, leader), box


def _fits(box: Box, taken: Sequence[Box], across: Range, up: Range) -> bool:
    left, top, right, bottom = box
    if left < across[0] or right > across[1] or top < up[0] or bottom > up[1]:
        return False
    return not any(
        left < other[2] and right > other[0] and top < other[3] and bottom > other[1]
        for other in taken
    )
