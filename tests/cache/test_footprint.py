"""What a cache will hold, against what it holds: every policy, shapes, dtypes, chunks and turns."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from kvhive.cache.footprint import Workload, footprint
from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.layer import HiveLayer
from kvhive.model.outline import Outline
from kvhive.recipe import Recipe
from kvhive.step import Step
from tests.contract.recipes import with_budget
from tests.support import tiny

BUDGET = 130
GIVEN = [recipe for recipe in with_budget(BUDGET) if "@" in recipe]
# Headroom and padding of heads that compete; keys held twice; a policy that does not evict while
# decoding; statistics of a prompt that decoding forgets: here the prediction is a bound.
LOOSE = (
    *("kv_compress", "buzz", "cascading", "snapkv(decode=none)", "expected_attention"),
    *("hive", "kvzip"),
    "scissorhands@",  # drops half at once, and takes the room for its budget again bit by bit
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


def most_held(cache: HiveCache, model: PreTrainedModel, batch: int, steps: Sequence[int]) -> int:
    """The most bytes the cache holds after any of the steps; positions are written down."""
    source, most = torch.Generator().manual_seed(0), 0
    with torch.no_grad():
        for tokens in steps:
            ids = torch.randint(3, 490, (batch, tokens), generator=source)
            model(ids, past_key_values=cache)
            most = max(most, cache.nbytes, cache.report().nbytes)
    cache.positions_kept()
    return max(most, cache.nbytes)


def predicted(cache: HiveCache, model: PreTrainedModel, work: Workload) -> int:
    outline = Outline.of(model, cache.facts.rotations or ())
    return footprint(cache.recipe, outline, work).between_steps


@pytest.mark.parametrize("recipe", GIVEN)
def test_every_policy_holds_what_was_predicted(model: PreTrainedModel, recipe: str) -> None:
    cache, steps = HiveCache.for_model(model, recipe), [200, *[1] * 80]
    most = most_held(cache, model, 2, steps)
    told = predicted(cache, model, Workload(batch=2, tokens=sum(steps), turn=1))
    assert most <= told
    if not (recipe.startswith(LOOSE) or "/" in recipe):
        assert told <= 1.01 * most
    elif not recipe.startswith(("kv_compress", "snapkv(decode=none)", "kvzip")):
        assert told <= 1.6 * most


SHAPES = {
    "many heads to one, wide values": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "a head of its own for each": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "wide heads": {"head_dim": 32},
}


@pytest.mark.parametrize("recipe", ["h2o@70", "scissorhands@70", "snapkv(group_reduce=max)@70"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(shape: str, dtype: torch.dtype, recipe: str) -> None:
    model = tiny("llama", **SHAPES[shape]).to(dtype)
    cache = HiveCache.for_model(model, recipe)
    most = most_held(cache, model, 3, [100, *[1] * 49])
    told = predicted(cache, model, Workload(batch=3, tokens=149, turn=1))
    assert most <= told <= 1.01 * most + 2**10


@pytest.mark.parametrize("recipe", ["h2o@100", "streaming_llm@100", "buzz@100", "full", "h2o@0.4"])
@pytest.mark.parametrize("steps", [[200, 30, 1, 50, 1], [60] * 5 + [1] * 5, [10, 20, 60, 128, 1]])
def test_chunks_and_turns(model: PreTrainedModel, recipe: str, steps: list[int]) -> None:
    cache = HiveCache.for_model(model, recipe)
    most = most_held(cache, model, 1, steps)
    assert most <= predicted(cache, model, Workload(tokens=sum(steps)))


def test_hundreds_of_decoded_tokens(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "h2o@300")
    most = most_held(cache, model, 1, [90, *[1] * 500])
    assert most <= predicted(cache, model, Workload(turn=1)) <= 1.01 * most + 2**11


def test_rows_of_different_length(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "tova@60")
    mask = torch.ones(3, 150, dtype=torch.int64)
    mask[0, :100] = mask[1, :30] = 0
    with torch.no_grad():
        model(torch.full((3, 150), 7), attention_mask=mask, past_key_values=cache)
    cache.positions_kept()
    told = predicted(cache, model, Workload(batch=3, turn=1))
    assert cache.nbytes <= told <= 1.05 * cache.nbytes


@pytest.mark.parametrize("steps", [[90, *[1] * 30], [20] * 6, [7, 1, 1]])
def test_layers_that_stay_stock_are_counted(steps: list[int]) -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = tiny("qwen2", layer_types=kinds, sliding_window=24, use_sliding_window=True)
    cache = HiveCache.for_model(model, "h2o@50")
    most = most_held(cache, model, 2, steps)
    chunk = None if steps[0] == 90 else steps[0]
    work = Workload(batch=2, tokens=sum(steps), chunk=chunk, turn=1)
    assert most <= predicted(cache, model, work) <= 1.35 * most
    outline = Outline.of(model, cache.facts.rotations or ())
    assert footprint(cache.recipe, outline, work).stock >= 2 * 2 * 8 * 4 * min(23, sum(steps))
    with pytest.raises(ValueError, match=r"depends on the number of tokens .* give tokens="):
        footprint(cache.recipe, outline, Workload(batch=2))


@pytest.mark.parametrize("recipe", ["h2o@60", "kv_compress@64", "full", "buzz@60"])
def test_while_reading(
    model: PreTrainedModel, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held when a layer has taken a prompt in and has evicted nothing yet."""
    cache, held = HiveCache.for_model(model, recipe), [0]
    append = HiveLayer._append

    def appended(layer: HiveLayer, keys: torch.Tensor, values: torch.Tensor, step: Step) -> None:
        append(layer, keys, values, step)
        held.append(cache.nbytes)

    monkeypatch.setattr(HiveLayer, "_append", appended)
    most_held(cache, model, 2, [300, 1])
    outline = Outline.of(model, cache.facts.rotations or ())
    told = footprint(cache.recipe, outline, Workload(batch=2, tokens=301, turn=1)).while_reading
    assert told is not None
    assert max(held) <= told


def test_positions_are_wider_in_long_texts(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "window(positions=original)@100")
    short, long = (predicted(cache, model, Workload(tokens=n, turn=1)) for n in (30_000, 40_000))
    assert long - short == 2 * 2 * 101 * 2  # layers, KV heads, slots, bytes
    assert predicted(cache, model, Workload(turn=1)) == long


@pytest.mark.parametrize("recipe", ["full", "h2o@0.4", "corm", "snapkv(decode=none)@100"])
def test_some_recipes_need_the_number_of_tokens(model: PreTrainedModel, recipe: str) -> None:
    outline = Outline.of(model, ())
    with pytest.raises(ValueError, match="give tokens="):
        footprint(Recipe.parse(recipe), outline, Workload())


@pytest.mark.parametrize("name", ["batch", "tokens", "chunk", "turn"])
def test_a_workload_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Workload(**{name: 0})
