"""`Lengths` foretells, from lengths alone, what the layers of a cache hold after every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhive.cache.hive_cache import make_layers
from kvhive.kernels import NOTHING, Needs
from kvhive.lengths import Event, Lengths, nothing_seen, policies_of
from kvhive.policies import POLICIES
from kvhive.recipe import Recipe
from kvhive.rope import Rotation

EVEN = (
    "buzz(drain=false)@80",
    "buzz(match=mean)@0.4",
    "buzz(prefill=streamed)@80",
    "buzz(prefill_stride=fit)@80",
    "buzz(variant=fast)@80",
    "buzz(variant=no_max)@0.4",
    "buzz@0.4",
    "buzz@80",
    "buzz_log(cells=3, window=8)",
    "cascading@0.4",
    "cascading@80",
    "elastic(merge=false, drop_ratio=0.5)",
    "elastic(merge=false)@80",
    "expected_attention@80",
    "full",
    "h2o(recent=8)@80",
    "h2o(slack=0)@80",
    "h2o@0.4",
    "h2o@100000",
    "hive(reconstruct=false)@80/uniform",
    "keydiff@80",
    "l2norm@0.4",
    "random@80",
    "scissorhands@0.4",
    "scissorhands@80",
    "snapkv(decode=none)@80",
    "snapkv(group_reduce=max, pooling=max)@80",
    "snapkv@0.4",
    "streaming_llm@80",
    "tova(protect_last=true)@80",
    "tova@80",
    "window@80",
)
UNEVEN = {
    "corm": "corm lets heads hold different numbers",
    "kv_compress@80": "kv_compress lets heads hold different numbers",
    "scissorhands_percentile": "scissorhands_percentile lets heads hold different numbers",
    "h2o@80/ada": "ada lets heads or layers hold different numbers of tokens; write h2o@80",
    "hive@80": "global lets heads or layers .* write hive@80/uniform",
    "h2o@80/pyramid": "pyramid lets heads or layers hold different",
    "l2norm(skip_layers=[1])@80": "holds other numbers of tokens in layer 1 than elsewhere",
}
LAYERS, HEADS, GROUP, WIDTH = 2, 3, 2, 8


@pytest.mark.parametrize("text", EVEN)
@settings(max_examples=2, deadline=None)
@given(prompt=st.integers(1, 300), decoded=st.integers(0, 90), turn=st.integers(2, 60))
def test_lengths_are_those_of_a_cache(text: str, prompt: int, decoded: int, turn: int) -> None:
    """A prompt, decoding, another turn, decoding again, with random keys and queries."""
    recipe = Recipe.parse(text)
    turning = Rotation(10000.0 ** (-torch.arange(0, WIDTH, 2).double() / WIDTH))
    in_cache = (recipe.positions or recipe.policy.position_rule) == "cache"
    layers = make_layers(recipe, [turning if in_cache else None] * LAYERS, [turning] * LAYERS)
    lengths, seen = Lengths(recipe), 0
    torch.manual_seed(prompt)
    for fresh in [prompt, *[1] * decoded, turn, *[1] * 5]:
        seen += fresh
        for layer in layers:
            keys, values = torch.randn(2, 1, HEADS, fresh, WIDTH) * 2
            layer.update(keys, values)
            layer.attend(torch.randn(1, HEADS * GROUP, fresh, WIDTH) * 2, 0.5)
        before = lengths.held + fresh
        event = lengths.step(seen)
        for layer in layers:
            assert layer.slots.count.unique().tolist() == [lengths.held]
        assert lengths.held == (before if event is None else event.kept)
        assert lengths.dropped == seen - lengths.held


def test_every_policy_is_even_or_says_that_it_is_not() -> None:
    tried = {Recipe.parse(text).policy.name for text in (*EVEN, *UNEVEN)}
    second_pass = {name for name in POLICIES if name == "kvzip"}
    assert tried | second_pass == set(POLICIES)


@pytest.mark.parametrize(("text", "why"), UNEVEN.items())
def test_uneven_recipes_are_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        policies_of(Recipe.parse(text), 3)


def test_asking_twice_about_a_step_changes_nothing() -> None:
    lengths = Lengths(Recipe.parse("window@80"))
    assert lengths.step(100) == Event(80, 80)
    assert lengths.step(100) is None
    assert lengths.held == 80


def test_nothing_is_reported_but_what_was_asked_for() -> None:
    seen = nothing_seen(NOTHING, 3, 7)
    assert seen.columns is None
    assert seen.rows is None
    assert seen.queries is None
    asked = nothing_seen(Needs(columns="sum", last_rows=5, queries=True, keys=True), 3, 7)
    assert asked.columns is not None
    assert asked.rows is not None
    assert asked.columns.shape == (1, 1, 7)
    assert asked.rows.all().shape == (1, 1, 3, 7)
