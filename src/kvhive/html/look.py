"""How recipes look: a colour and a shape, the same in tables, legends and plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvhive.templates import COLOURS

_SHAPES = 4


@dataclass(frozen=True)
class Look:
    """colour: 0 is grey, n the n-th of `COLOURS`. shape: circle, square, diamond, triangle."""

    colour: int
    shape: int = 0


REFERENCE = Look(0)


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for every different name; 32 of them before one comes again."""
    count = len(COLOURS)
    return {
        name: Look(1 + place % count, place // count % _SHAPES)
        for place, name in enumerate(dict.fromkeys(names))
    }
