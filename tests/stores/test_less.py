"""LESS: victims are folded once and dropped, and the state answers beside the tokens kept."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvhive.cache.footprint import Workload, footprint
from kvhive.cache.hive_cache import HiveCache
from kvhive.calibration import Profile
from kvhive.kernels import low_rank_reference
from kvhive.kernels.low_rank import FeatureMaps
from kvhive.model.facts import facts_for
from kvhive.model.outline import Outline
from kvhive.recipe import Recipe
from kvhive.stores import LayerFacts
from kvhive.stores.less import _KNOWN, Less, LessStore, maps_of
from tests.contract.recipes import SHARES, SMALL
from tests.contract.test_life import tensors
from tests.contract.test_rows import move
from tests.stores.less_kernels import profile_of
from tests.support import (
    Feeder,
    divergence,
    kept_sets,
    left_padded,
    random_ids,
    read,
    stock_logits,
    tiny_llama,
)

KERNELS = profile_of()
PROMPT = 150


def served(recipe: str) -> Recipe | None:
    """The recipe with LESS's state, and positions as written; None where it does not go with it."""
    parsed = replace(Recipe.parse(recipe), positions="original")
    return None if parsed.policy.merges else replace(parsed, store=Less())


PLAIN = [one for one in (*SMALL, *SHARES) if served(one) is not None]
SOME = ("h2o@48", "streaming_llm(positions=original)@48", "h2o@48/ada", "snapkv(window=9)@48")


def feeder(
    recipe: str | Recipe, tapes: tuple[int, ...] = (0,), profile: Profile = KERNELS
) -> Feeder:
    """Of a layer with these kernels; a recipe's string gets +less."""
    told = f"{recipe}+less" if isinstance(recipe, str) else recipe
    return Feeder(told, tapes, profile=profile)


def store_of(fed: Feeder) -> LessStore:
    """The layer's store."""
    store = fed.layer.store
    assert isinstance(store, LessStore)
    return store


def held(fed: Feeder, row: int) -> list[list[int]]:
    """The positions each head of a row holds."""
    return [[p for p in head.tolist() if p >= 0] for head in fed.layer.slots.position[row]]


def check_state(fed: Feeder) -> None:
    """Card, test 2: the state is the sum over all tokens that went, one at a time, in float64."""
    store, maps = store_of(fed), maps_of(KERNELS, 0, torch.device("cpu"))
    features = maps.of_keys(fed.keys).double()
    assert store.state is not None
    for row, seen in enumerate(fed.seen):
        for head, kept in enumerate(held(fed, row)):
            values, total = torch.zeros(8, 8).double(), torch.zeros(8).double()
            for gone in sorted(set(range(seen)) - set(kept)):
                feature = features[row, head, gone]
                values += torch.outer(feature, fed.values[row, head, gone].double())
                total += feature
            assert torch.allclose(
                store.state.values[row, head].double(), values, rtol=1e-4, atol=1e-3
            )
            assert torch.allclose(
                store.state.total[row, head].double(), total, rtol=1e-4, atol=1e-4
            )


def expected(fed: Feeder, before: list[list[list[int]]], tokens: list[int]) -> list[Tensor]:
    """Of each row `[H, tokens, e]`: the form by pairs, from what each head held `before` the step
    and the step's own tokens, all others folded. `fed.seen` counts the step.
    """
    maps, outs = maps_of(KERNELS, 0, torch.device("cpu")), []
    for row, (seen, count) in enumerate(zip(fed.seen, tokens, strict=True)):
        exact = torch.zeros(1, 2, count, seen, dtype=torch.bool)
        for head, kept in enumerate(before[row]):
            exact[0, head, :, kept] = True
        exact[..., seen - count :] = torch.ones(count, count, dtype=torch.bool).tril()
        causal = torch.ones(count, seen, dtype=torch.bool).tril(seen - count)
        exact = exact.repeat_interleave(2, 1)
        query = fed.queries[row : row + 1, :, seen - count : seen]
        pair = (held[row : row + 1, :, :seen] for held in (fed.keys, fed.values))
        outs.append(
            low_rank_reference.attend(query, *pair, maps, exact, causal & ~exact, fed.width**-0.5)[
                0
            ]
        )
    return outs


