"""Spec: what is written `name(knob=value, ...)`; policies, allocations, stores and tasks are specs.

This is the only place where such a text is read, checked and printed. A spec is a frozen dataclass
whose fields are its knobs: their type hints say the kind of value, `knob` its range and meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, get_type_hints

from kvhive.kinds import fits, in_words, literal, plain
from kvhive.registry import Registry, did_you_mean

FORM = "name(knob=value, ...)"
MOST = 2**31 - 1  # the largest whole number a knob takes unless it says another
_RULE = "kvhive"  # where a field's metadata holds what `knob` was told
_NAME = re.compile(r"\s*([A-Za-z_]\w*)\s*")
_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL)


@dataclass(frozen=True)
class Knob:
    """One hyper-parameter. kind: its type hint. least, most: the range of a number, or of every
    number of a list (whole numbers never go beyond `MOST`); among: the texts it may be, any if
    empty.
    """

    name: str
    kind: Any
    default: Any
    meaning: str = ""
    least: int | float | None = None
    most: int | float | None = None
    among: tuple[str, ...] = ()

    def check(self, owner: str, value: object) -> Any:
        """`value` in plain form: numpy's numbers as Python's, lists as tuples.

        Raises `ValueError` for another kind of value, a number that is not finite, what is out of
        range, and an empty list unless the default is one.
        """
        value = plain(value)
        each = value if isinstance(value, tuple) else (value,)
        if not fits(value, self.kind) or (each == () and self.default != ()):
            raise self._refusal(owner, in_words(self.kind), _shortened(_shown(value)))
        for one in each:
            self._check_range(owner, one)
        return value

    def read(self, owner: str, text: str) -> Any:
        """The value that `text` means: a Python literal, true, false, none, or a bare word.

        Raises `ValueError` as `check` does.
        """
        meanings = [literal(text), text, text.lower()]
        fitting = [value for value in meanings if fits(plain(value), self.kind)]
        if not fitting and text.lstrip("+-").isdigit() and len(text) > 20:
            raise self._refusal(owner, f"at most {MOST}", f"a number of {len(text):,} digits")
        return self.check(owner, [*fitting, *meanings][0])

    def spell(self, value: object, as_python: bool = False) -> str:
        """The text that `read` takes for `value`; as_python: as a Python literal."""
        if as_python:
            return repr(value)
        if isinstance(value, str):
            bare = value.isidentifier() and self.read("", value) == value
            return value if bare else repr(value)
        if value is None or isinstance(value, bool):
            return str(value).lower()
        return str(list(value)) if isinstance(value, tuple) else str(value)

    def _check_range(self, owner: str, one: object) -> None:
        if self.among and isinstance(one, str) and one not in self.among:
            raise self._refusal(owner, f"one of {', '.join(self.among)}", _shortened(repr(one)))
        if isinstance(one, bool) or not isinstance(one, int | float):
            return
        if isinstance(one, float) and not math.isfinite(one):
            raise self._refusal(owner, "a finite number", str(one))
        edge = MOST if isinstance(one, int) else math.inf
        least = -edge if self.least is None else self.least
        most = edge if self.most is None else self.most
        if not least <= one <= most:
            words = f"at least {least}" if one < least else f"at most {most}"
            both = self.least is not None and self.most is not None
            words = f"between {least} and {most}" if both else words
            raise self._refusal(owner, words, _number(one))

    def _refusal(self, owner: str, wanted: str, given: str) -> ValueError:
        return ValueError(f"{owner}: {self.name} must be {wanted}, got {given}")


def whole(owner: str, name: str, value: object, least: int | None = 0) -> int:
    """A whole number that a function was given, as `Knob.check` reads it."""
    return int(Knob(name, int, 0, least=least).check(owner, value))


def knob(
    default: Any,
    meaning: str,
    *,
    least: int | float | None = None,
    most: int | float | None = None,
    among: tuple[str, ...] = (),
) -> Any:
    """A field of a spec, with what `Knob` says of it."""
    rule = {"meaning": meaning, "least": least, "most": most, "among": among}
    return field(default=default, metadata={_RULE: rule})


@dataclass(frozen=True)
class Spec:
    """Base of what is written `name(knob=value, ...)`. A subclass that checks how its knobs relate
    does so in its own `__post_init__`, after `super().__post_init__()`.

    Class facts: `name` (the registry sets it), `renamed` (an old spelling "knob=value" -> the name
    of what it became), `as_python` (values are printed as Python literals, not as recipes do).
    """

    name: ClassVar[str] = "unnamed"
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    as_python: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises `ValueError` for a knob of another kind or outside its range."""
        for one in self.knobs():
            object.__setattr__(self, one.name, one.check(self.name, getattr(self, one.name)))

    @classmethod
    def knobs(cls) -> tuple[Knob, ...]:
        """The hyper-parameters in their order."""
        hashable: Any = cls  # mypy takes the objects' __hash__ for the class's own
        return _knobs(hashable)

    def __str__(self) -> str:
        return printed(self)


