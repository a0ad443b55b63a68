"""Recipe: its string form, there and back; and one sentence for everything that cannot work."""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvhive.allocations.ada import Ada
from kvhive.allocations.pyramid import Pyramid
from kvhive.allocations.uniform import Uniform
from kvhive.budget import Budget
from kvhive.policies import POLICIES
from kvhive.policies.buzz import Buzz
from kvhive.policies.buzz_log import BuzzLog
from kvhive.policies.h2o import H2O
from kvhive.policies.snapkv import SnapKV
from kvhive.policies.streaming_llm import StreamingLLM
from kvhive.recipe import Recipe
from kvhive.registry import Registry
from kvhive.stores.dense import Dense


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("buzz@0.4", Recipe(Buzz(), Budget(share=0.4))),
        ("buzz@40%", Recipe(Buzz(), Budget(share=0.4))),
        ("h2o@1024", Recipe(H2O(), Budget(tokens=1024))),
        (" h2o ( recent = 7 ) @ 64 ", Recipe(H2O(recent=7), Budget(tokens=64))),
        ("h2o()@64", Recipe(H2O(), Budget(tokens=64))),
        ("h2o(recent=none)@64", Recipe(H2O(), Budget(tokens=64))),
        ("buzz(stride=7, variant=no_max)@64", Recipe(Buzz("no_max", stride=7), Budget(tokens=64))),
        ("buzz(variant='fast')@64", Recipe(Buzz("fast"), Budget(tokens=64))),
        ("buzz(drain=False)@64", Recipe(Buzz(drain=False), Budget(tokens=64))),
        (
            "buzz(positions=original, slack=3)@64",
            Recipe(Buzz(), Budget(tokens=64), positions="original", slack=3),
        ),
        ("buzz@64/uniform+dense", Recipe(Buzz(), Budget(tokens=64), Uniform(), Dense())),
        ("buzz@64+dense", Recipe(Buzz(), Budget(tokens=64))),
        (
            "h2o@64/ada(floor=0.5, counting=reference)",
            Recipe(H2O(), Budget(tokens=64), Ada(0.5, counting="reference")),
        ),
        ("buzz_log@0.2/pyramid(beta=5)", Recipe(BuzzLog(), Budget(share=0.2), Pyramid(beta=5))),
        ("buzz(sink=2, window=5, threshold=20)", Recipe(Buzz(sink=2, window=5, threshold=20))),
    ],
)
def test_parsing(text: str, recipe: Recipe) -> None:
    assert Recipe.parse(text) == recipe
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.parse(recipe) is recipe


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("buzz@0.4", "buzz@0.4"),
        ("buzz(stride=5)@40%", "buzz@0.4"),
        ("buzz( stride = 7,positions=original )@ 64 /uniform+dense", None),
        ("h2o(recent=none, slack=0)@1.0", "h2o(slack=0)@1.0"),
        ("full", "full"),
        ("buzz(drain=false)@64", "buzz(drain=false)@64"),
    ],
)
def test_printing_leaves_out_what_is_usual(text: str, printed: str | None) -> None:
    expected = printed or "buzz(stride=7, positions=original)@64"
    assert str(Recipe.parse(text)) == expected


def test_knobs_that_add_up_to_a_budget_need_none() -> None:
    recipe = Recipe.parse("buzz(sink=2, window=5, threshold=20)")
    assert recipe.budget == Budget(tokens=27)
    assert str(recipe) == "buzz(sink=2, window=5, threshold=20)"
    assert Recipe.parse("buzz(sink=2, window=5, threshold=20)@27") == recipe
    with pytest.raises(ValueError, match="add up to a budget of 27, but @64 was asked for"):
        Recipe.parse("buzz(sink=2, window=5, threshold=20)@64")


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("rest", ["", "@0.4", "@512", "@0.123456789", "@1.0"])
def test_every_policy_survives_its_printing(name: str, rest: str) -> None:
    sizing = POLICIES[name]().sizing
    sized = not sizing.budgeted or sizing.alone is not None or sizing.implied is not None
    if not (sizing.budgeted if rest else sized):
        with pytest.raises(ValueError, match="budget"):
            Recipe.parse(name + rest)
    else:
        assert str(Recipe.parse(name + rest)) == name + rest


buzz_knobs = st.fixed_dictionaries(
    {},
    optional={
        "variant": st.sampled_from(["accum", "fast", "no_max"]),
        "sink": st.none() | st.integers(0, 9),
        "stride": st.integers(3, 9),
        "drain": st.booleans(),
        "prefill": st.sampled_from(["step", "streamed"]),
        "match": st.sampled_from(["peak", "mean"]),
    },
)