@pytest.mark.parametrize("recipe", [*SOME, "h2o(recent=5)@21", "h2o@48/global"])
def test_every_step_is_the_form_by_pairs(recipe: str) -> None:
    """Card, tests 2 and 6, in a padded batch of odd lengths, with turns of several tokens."""
    fed = feeder(recipe, (0, 1, 2))
    for turn, step in enumerate([[PROMPT, 71, 9], *[[1] * 3] * 25, [3, 20, 67], *[[1] * 3] * 10]):
        before = [held(fed, row) if turn else [[], []] for row in range(3)]
        out = fed.step(step)
        for row, alone in enumerate(expected(fed, before, step)):
            assert torch.allclose(out[row, :, -step[row] :], alone, atol=1e-3)
            padded = out[row, :, : out.shape[2] - step[row]]
            assert not padded.any(), "padded queries give zeros"
        if turn % 7 == 0:
            check_state(fed)
    check_state(fed)
    fed.check()
    state = store_of(fed).state
    assert state is not None
    assert float(state.total.max()) > 1


@pytest.mark.parametrize("recipe", PLAIN)
def test_policies_decide_as_they_do_without_the_state(recipe: str) -> None:
    """They see the tokens kept alone, so whatever holds of what they keep holds here."""
    ours = served(recipe)
    assert ours is not None
    fed, plain = feeder(ours), Feeder(replace(ours, store=Recipe.parse("full").store))
    for tokens in (PROMPT, *[1] * 60, 40, *[1] * 9):
        out, other = fed.step(tokens), plain.step(tokens)
        assert held(fed, 0) == held(plain, 0)
        assert out.shape == other.shape
    fed.check()
    assert store_of(fed).nbytes == plain.layer.store.nbytes + 2 * 8 * (8 + 1) * 4


@pytest.mark.parametrize("recipe", SOME)
def test_silent_kernels_leave_the_policy_alone(recipe: str) -> None:
    """Card, test 3."""
    fed, plain = feeder(recipe, (0, 1), profile_of(gain=0.0)), Feeder(recipe, (0, 1))
    for tokens in ([PROMPT, 80], *[[1, 1]] * 40, [5, 3], [1, 1]):
        assert torch.allclose(fed.step(tokens), plain.step(tokens), atol=1e-6)


@pytest.mark.parametrize("lengths", [(60,), (60, 33)])
def test_within_the_budget_nothing_is_folded(lengths: tuple[int, ...]) -> None:
    """Card, test 4: bit by bit the full cache's, and a state of zeros."""
    tapes = tuple(range(len(lengths)))
    fed, full = feeder("h2o@100", tapes), Feeder("full", tapes)
    plain = Feeder("h2o@100", tapes)
    for tokens in (list(lengths), *[[1] * len(lengths)] * 20, [7] * len(lengths)):
        out = fed.step(tokens)
        assert torch.equal(out, plain.step(tokens))
        assert torch.allclose(out, full.step(tokens), atol=1e-5)
    state = store_of(fed).state
    assert state is not None
    assert not state.values.any()
    assert not state.total.any()


@pytest.mark.parametrize("recipe", SOME)
def test_rows_are_moved_with_their_state(recipe: str) -> None:
    fed, twin = feeder(recipe, (0, 1, 2)), feeder(recipe, (2,))
    fed.step([90, 30, 71])
    twin.step(71)
    for _ in range(30):
        fed.step(1)
        twin.step(1)
    move(fed, [2, 0, 0, 1])
    check_state(fed)
    for _ in range(20):
        assert torch.allclose(fed.step(1)[0], twin.step(1)[0], atol=1e-4)
    check_state(fed)


def test_a_prompt_in_chunks_reads_the_state_of_those_before() -> None:
    fed = feeder("h2o@48")
    for chunk in (100, 33, 64):
        before = [held(fed, 0) if fed.seen[0] else [[], []]]
        out = fed.step(chunk)
        assert torch.allclose(out[0], expected(fed, before, [chunk])[0], atol=1e-3)
    check_state(fed)


def test_tokens_can_be_taken_back_until_something_is_folded() -> None:
    fed = feeder("streaming_llm(positions=original)@48")
    fed.step(40)
    fed.step(3)
    fed.take_back(2)
    fed.step(PROMPT)
    check_state(fed)
    fed.step(4)
    with pytest.raises(ValueError, match="evicted"):
        fed.take_back(3)


@pytest.mark.parametrize("rows", [1, 2])
def test_bytes_are_all_there_are_but_the_kernels(rows: int) -> None:
    fed = feeder("h2o@48/ada", tuple(range(rows)))
    for tokens in ([PROMPT, 70][:rows], *[[1] * rows] * 15, [20, 3][:rows]):
        fed.step(tokens)
        theirs = {tensor.untyped_storage().data_ptr() for tensor in tensors(KERNELS, set())}
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors(fed.layer, set())
            if tensor.untyped_storage().data_ptr() not in theirs
        }
        assert fed.layer.nbytes + fed.layer.progress.nbytes == sum(storages.values())


