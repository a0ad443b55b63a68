"""Specs: `name(knob=value, ...)` read, checked and printed, for recipes and tasks alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvhive.allocations import ALLOCATIONS
from kvhive.evaluation.tasks import TASKS
from kvhive.learning import CALIBRATIONS
from kvhive.policies import POLICIES
from kvhive.registry import Registry
from kvhive.spec import MOST, Knob, Spec, knob, parse, split
from kvhive.stores import STORES

RESULTS = Path(__file__).parents[1] / "docs" / "results"
THINGS: Registry[Spec] = Registry("thing")
REGISTRIES: tuple[Registry[Any], ...] = (POLICIES, ALLOCATIONS, STORES, TASKS, CALIBRATIONS)
REGISTERED = [(registry, name) for registry in REGISTRIES for name in registry]


@THINGS.register("thing")
@dataclass(frozen=True)
class Thing(Spec):
    """A knob of every kind."""

    renamed: ClassVar[Mapping[str, str]] = {"shape=round": "ball"}

    count: int = knob(3, "how many", least=1, most=9)
    size: float = knob(1.5, "how large", least=0)
    depth: float = knob(0.0, "how deep", most=0)
    flag: bool = knob(False, "whether")
    note: str = knob("", "anything")
    colour: str = knob("red", "which", among=("red", "blue"))
    way: Literal["left", "none"] = knob("left", "where to")
    limit: int | None = knob(None, "at most")
    steps: tuple[int, ...] = knob((1, 2), "one by one", least=1)
    names: tuple[str, ...] = knob((), "of whom")


@THINGS.register("pair")
@dataclass(frozen=True)
class Pair(Spec):
    """Two knobs that depend on each other."""

    low: int = knob(1, "from", least=0)
    high: int = knob(2, "to")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise ValueError(f"pair: low must be at most high, got {self.low} and {self.high}")


@pytest.mark.parametrize(
    ("text", "thing"),
    [
        ("thing", Thing()),
        (" thing ( count = 5 , ) ", Thing(count=5)),
        ("thing(flag=true, limit=none)", Thing(flag=True)),
        ("thing(flag=True, limit=None)", Thing(flag=True)),
        ("thing(colour=blue)", Thing(colour="blue")),
        ("thing(colour='blue')", Thing(colour="blue")),
        ("thing(steps=[3, 4])", Thing(steps=(3, 4))),
        ("thing(steps=(3, 4))", Thing(steps=(3, 4))),
        ("thing(steps=(3,))", Thing(steps=(3,))),
        ("thing(way=none)", Thing(way="none")),
        ("thing(way=None)", Thing(way="none")),
        ("thing(size=2)", Thing(size=2)),
        ("thing(note=hello)", Thing(note="hello")),
        ("thing(note='a, (b) = \"c\"', count=4)", Thing(note='a, (b) = "c"', count=4)),
        ("thing(note='it\\'s')", Thing(note="it's")),
        ("thing(note=5)", Thing(note="5")),
        ("thing(note=true)", Thing(note="true")),
        (f"thing(note={'7' * 5000})", Thing(note="7" * 5000)),
        ("thing(names=['a b', 'c,'])", Thing(names=("a b", "c,"))),
    ],
)
def test_every_spelling_is_read(text: str, thing: Thing) -> None:
    assert parse(THINGS, text) == thing
    assert parse(THINGS, str(thing)) == thing


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "thing '': expected a name at ''; the form is name"),
        ("thin", "unknown thing 'thin'; did you mean: thing"),
        ("thing(count=3", r"thing 'thing\(count=3': cannot read '\(count=3'; the form is name"),
        ("thing(count=3]", "cannot read"),
        ("thing()()", r"cannot read '\(\)'"),
        ("thing(3)", "write knobs as name=value, got '3'"),
        ("thing(count=3, count=4)", "count is given twice"),
        ("thing(cont=3)", "thing has no knob 'cont'; did you mean: count"),
        ("thing(count=2.5)", "thing: count must be a whole number, got 2.5"),
        ("thing(count=true)", "thing: count must be a whole number, got True"),
        ("thing(count=many)", "thing: count must be a whole number, got 'many'"),
        ("thing(count=0)", "thing: count must be between 1 and 9, got 0"),
        ("thing(count=10)", "thing: count must be between 1 and 9, got 10"),
        ("thing(size=-1)", "thing: size must be at least 0, got -1"),
        ("thing(depth=1)", "thing: depth must be at most 0, got 1"),
        ("thing(size=1e999)", "thing: size must be a finite number, got inf"),
        ("thing(size=nan)", "thing: size must be a number, got 'nan'"),
        ("thing(flag=1)", "thing: flag must be true or false, got 1"),
        ("thing(colour=green)", "thing: colour must be one of red, blue, got 'green'"),
        ("thing(way=up)", "thing: way must be 'left' or 'none', got 'up'"),
        ("thing(limit=few)", "thing: limit must be a whole number or none, got 'few'"),
        ("thing(steps=3)", r"steps must be a list of whole numbers, as in \[1, 2\], got 3"),
        ("thing(steps=[1, 'a'])", r"steps must be a list of whole numbers, .* got \(1, 'a'\)"),
        ("thing(steps=[])", r"steps must be a list of whole numbers, .* got \(\)"),
        ("thing(steps=[2, 0])", "thing: steps must be at least 1, got 0"),
        (f"thing(limit={'[' * 3000})", r"cannot read"),
        (f"thing(limit={'x' * 3000})", r"limit must be a whole number or none, got 'x{99}\.\.\.$"),
        (f"thing(limit={2**31})", "limit must be at most 2147483647, got 2147483648"),
        (f"thing(limit={'9' * 5000})", r"limit must be at most .*, got a number of 5,000 digits"),
        ("thing(shape=round)", r"thing\(shape=round\) has a name of its own now: write ball"),
        ("thing(shape='round')", r"thing\(shape=round\) has a name of its own now: write ball"),
        ("thing(shape=square)", "thing has no knob 'shape'"),
        ("pair(low=5)", "pair: low must be at most high, got 5 and 2"),
        ("pair(low=-1)", "pair: low must be at least 0, got -1"),
    ],
)
def test_one_sentence_for_what_cannot_be_read(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refusal:
        parse(THINGS, text)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("registry", "text", "sentence"),
    [
        (POLICIES, "buzz(history=log)", "write buzz_log"),
        (POLICIES, "scissorhands(variant=percentile)", "write scissorhands_percentile"),
    ],
)
def test_methods_with_a_new_name_say_so(registry, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(registry, text)
    for one in registry.values():
        assert set(one.renamed.values()) <= set(registry)


def test_objects_are_checked_as_texts_are() -> None:
    for knobs, sentence in (
        ({"count": True}, "thing: count must be a whole number, got True"),
        ({"count": 2.0}, "thing: count must be a whole number, got 2.0"),
        ({"count": 0}, "thing: count must be between 1 and 9, got 0"),
        ({"size": float("nan")}, "thing: size must be a finite number, got nan"),
        ({"size": np.float32("inf")}, "thing: size must be a finite number, got inf"),
        ({"limit": 10**5000}, r"limit must be at most .* got a number of 16,610 bits"),
        ({"note": 5}, "thing: note must be a text, got 5"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Thing(**knobs)  # type: ignore[arg-type]


def test_values_of_other_libraries_are_held_as_plain_ones() -> None:
    given: dict[str, Any] = {
        "count": np.int64(4),
        "size": np.float32(0.5),
        "way": np.str_("none"),
        "steps": [np.int8(7), 8],
    }
    thing = Thing(**given)
    assert thing == Thing(count=4, size=0.5, way="none", steps=(7, 8))
    assert type(thing.count) is int
    assert type(thing.size) is float
    assert type(thing.way) is str
    assert all(type(step) is int for step in thing.steps)
    assert hash(thing) == hash(Thing(count=4, size=0.5, way="none", steps=(7, 8)))
    assert str(thing) == "thing(count=4, size=0.5, way=none, steps=[7, 8])"


def test_printing_in_two_ways() -> None:
    """As recipes write values, and, for tasks, as Python does: both are names in recorded runs."""
    assert str(parse(POLICIES, "l2norm(skip_layers=(0, 1), decode='none')")) == (
        "l2norm(skip_layers=[0, 1], decode=none)"
    )
    assert str(parse(TASKS, "passkey(lengths=[512], decoys=2)")) == (
        "passkey(lengths=(512,), decoys=2)"
    )
    assert str(parse(TASKS, "xsum(write=false)")) == "xsum(write=False)"
    assert str(parse(TASKS, "niah_single(hay=needles)")) == "niah_single(hay='needles')"


def test_tasks_of_recorded_runs_keep_their_names() -> None:
    """They are keys: rows are found and joined by them."""
    runs = [json.loads(path.read_text()) for path in RESULTS.glob("*/run.json")]
    names = {name for run in runs for name in run["settings"]["tasks"]}
    assert len(names) > 5
    for name in names:
        assert str(parse(TASKS, name)) == name


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("pretrained=a/b", ["pretrained=a/b"]),
        ("a=1, b=2,", ["a=1", "b=2"]),
        ("recipe=buzz(stride=7,sinks=2)@0.4,a=1", ["recipe=buzz(stride=7,sinks=2)@0.4", "a=1"]),
        ("recipe=x(a=1,b=(2,[3,4]),c=5)@9", ["recipe=x(a=1,b=(2,[3,4]),c=5)@9"]),
        ('a=\'x, (\', b="],\\""', ["a='x, ('", 'b="],\\""']),
    ],
)
def test_commas_in_brackets_and_quotes_do_not_separate(text: str, parts: list[str]) -> None:
    assert split(text) == parts


# ---- everything that is registered --------------------------------------------------------------


def values(one: Knob, kind: Any = None) -> st.SearchStrategy[Any]:
    """Values of the knob's kind, in its range."""
    kind = one.kind if kind is None else kind
    least = -MOST if one.least is None else int(one.least)
    most = MOST if one.most is None else int(one.most)
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        smallest = 0 if one.default == () else 1
        return st.lists(values(one, get_args(kind)[0]), min_size=smallest, max_size=4).map(tuple)
    if get_args(kind):
        return st.one_of(*(values(one, part) for part in get_args(kind)))
    return {
        bool: st.booleans(),
        int: st.integers(least, most) | st.integers(max(least, 0), min(most, max(least, 0) + 40)),
        float: st.floats(one.least, one.most, allow_nan=False, allow_infinity=False),
        str: st.sampled_from(one.among) if one.among else st.text(),
        type(None): st.none(),
    }[kind]


def made(cls: type[Spec], draw: st.DataObject) -> Spec:
    """One with random knobs; those that do not go together are left out one by one."""
    spec = cls()
    for one in cls.knobs():
        try:
            spec = replace(spec, **{one.name: draw.draw(values(one), one.name)})
        except ValueError:
            continue
    return spec


@pytest.mark.parametrize(("registry", "name"), [(THINGS, "thing"), *REGISTERED])
@given(draw=st.data())
def test_what_is_printed_is_read_again(registry, name: str, draw: st.DataObject) -> None:
    spec = made(registry[name], draw)
    again = parse(registry, str(spec))
    assert again == spec
    assert str(again) == str(spec)


@pytest.mark.parametrize(("registry", "name"), REGISTERED)
def test_every_spec_checks_every_knob(registry, name: str) -> None:
    """A `__post_init__` that leaves out its base's would let these pass."""
    for one in registry[name].knobs():
        spec = registry[name]()
        object.__setattr__(spec, one.name, {"neither": "number nor text"})
        with pytest.raises(ValueError, match=f"{name}: {one.name} must be"):
            spec.__post_init__()