@given(
    knobs=buzz_knobs,
    budget=st.integers(100, 10**6) | st.floats(0.0, 1.0, exclude_min=True),
    positions=st.sampled_from([None, "original", "cache"]),
    slack=st.none() | st.integers(0, 9),
)
def test_there_and_back(
    knobs: dict[str, object], budget: int | float, positions: str | None, slack: int | None
) -> None:
    recipe = Recipe(Buzz(**knobs), Budget.of(budget), positions=positions, slack=slack)  # type: ignore[arg-type]
    assert Recipe.parse(str(recipe)) == recipe
    assert hash(Recipe.parse(str(recipe))) == hash(recipe)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("buz@0.4", "unknown policy 'buz'; did you mean: buzz"),
        ("H20@0.4", "unknown policy 'H20'.*h2o"),
        ("zzzzqqq@0.4", "unknown policy 'zzzzqqq'; known: .*buzz"),
        ("buzz@64/unifrom", "unknown allocation 'unifrom'; did you mean: uniform"),
        ("buzz@64+dence", "unknown store 'dence'; did you mean: dense"),
        ("buzz(strid=5)@64", "buzz has no knob 'strid'; did you mean: stride"),
        ("h2o(slak=0)@64", "h2o has no knob 'slak'; did you mean: slack"),
        ("buzz@64+dense(bits=2)", "dense has no knob 'bits'; it has none"),
        ("buzz@0", "at least 1, got 0"),
        ("buzz@-4", "at least 1, got -4"),
        ("buzz@1.5", r"must lie in \(0, 1\], got 1.5"),
        ("buzz@", "neither a number"),
        ("buzz", "buzz needs a budget: buzz@0.4 keeps 40 %, buzz@1024 tokens"),
        ("full@0.4", "full takes no budget; leave @0.4 out"),
        ("streaming_llm@4", "streaming_llm: a budget of 4 is below 5"),
        ("h2o(recent=30)@20", "h2o: a budget of 20 is below 3[01]"),
        ("buzz(sink=4, window=20)@25", "buzz: a budget of 25 is below 26"),
        ("buzz(stride=2)@64", "stride must be at least 3, got 2"),
        ("buzz(stride=0)@64", "stride must be at least 1, got 0"),
        ("buzz(stride=2.5)@64", "buzz: stride must be a whole number, got 2.5"),
        ("buzz(stride=true)@64", "buzz: stride must be a whole number, got True"),
        ("buzz(stride=five)@64", "buzz: stride must be a whole number, got 'five'"),
        ("buzz(drain=1)@64", "buzz: drain must be true or false, got 1"),
        (
            "buzz(variant=slow)@64",
            "buzz: variant must be 'accum' or 'fast' or 'no_max', got 'slow'",
        ),
        ("buzz(sink=-1)@64", "sink must be at least 0, got -1"),
        ("buzz(sink=[4])@64", "sink must be a whole number or none"),
        ("buzz(sink={[]: 1})@64", "sink must be a whole number or none"),
        ("h2o(recent=-1)@64", "recent must be at least 0, got -1"),
        ("streaming_llm(sink=-1)@64", "sink must be at least 0, got -1"),
        ("buzz(5)@64", "write knobs as name=value, got '5'"),
        ("buzz(stride=5, stride=7)@64", "stride is given twice"),
        (
            "buzz(positions=relative)@64",
            "positions must be 'original' or 'cache' or none, got 'relative'",
        ),
        ("buzz(slack=-1)@64", "slack must be at least 0, got -1"),
        ("buzz(slack=lots)@64", "buzz: slack must be a whole number or none, got 'lots'"),
        ("buzz(slack=1.5)@64", "buzz: slack must be a whole number or none, got 1.5"),
        ("h2o(recent=20, slack=30)@48", "slack 30 leaves h2o fewer than its least of 2"),
        ("buzz@64 and more", "neither a number"),
        ("buzz@64/uniform and more", "cannot read 'and more'"),
        ("buzz@64+dense+dense", r"cannot read '\\+dense'"),
        ("buzz@64+dense/uniform", "cannot read '/uniform'"),
        ("buzz/uniform@64", "cannot read '@64'"),
        ("buzz(stride=5@64", r"cannot read '\\(stride=5@64'"),
        ("buzz)@64", r"cannot read '\\)@64'"),
        ("", "expected a name"),
        ("  ", "expected a name"),
        ("@0.4", "expected a name at '@0.4'"),
        ("buzz@64/", "expected a name"),
        ("streaming_llm@64/ada", "ada shares by the scores of tokens, and streaming_llm has none"),
        ("buzz(variant=no_max)@64/global", r"global shares .*, and buzz\\(variant=no_max\\) has"),
        ("corm@64/global", "and corm has none; use a policy that scores, such as h2o or snapkv"),
        ("corm/pyramid", "corm has no budget here that pyramid could share out; leave /pyramid"),
        ("full/ada", "full has no budget here that ada could share out"),
        ("kv_compress@64/ada", "kv_compress shares its budget out among all heads itself"),
        ("kv_compress@64/pyramid", "kv_compress .* itself; leave /pyramid out"),
        ("h2o@64/ada(floor=1.5)", "ada: floor must be between 0 and 1, got 1.5"),
        ("h2o@64/pyramid(beta=0)", "pyramid: beta must be at least 1, got 0"),
        ("snapkv@20/pyramid", "snapkv: a budget of 20 is below 33"),
        ("5@64", "expected a name"),
    ],
)
def test_one_sentence_for_what_cannot_work(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("\\\\", "\\")) as refusal:
        Recipe.parse(text)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("number", "budget"),
    [(48, Budget(tokens=48)), (0.4, Budget(share=0.4)), ("40%", Budget.of(0.4))],
)
@pytest.mark.usefixtures("unchecked")
def test_a_bare_number_is_read_as_in_the_string_form(
    number: int | float | str, budget: Budget
) -> None:
    assert Recipe(H2O(), number) == Recipe(H2O(), budget)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"policy": "h2o"}, "policy must be an instance of Policy, got 'h2o'; Recipe.parse reads"),
        ({"policy": H2O}, "policy must be an instance of Policy"),
        ({"policy": H2O(), "budget": [48]}, r"expected a number of tokens or a share, got \[48\]"),
        ({"policy": H2O(), "budget": True}, "expected a number of tokens or a share, got True"),
        ({"policy": H2O(), "budget": 48, "allocation": "uniform"}, "an instance of Allocation"),
        ({"policy": H2O(), "budget": 48, "store": Dense}, "store must be an instance of StoreKind"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_parts_that_are_none(parts: dict[str, object], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        Recipe(**parts)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_knobs_of_another_kind_are_refused_before_any_step() -> None:
    """At the latest by the recipe, as in the string form."""
    with pytest.raises(ValueError, match=r"snapkv: window must be a whole number, got 7\.5"):
        Recipe(SnapKV(window=7.5), 48)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Recipe(H2O(), 0)  # type: ignore[arg-type]


alphabet = st.sampled_from([*"buzzh2o(),=@/+%.-0123456789[]{}'\" \n", "stride", "dense", "none"])


@given(pieces=st.lists(alphabet, max_size=12), start=st.sampled_from(["", "buzz", "buzz(", "h2o@"]))
def test_garbage_is_always_a_value_error(pieces: list[str], start: str) -> None:
    text = start + "".join(pieces)
    try:
        recipe = Recipe.parse(text)
    except ValueError:
        return
    assert Recipe.parse(str(recipe)) == recipe


def test_policies_refuse_what_the_form_cannot_see() -> None:
    for policy, knobs in (
        (Buzz, {"stride": 2}),
        (BuzzLog, {"cells": 0}),
        (H2O, {"recent": -1}),
        (StreamingLLM, {"sink": -1}),
    ):
        with pytest.raises(ValueError, match=policy.name):
            policy(**knobs)


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_knob_says_what_it_means(name: str) -> None:
    policy = POLICIES[name]
    assert policy.name == name
    assert [knob.name for knob in policy.knobs()] == [f.name for f in fields(policy)]
    assert all(len(knob.meaning) > 5 for knob in policy.knobs())
    assert policy.__doc__
    assert policy.source
    assert policy.cost


def test_a_registry_knows_its_names() -> None:
    registry: Registry[object] = Registry("thing")
    registry.register("one")(type("One", (), {}))
    assert list(registry) == ["one"]
    assert "one" in registry
    assert "two" not in registry
    assert len(registry) == 1
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        registry.register("one")(type("Other", (), {}))
    with pytest.raises(ValueError, match="unknown thing 'onee'; did you mean: one"):
        registry["onee"]


def test_names_are_words() -> None:
    names = itertools.chain(POLICIES, *([f.name for f in fields(p)] for p in POLICIES.values()))
    assert all(name.isidentifier() and name.islower() for name in names)