def test_beyond_the_texts_of_the_training_the_state_is_left_out() -> None:
    fed, plain = feeder("h2o@48", profile=profile_of(reach=180)), Feeder("h2o@48")
    told = feeder("h2o@48")
    for one in (fed, plain, told):
        one.step(PROMPT)
    for _ in range(30):
        out = fed.step(1)
        assert torch.equal(out, told.step(1))
        assert not torch.allclose(out, plain.step(1), atol=1e-3)
    with pytest.warns(UserWarning, match="trained on texts of up to 180 tokens; from there on"):
        assert torch.allclose(fed.step(1), plain.step(1), atol=1e-5)
    assert torch.allclose(fed.step(1), plain.step(1), atol=1e-5)  # and says no more
    check_state(fed)


# ---- models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(model: PreTrainedModel) -> Profile:
    """Of the tiny model."""
    return profile_of(model)


def test_a_row_of_a_padded_batch_is_as_it_is_alone(
    model: PreTrainedModel, kernels: Profile
) -> None:
    texts = [random_ids(length + 20, seed=length) for length in (130, 101, 73)]
    ids, mask = left_padded([text[:-20] for text in texts])
    tails = torch.stack([text[-20:] for text in texts])
    for recipe in ("h2o@40+less", "h2o@0.6/ada+less"):
        batch = HiveCache.for_model(model, recipe, kernels)
        together = read(model, batch, torch.cat([ids, tails], 1), 130, mask)
        for row, text in enumerate(texts):
            alone = HiveCache.for_model(model, recipe, kernels)
            single = read(model, alone, text[None], len(text) - 20)
            assert kept_sets(batch, row) == kept_sets(alone)
            assert divergence(together[row, 150 - len(text) :], single[0]) < 1e-5


def test_a_budget_for_everything_is_the_full_cache(
    model: PreTrainedModel, stock: PreTrainedModel, kernels: Profile
) -> None:
    ids = random_ids(2, 90)
    logits = read(model, HiveCache.for_model(model, "h2o@1000+less", kernels), ids, 70)
    assert divergence(logits.flatten(0, 1), stock_logits(stock, ids, 70).flatten(0, 1)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_is_float32_whatever_the_model(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype)
    cache = HiveCache.for_model(model, "h2o@40+less", profile_of(model))
    logits = read(model, cache, random_ids(1, 120), 100)
    assert logits.dtype == dtype
    assert not logits.isnan().any()
    for layer in cache.hive_layers():
        assert isinstance(layer.store, LessStore)
        assert layer.store.state is not None
        assert layer.store.state.values.dtype == torch.float32


def test_forks_and_pickles_go_on_alike(model: PreTrainedModel, kernels: Profile) -> None:
    ids = random_ids(1, 120)
    cache = HiveCache.for_model(model, "h2o@40+less", kernels)
    read(model, cache, ids[:, :100], 100)
    others = [cache.fork(), pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)]
    read(model, cache.fork(), random_ids(1, 30, seed=3), 20)
    logits = read(model, cache, ids[:, 100:], 1)
    for other in others:
        assert torch.equal(read(model, other, ids[:, 100:], 1), logits)
        assert other.nbytes == cache.nbytes
    cache.reset()
    assert cache.nbytes == 0
    again = HiveCache.for_model(model, "h2o@40+less", kernels)
    assert torch.equal(read(model, cache, ids, 100), read(model, again, ids, 100))


def test_generation_with_beams_and_drafts(model: PreTrainedModel, kernels: Profile) -> None:
    ids = random_ids(1, 20).repeat(1, 4)
    told = {"max_new_tokens": 12, "do_sample": False}
    plain = HiveCache.for_model(model, "h2o@40+less", kernels)
    drafted = HiveCache.for_model(model, "h2o@40+less", kernels)
    ours = model.generate(ids, past_key_values=plain, **told)
    theirs = model.generate(ids, past_key_values=drafted, prompt_lookup_num_tokens=3, **told)
    assert torch.equal(ours, theirs)
    assert kept_sets(plain) == kept_sets(drafted)
    beams = HiveCache.for_model(model, "h2o@40+less", kernels)
    assert model.generate(ids, past_key_values=beams, num_beams=3, **told).shape == (1, 92)
    assert beams.report().kept.max() <= 40


def test_a_frozen_cache_folds_nothing(model: PreTrainedModel, kernels: Profile) -> None:
    cache = HiveCache.for_model(model, "h2o@40+less", kernels)
    read(model, cache, random_ids(1, 100), 100)
    states = [layer.store.state for layer in cache.hive_layers()]  # type: ignore[attr-defined]
    before = [state.total.clone() for state in states]
    with cache.freeze():
        read(model, cache, random_ids(1, 30, seed=4), 10)
    assert all(map(torch.equal, before, [state.total for state in states]))