@cache
def _knobs(cls: type[Any]) -> tuple[Knob, ...]:
    hints = get_type_hints(cls)
    return tuple(
        Knob(f.name, hints[f.name], f.default, **f.metadata.get(_RULE, {})) for f in fields(cls)
    )


def printed(spec: Spec, extra: Mapping[str, str] = MappingProxyType({})) -> str:
    """`name(knob=value, ...)` of the knobs that differ from their defaults, and of `extra` ones
    that are spelled already.
    """
    values = {one.name: (one, getattr(spec, one.name)) for one in spec.knobs()}
    changed = {
        name: one.spell(value, spec.as_python)
        for name, (one, value) in values.items()
        if value != one.default
    }
    inside = ", ".join(f"{name}={text}" for name, text in (changed | dict(extra)).items())
    return f"{spec.name}({inside})" if inside else spec.name


# ---- reading ------------------------------------------------------------------------------------

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Call:
    """A spec as it was written: the name, and the text of every knob's value."""

    name: str
    knobs: dict[str, str]


def parse(registry: Registry[S], text: str) -> S:
    """From "name" or "name(knob=value, ...)". Raises `ValueError` naming what is wrong."""
    what = f"{registry.kind} {text!r}"
    call, rest = take(text, what)
    if rest:
        raise ValueError(f"{what}: cannot read {rest!r}; the form is {FORM}")
    return build(registry, call)


def take(text: str, what: str) -> tuple[Call, str]:
    """Read `name` or `name(knob=value, ...)` from the front; return it and what is left.

    what: names the whole in messages. Raises `ValueError` for a front of another form.
    """
    match = _NAME.match(text)
    if match is None:
        raise ValueError(f"{what}: expected a name at {text!r}; the form is {FORM}")
    rest = text[match.end() :]
    inside = _bracketed(rest)
    knobs: dict[str, str] = {}
    for piece in split(inside or ""):
        knob, equals, value = (part.strip() for part in piece.partition("="))
        if not equals:
            raise ValueError(f"{what}: write knobs as name=value, got {piece!r}")
        if knob in knobs:
            raise ValueError(f"{what}: {knob} is given twice")
        knobs[knob] = value
    return Call(match[1], knobs), rest if inside is None else rest[len(inside) + 2 :].lstrip()


def build(registry: Registry[S], call: Call, besides: Sequence[str] = ()) -> S:
    """The registered class with these knobs. besides: knobs known elsewhere, for hints.

    Raises `ValueError` for an unknown name, knob or value.
    """
    cls = registry[call.name]
    known = {one.name: one for one in cls.knobs()}
    for name, text in call.knobs.items():
        if new := cls.renamed.get(old := f"{name}={literal(text)}"):
            raise ValueError(f"{call.name}({old}) has a name of its own now: write {new}")
        if name not in known:
            names = [*known, *besides]
            hint = did_you_mean(name, names) if names else "it has none"
            raise ValueError(f"{call.name} has no knob {name!r}; {hint}")
    return cls(**{name: known[name].read(call.name, text) for name, text in call.knobs.items()})


def split(text: str) -> list[str]:
    """The parts between commas that stand outside of brackets and quotes, none of them blank."""
    cuts = [end for token, end, depth in _tokens(text) if token == "," and depth == 0]
    starts, ends = [0, *cuts], [*(cut - 1 for cut in cuts), len(text)]
    parts = (text[start:end].strip() for start, end in zip(starts, ends, strict=True))
    return [part for part in parts if part]


def _bracketed(text: str) -> str | None:
    """What stands in the round brackets that `text` begins with; None if there are none."""
    if text.startswith("("):
        for token, end, depth in _tokens(text):
            if depth == 0:
                return text[1 : end - 1] if token == ")" else None
    return None


def _tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """Each letter or quoted text, where it ends, and how deep in brackets that is."""
    depth = 0
    for match in _TOKEN.finditer(text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        yield match[0], match.end(), depth


def _number(number: int | float) -> str:
    """A number of any size: Python refuses to write one of more than 4,300 digits."""
    size = number.bit_length() if isinstance(number, int) else 0
    return str(number) if size <= 128 else f"a number of {size:,} bits"


def _shown(value: object) -> str:
    return _number(value) if isinstance(value, int) else repr(value)


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."
