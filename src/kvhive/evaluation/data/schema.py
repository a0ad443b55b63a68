"""Whether a record is what a task expects. Messages name the record and the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _records(value: Any, **fields: Callable[[Any], bool]) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(one, dict)
            and all(key in one and test(one[key]) for key, test in fields.items())
            for one in value
        )
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


SHAPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", _text),
    "number": ("a whole number", lambda value: isinstance(value, int)),
    "texts": ("a list of texts, at least one", lambda value: _texts(value) and bool(value)),
    "pairs": (
        "a list of [key, value] texts",
        lambda value: (
            isinstance(value, list)
            and bool(value)
            and all(_texts(one) and len(one) == 2 for one in value)
        ),
    ),
    "documents": (
        "a list of documents with title and text",
        lambda value: _records(value, title=_text, text=_text),
    ),
    "turns": (
        "a list of turns with question and answers",
        lambda value: _records(value, question=_text, answers=_texts),
    ),
}


def check(record: Any, fields: Mapping[str, str], where: str) -> None:
    """Raises `ValueError` unless the record has every field in its shape. where: file and line."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for field, shape in fields.items():
        if field not in record:
            raise ValueError(
                f"{where}: the record has no field {field!r}; expected {', '.join(fields)}"
            )
        words, fits = SHAPES[shape]
        if not fits(record[field]):
            raise ValueError(f"{where}: field {field!r} must be {words}")