def test_kernels_are_held_once_a_model(model: PreTrainedModel) -> None:
    profile = profile_of(model)
    caches = [HiveCache.for_model(model, "h2o@40+less", profile) for _ in range(2)]
    for cache in (*caches, caches[0].fork()):
        read(model, cache, random_ids(1, 60), 50)
    maps = maps_of(profile, 1, torch.device("cpu"))
    assert isinstance(maps, FeatureMaps)
    assert maps_of(profile, 1, torch.device("cpu")) is maps
    assert len(_KNOWN[profile]) == 2
    count = len(_KNOWN)
    del profile, caches, cache, maps
    gc.collect()
    assert len(_KNOWN) < count


def test_the_size_is_known_in_advance(model: PreTrainedModel, kernels: Profile) -> None:
    recipe = Recipe.parse("h2o@40+less")
    outline = Outline.of(model, facts_for(model).rotations or ())
    cache = HiveCache.for_model(model, recipe, kernels)
    read(model, cache, random_ids(1, 320), 300)
    bound = footprint(recipe, outline, Workload(tokens=320, turn=1), kernels).between_steps
    plain = footprint(Recipe.parse("h2o@40"), outline, Workload(tokens=320, turn=1)).between_steps
    assert cache.nbytes <= bound == plain + 2 * 2 * 8 * (8 + 1) * 4
    fitted = HiveCache.for_model(model, "h2o+less", kernels, fits="64KiB", tokens=300, turn=1)
    read(model, fitted, random_ids(1, 300), 300)
    assert fitted.nbytes <= 64 * 1024


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "streaming_llm@40+less",
            r"streaming_llm counts positions in the cache, so keys are turned, and less cannot "
            r"replace single keys; write streaming_llm\(positions=original\)",
        ),
        ("h2o(positions=cache)@40+less", r"write h2o\(positions=original\)"),
        ("elastic@40+less", "elastic folds keys into others, and less cannot replace single keys"),
        ("h2o@40+less(rank=0)", "less: rank must be at least 1, got 0"),
    ],
)
def test_recipes_that_cannot_work(recipe: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.parse(recipe)


def test_a_profile_must_fit(model: PreTrainedModel, kernels: Profile, tmp_path: Path) -> None:
    other = profile_of(tiny_llama(1))
    with pytest.raises(ValueError, match="was made for a model with other weights"):
        HiveCache.for_model(model, "h2o@40+less", other)
    other.save(tmp_path / "p")
    with pytest.raises(ValueError, match="was made for a model with other weights"):
        HiveCache.for_model(model, f"h2o@40+less(profile='{tmp_path / 'p'}')")
    with pytest.raises(
        ValueError, match="rank must be that of its kernels, 8, got 4; write rank=8"
    ):
        HiveCache.for_model(model, "h2o@40+less(rank=4)", kernels)
    with pytest.raises(ValueError, match="none of this model comes with kvhive"):
        HiveCache.for_model(model, "h2o@40+less")
    with pytest.raises(ValueError, match="baklava and less read a profile each"):
        Recipe.parse("h2o@40/baklava+less")
    fewer = {name: tensor[:1] for name, tensor in kernels.tensors.items()}
    with pytest.raises(ValueError, match="of 1 layers with 2 KV heads, not of 2 with 2"):
        HiveCache.for_model(model, "h2o@40+less", replace(kernels, tensors=fewer))
    bare = {name: kernels.tensors[name] for name in FeatureMaps.names()}
    with pytest.raises(ValueError, match="'curve'"):
        HiveCache.for_model(model, "h2o@40+less", replace(kernels, tensors=bare))


def test_a_named_file_is_read(model: PreTrainedModel, kernels: Profile, tmp_path: Path) -> None:
    kernels.save(tmp_path / "p")
    ids = random_ids(1, 90)
    named = HiveCache.for_model(model, f"h2o@40+less(profile='{tmp_path / 'p'}')")
    given = HiveCache.for_model(model, "h2o@40+less", kernels)
    assert torch.equal(read(model, named, ids, 70), read(model, given, ids, 70))
    assert str(named.recipe) == f"h2o@40+less(profile='{tmp_path / 'p'}')"


def test_without_kernels_it_holds_until_something_goes() -> None:
    fed = Feeder("h2o@48+less")
    fed.step(40)
    with pytest.raises(ValueError, match="less needs trained kernels to evict"):
        fed.step(40)
    assert Less().new(LayerFacts(), []).nbytes == 0


def test_other_caches_are_untouched(model: PreTrainedModel, kernels: Profile) -> None:
    ids = random_ids(1, 60)
    before = read(model, DynamicCache(config=model.config), ids, 50)
    read(model, HiveCache.for_model(model, "h2o@40+less", kernels), ids, 50)
    assert torch.equal(read(model, DynamicCache(config=model.config), ids, 50), before)
