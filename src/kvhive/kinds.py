"""Kinds of values that a knob may have: named by type hints, written as text, told in words."""

from __future__ import annotations

import ast
from collections.abc import Callable
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_CONSTANTS = {"true": True, "false": False, "none": None}
_KINDS = {  # words for a value of the kind, and for a list of them
    int: ("a whole number", "whole numbers, as in [1, 2]"),
    float: ("a number", "numbers, as in [0.5, 1]"),
    bool: ("true or false", "flags, as in [True, False]"),
    str: ("a text", "texts, as in ['a', 'b']"),
    NoneType: ("none", "none"),
}
_PLAIN: tuple[tuple[type, Callable[[Any], object]], ...] = (
    (bool, bool),
    (Integral, int),
    (Real, float),
    (str, "".join),
    (list, lambda values: tuple(map(plain, values))),
    (tuple, lambda values: tuple(map(plain, values))),
)


def literal(text: str) -> object:
    """true, false, none in any case, else a Python literal, else the text itself."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def plain(value: object) -> object:
    """Numbers, texts and lists of other libraries as Python's own; anything else as it is."""
    return next((convert(value) for kind, convert in _PLAIN if isinstance(value, kind)), value)


def fits(value: object, kind: Any) -> bool:
    """Whether a plain value is of the kind that a type hint names; a flag is no number."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(one, parts[0]) for one in value)
    return type(value) in ((int, float) if kind is float else (kind,))


def in_words(kind: Any) -> str:
    """A type hint as a message names it."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(in_words(part) for part in parts)
    if origin is Literal:
        return " or ".join(repr(part) for part in parts)
    if origin is tuple:
        return f"a list of {_words(parts[0])[1]}"
    return _words(kind)[0]


def _words(kind: Any) -> tuple[str, str]:
    name = getattr(kind, "__name__", str(kind))
    return _KINDS.get(kind, (name, f"{name} values"))
