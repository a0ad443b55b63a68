"""In float32 the tokens are those of `HiveCache`, request by request."""

from __future__ import annotations

import pytest

from tests.models import Tiny, free_blocks, generated, greedy, prompts

RECIPES = (
    "buzz(positions=original)@80",
    "buzz(variant=fast)@80",
    "buzz(variant=no_max)@0.4",
    "buzz@0.4",
    "buzz_log(cells=3, window=8)",
    "cascading@80",
    "elastic(merge=false)@80",
    "expected_attention@80",
    "full",
    "h2o(positions=cache)@80",
    "h2o@0.4",
    "h2o@80",
    "hive(reconstruct=false)@80/uniform",
    "keydiff@80",
    "l2norm@80",
    "random@80",
    "scissorhands@80",
    "snapkv(decode=none)@80",
    "snapkv@80",
    "streaming_llm(positions=original)@80",
    "streaming_llm@80",
    "tova@80",
    "window@80",
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens_are_those_of_a_hive_cache(tiny: Tiny, recipe: str) -> None:
    """Three prompts in one batch, more than ten evictions each."""
    texts, new = prompts(150, 211, 97), 60
    with tiny.engine(recipe) as llm:
        given = generated(llm, texts, greedy(new))
        free, total = free_blocks(llm)
    assert given == [tiny.expected(recipe, text, new) for text in texts]
    assert free == total
