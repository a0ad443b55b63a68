"""What a value read from JSON must look like, said in one expression, and checked with one call.

ROW = record({"item": TEXT, "scores": mapping(NUMBER)}, {"text": TEXT})
check(value, ROW, "rows.jsonl, line 3")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Inside = Iterator[tuple[str, Any, "Shape"]]  # where in the value, a part of it, the part's shape
_SHOWN = 60  # characters of a wrong value


def _nothing(value: Any) -> Inside:
    return iter(())


@dataclass(frozen=True)
class Shape:
    """words: what is expected, as in "must be ...". fits: whether the value itself is right.
    inside: its parts and what each of them must be; asked only of a value that fits. needs: the
    fields that an object must have.
    """

    words: str
    fits: Callable[[Any], bool]
    inside: Callable[[Any], Inside] = _nothing
    needs: tuple[str, ...] = ()


def _is_text(value: Any) -> bool:
    """A string that can be printed: JSON can spell half of a surrogate pair, which cannot."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value


def _is_whole(value: Any) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


TEXT = Shape("text", _is_text)
WHOLE = Shape("a whole number", _is_whole)
COUNT = Shape("a whole number, 0 or more", lambda value: _is_whole(value) and value >= 0)
NUMBER = Shape("a finite number", _is_number)
AMOUNT = Shape("a finite number, 0 or more", lambda value: _is_number(value) and value >= 0)
FLAG = Shape("true or false", lambda value: isinstance(value, bool))
PLAIN = Shape(
    "text, a finite number, true, false or null",
    lambda value: value is None or isinstance(value, bool) or _is_text(value) or _is_number(value),
)


def among(*texts: str) -> Shape:
    """One of the texts."""
    return Shape(f"one of {', '.join(texts)}", lambda value: _is_text(value) and value in texts)


def optional(shape: Shape) -> Shape:
    """The shape, of one plain value, or null."""
    return Shape(f"{shape.words}, or null", lambda value: value is None or shape.fits(value))


def listed(shape: Shape, what: str, least: int = 0, most: int | None = None) -> Shape:
    """A list of parts of one shape. what: the list in words, as in "a list of texts"."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and least <= len(value) <= (most or len(value))

    return Shape(
        what, fits, lambda value: ((f"[{place}]", one, shape) for place, one in enumerate(value))
    )


def mapping(shape: Shape, known: Mapping[str, Shape] | None = None) -> Shape:
    """An object with any names, each a text. known: another shape for some of them."""
    shapes = known or {}
    return Shape(
        "a JSON object",
        lambda value: isinstance(value, dict) and all(map(_is_text, value)),
        lambda value: ((f".{name}", one, shapes.get(name, shape)) for name, one in value.items()),
    )


def record(fields: Mapping[str, Shape], more: Mapping[str, Shape] | None = None) -> Shape:
    """An object with all of `fields`, and perhaps `more`; what else it holds is not looked at."""
    shapes = {**fields, **(more or {})}

    def inside(value: dict[str, Any]) -> Inside:
        return ((f".{name}", value[name], shapes[name]) for name in shapes if name in value)

    return Shape("a JSON object", lambda value: isinstance(value, dict), inside, tuple(fields))


def check(value: Any, shape: Shape, where: str, advice: str = "") -> None:
    """Raises `ValueError` unless the value is of the shape, naming what is wrong in it.

    where: the file and line, or whatever the value came from. advice: what to do about it.
    """
    fault = next(_faults(value, shape, ""), None)
    if fault is not None:
        raise ValueError(f"{where}: {fault}" + (f"; {advice}" if advice else ""))


def _faults(value: Any, shape: Shape, place: str) -> Iterator[str]:
    here = f"field {place.lstrip('.')!r}" if place else "the record"
    if not shape.fits(value):
        yield f"{here} must be {shape.words}, got {_shown(value)}"
        return
    for name in shape.needs:
        if name not in value:
            yield f"{here} has no field {name!r}; expected {', '.join(shape.needs)}"
    for name, one, part in shape.inside(value):
        yield from _faults(one, part, place + name)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = ascii(value) if isinstance(value, str) else repr(value)[: _SHOWN + 1]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
