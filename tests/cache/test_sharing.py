"""Layers that attend to what another holds, against attention worked out in the obvious way."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvhive.cache.footprint import Workload, footprint
from kvhive.cache.handoff import offer
from kvhive.cache.hive_cache import HiveCache, make_layers
from kvhive.cache.sharing import SharedLayer, all_layers, closing, holders
from kvhive.inference.driver import Driver
from kvhive.learning.kvsharer import SharingCache
from kvhive.model.facts import facts_for
from kvhive.model.outline import Outline
from kvhive.recipe import Recipe
from kvhive.rope import Rotation
from kvhive.stores.kvsharer import shared
from tests.contract.recipes import SMALL
from tests.stores.sharing_maps import profile_of, random_pairs
from tests.support import divergence, kept_sets, left_padded, random_ids, read, tiny

LAYERS = 5
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gpt_neox": {},
    "mistral": {"sliding_window": None, "num_key_value_heads": 1},
    "olmo2": {},
}
UNTURNED = [recipe for recipe in SMALL if "cascading" not in recipe]


def model_of(family: str = "llama") -> PreTrainedModel:
    """A tiny one of several layers."""
    return tiny(family, "sdpa", **{"num_hidden_layers": LAYERS} | FAMILIES[family])


@pytest.fixture(scope="module")
def deep() -> PreTrainedModel:
    """A tiny Llama of five layers."""
    return model_of()


def sharing(recipe: str | Recipe, layers: int) -> Recipe:
    """The recipe, with so many layers that share."""
    return Recipe.parse(f"{recipe}+kvsharer(layers={layers})")


def caches(model: PreTrainedModel, recipe: str, pairs: Sequence[tuple[int, int]]) -> HiveCache:
    """A cache of the recipe in which layers share by these pairs."""
    return HiveCache.for_model(model, sharing(recipe, len(pairs)), profile_of(model, pairs))


# ---- the obvious way ----------------------------------------------------------------------------


class Obvious(DynamicCache):
    """Holds every token of the layers that hold any; attention is masked to what a cache of ours
    held before the step, and the step's own tokens. Layers that share are given the tokens and the
    mask of their source.
    """

    sources: Sequence[int]
    held: list[Tensor]  # of each layer, positions [b, K, n] held before the step
    pads: Tensor  # int64 [b], padding on the left

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        source, fresh = self.sources[layer_idx], key_states.shape[2]
        if source == layer_idx:
            super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[source]
        n = layer.keys.shape[2]
        seen = torch.zeros(*layer.keys.shape[:2], n + 1, dtype=torch.bool)  # one for what is empty
        position = self.held[source].long()
        place = torch.where(position < 0, n, position + self.pads[:, None, None])
        seen.scatter_(2, place, True)
        visible = seen[..., None, :n].repeat(1, 1, fresh, 1)
        visible[..., n - fresh :] = torch.ones(fresh, fresh, dtype=torch.bool).tril()
        visible &= torch.arange(n) >= self.pads[:, None, None, None]
        return offer(key_states, Masked(layer.keys, layer.values, visible)), value_states


@dataclass(frozen=True, eq=False)
class Masked:
    """Softmax over what is visible."""

    keys: Tensor
    values: Tensor
    visible: Tensor

    def check_model(self, config: object) -> None:
        """There is but one."""

    def attend(self, query: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        group = query.shape[1] // self.keys.shape[1]
        keys, values, visible = (
            part.repeat_interleave(group, 1) for part in (self.keys, self.values, self.visible)
        )
        logits = (scale * query @ keys.transpose(2, 3)).masked_fill(~visible, -torch.inf)
        return logits.softmax(-1).nan_to_num() @ values


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    cache: HiveCache,
    sources: Sequence[int],
    steps: Sequence[int],
    rows: Sequence[Tensor],
) -> None:
    """Feed rows (the first step pads them on the left), and compare logits after every step."""
    ids, mask = left_padded(rows)
    obvious = Obvious(config=model.config)
    obvious.sources = sources
    obvious.pads = (mask == 0).sum(1)
    start = 0
    for step in steps:
        stop = start + step
        empty = [torch.empty(len(rows), 1, 0, dtype=torch.int32)] * len(sources)
        obvious.held = cache.positions_kept() if start else empty
        if not start:
            kv_heads = getattr(model.config, "num_key_value_heads", None)
            heads = kv_heads or model.config.num_attention_heads
            obvious.held = [torch.empty(len(rows), heads, 0, dtype=torch.int32)] * len(sources)
        seen = mask[:, :stop]
        position = (seen.cumsum(1) - 1).clamp_min(0)[:, start:]
        given = {"input_ids": ids[:, start:stop], "position_ids": position, "attention_mask": seen}
        ours = model(**given, past_key_values=cache).logits
        theirs = model(**given, past_key_values=obvious).logits
        real = seen[:, start:].bool()
        assert divergence(ours[real], theirs[real]) < 1e-5
        start = stop


ROWS = ("full", "h2o@0.4", "streaming_llm@48", "tova@48", "corm@48", "hive@48", "snapkv@48/ada")
STEPS = (90, *[1] * 14, 9, *[1] * 10)


@pytest.mark.parametrize("recipe", UNTURNED)
def test_every_policy_decides_for_those_that_share(deep: PreTrainedModel, recipe: str) -> None:
    pairs = random_pairs(LAYERS, 2, seed=len(recipe))
    parsed = Recipe.parse(recipe)
    if parsed.policy.position_rule == "cache":
        recipe = f"{parsed.policy.name}(positions=original){recipe[recipe.find('@') :]}"
    cache = caches(deep, recipe, pairs)
    texts = [random_ids(sum(STEPS), seed=1)]
    if not Recipe.parse(recipe).policy.merges:
        compare(deep, cache, shared(LAYERS, pairs), STEPS, texts)
    else:
        read(deep, cache, texts[0][None], STEPS[0])
    held = kept_sets(cache)
    sources = shared(LAYERS, pairs)
    assert all(held[place] == held[source] for place, source in enumerate(sources))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["h2o@40", "tova@30/pyramid", "h2o@40/global"])
def test_random_maps_of_any_family(family: str, recipe: str) -> None:
    model, seed = model_of(family), len(family + recipe)
    pairs = random_pairs(LAYERS, 1 + seed % 3, seed)
    rows = [random_ids(sum(STEPS), seed=seed), random_ids(sum(STEPS) - 31, seed=9)]
    compare(model, caches(model, recipe, pairs), shared(LAYERS, pairs), STEPS, rows)


@pytest.mark.parametrize("steps", [(1,) * 60, (50, 10, 1, 1, 20, 1), (3, 7, 40, 2, 1, 1, 1)])
def test_any_steps(deep: PreTrainedModel, steps: tuple[int, ...]) -> None:
    for recipe, pairs in (("h2o@20", [(4, 0)]), ("streaming_llm(positions=original)@20", [(4, 3)])):
        rows = [random_ids(sum(steps), seed=2), random_ids(sum(steps), seed=3)]
        compare(deep, caches(deep, recipe, pairs), shared(LAYERS, pairs), steps, rows)


# ---- the full cache -----------------------------------------------------------------------------


def by_recomputation(
    model: PreTrainedModel, pairs: Sequence[tuple[int, int]], ids: Tensor, prompt: int
) -> Tensor:
    """Logits with the stock cache, whose keys and values are given to those that share."""
    cache = SharingCache(config=model.config)
    cache.sources = dict(enumerate(shared(LAYERS, pairs)))
    return read(model, cache, ids, prompt)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_recomputation_gives_the_same(family: str, count: int) -> None:
    model, ids = model_of(family), random_ids(2, 60)
    pairs = random_pairs(LAYERS, count, seed=count)
    cache = caches(model, "full", pairs)
    ours = read(model, cache, ids, 40)
    assert torch.allclose(ours, by_recomputation(model, pairs, ids, 40), atol=2e-4)
    assert cache.report().kept.unique().tolist() == [60], "all that hold any hold all tokens"
    whole = HiveCache.for_model(model, "full")
    read(model, whole, ids, 40)
    assert cache.report().kept.shape[0] == cache.report().layers.__len__() == LAYERS - count
    held, full = (sum(layer.nbytes for layer in each.hive_layers()) for each in (cache, whole))
    assert held * LAYERS == full * (LAYERS - count)
    assert cache.report().full_nbytes == whole.report().full_nbytes


def test_nobody_shares_is_the_plain_model(deep: PreTrainedModel) -> None:
    ids = random_ids(1, 50)
    plain = read(deep, DynamicCache(config=deep.config), ids, 40)
    identity = HiveCache.for_model(deep, "full+kvsharer(layers=0)", profile_of(deep, [(2, 1)]))
    full = HiveCache.for_model(deep, "full")
    ours = read(deep, identity, ids, 40)
    assert torch.equal(ours, read(deep, full, ids, 40))
    assert divergence(ours, plain) < 1e-9


@pytest.mark.parametrize("recipe", ["full", "h2o@24", "streaming_llm@24"])
def test_chunks_rows_and_beams(deep: PreTrainedModel, recipe: str) -> None:
    pairs = [(4, 1), (2, 0)]
    ids = random_ids(2, 70)
    if recipe == "full":
        whole = read(deep, caches(deep, recipe, pairs), ids, 70)
        for chunk in (1, 7, 32):
            parts = read(deep, caches(deep, recipe, pairs), ids, 70, chunk=chunk)
            assert divergence(parts, whole) < 1e-5
    cache = caches(deep, recipe, pairs)
    out = deep.generate(ids, past_key_values=cache, max_new_tokens=12, num_beams=3, do_sample=False)
    singly = [
        deep.generate(
            row[None],
            past_key_values=caches(deep, recipe, pairs),
            max_new_tokens=12,
            num_beams=3,
            do_sample=False,
        )
        for row in ids
    ]
    assert torch.equal(out, torch.cat(singly))
    assert cache.report().kept.shape[:2] == (3, 6)


def test_beams_are_those_of_recomputation(deep: PreTrainedModel) -> None:
    pairs = [(3, 1), (4, 0)]
    settings = {"max_new_tokens": 20, "num_beams": 4, "do_sample": False}
    ids = random_ids(1, 50)
    stock = SharingCache(config=deep.config)
    stock.sources = dict(enumerate(shared(LAYERS, pairs)))
    theirs = deep.generate(ids, past_key_values=stock, **settings)
    ours = deep.generate(ids, past_key_values=caches(deep, "full", pairs), **settings)
    assert torch.equal(ours, theirs)


# ---- the life of a cache ------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["full", "h2o@24", "tova@30", "h2o@30/global"])
def test_drafts_forks_pickles_and_freezing(deep: PreTrainedModel, recipe: str) -> None:
    pairs = [(4, 0), (2, 1)]
    ids = random_ids(1, 60)
    cache = caches(deep, recipe, pairs)
    before = read(deep, cache, ids[:, :50], 40)
    assert before.isfinite().all()
    twins = [cache.fork(), pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)]
    rest = read(deep, cache, ids[:, 50:], 4)
    for twin in twins:
        assert torch.equal(read(deep, twin, ids[:, 50:], 4), rest)
        assert kept_sets(twin) == kept_sets(cache)
    held = kept_sets(cache)
    with cache.freeze():
        read(deep, cache, random_ids(1, 12, seed=4), 12)
        added = list(range(60, 72))
        assert kept_sets(cache) == [[head + added for head in layer] for layer in held]
    cache.reset()
    assert cache.nbytes == 0
    assert torch.equal(read(deep, cache, ids[:, :50], 40), before)


@pytest.mark.parametrize("recipe", ["full", "h2o@4096", "streaming_llm(positions=original)@24"])
def test_drafted_tokens_are_taken_back(deep: PreTrainedModel, recipe: str) -> None:
    """As if only those accepted had been decoded."""
    pairs, ids = [(4, 2), (3, 0)], random_ids(1, 50)
    drafting, plain = (caches(deep, recipe, pairs) for _ in range(2))
    for layer in drafting.layers:
        layer.activate_past_recording()
    for cache in (drafting, plain):
        read(deep, cache, ids[:, :40], 40)
    drafting.crop(0)
    for start in (40, 43, 46):
        wrong = random_ids(1, 2, seed=start)
        drafted = torch.cat([ids[:, start : start + 3], wrong], 1)
        ours = read(deep, drafting, drafted, 5)[:, :3]
        drafting.crop(-2)
        theirs = read(deep, plain, ids[:, start : start + 3], 1)
        assert kept_sets(drafting) == kept_sets(plain)
        if recipe != "streaming_llm(positions=original)@24":  # where drafts lose nothing meanwhile
            assert torch.allclose(ours, theirs, atol=1e-4)
    for ours, theirs in zip(drafting.hive_layers(), plain.hive_layers(), strict=True):
        for name in ours.policy.columns:
            assert torch.allclose(ours.slots[name], theirs.slots[name], atol=1e-4)
    drafting.end_recording()


def test_prompt_lookup_generates_the_same(deep: PreTrainedModel) -> None:
    pairs, ids = [(4, 2), (3, 0)], random_ids(1, 30).repeat(1, 3)
    out = [
        deep.generate(
            ids,
            past_key_values=caches(deep, "full", pairs),
            max_new_tokens=30,
            do_sample=False,
            **more,
        )
        for more in ({}, {"prompt_lookup_num_tokens": 4})
    ]
    assert torch.equal(*out)


@pytest.mark.parametrize("recipe", ["h2o@24", "hive(chunk=16)@48", "full"])
def test_caches_step_together_and_read_twice(deep: PreTrainedModel, recipe: str) -> None:
    """In a batch with other caches, and with a second pass over the prompt."""
    pairs, ids = [(4, 2), (1, 0)], random_ids(1, 60)
    alone, beside, other = (
        caches(deep, recipe, pairs),
        caches(deep, recipe, pairs),
        HiveCache.for_model(deep, "h2o@30"),
    )
    driver = Driver(deep)
    for cache in (alone, beside, other):
        cache.read(ids[:, :50])
    for place in range(50, 60):
        token = ids[:, place : place + 1]
        single = driver.step(alone, token)
        both = driver.step_together([other, beside], [1, 1], token.repeat(2, 1))
        assert torch.allclose(both[1], single[0], atol=1e-4)
    assert kept_sets(alone) == kept_sets(beside)


@pytest.mark.parametrize(
    "recipe",
    [
        "streaming_llm(sink=2)@12",
        "h2o@24/global",
        "full+kvsharer(store='rotated(bits=4, residual=4)')",
        "h2o@24+kvsharer(store='rotated(bits=4, residual=4)')",
        "h2o@24/global+kvsharer(store='kivi(bits=4, group=8, residual=8)')",
        "snapkv(window=4)@24+kvsharer(store='tiers(residual=4)')",
    ],
)
def test_queries_read_what_the_source_holds(recipe: str) -> None:
    """As it stands: keys turned to positions in the cache, packed in few bits, not evicted yet."""
    parsed = Recipe.parse(recipe)
    turns = parsed.positions or parsed.policy.position_rule
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.1, 0.03])) if turns == "cache" else None
    own = make_layers(parsed, [rotation] * 3, sources=[0, 1, 0])
    source, _, reader = layers = all_layers(own, [0, 1, 0])
    assert isinstance(reader, SharedLayer)
    draw = torch.Generator().manual_seed(0)
    for fresh in (60, 1, 1, 1, 5, *[1] * 20):
        keys, values = (torch.randn(2, 2, fresh, 8, generator=draw) for _ in range(2))
        queries = torch.randn(2, 4, fresh, 8, generator=draw)
        for layer in layers:
            layer.update(keys, values)
            if layer is reader:
                held = [part.clone() for part in source.store.view()]
                valid = source.slots.valid
            out = layer.attend(queries, 0.3)
        assert out.shape == queries.shape
        parts = [part.repeat_interleave(2, 1) for part in (*held, valid[..., None])]
        n = held[0].shape[2]
        causal = torch.ones(fresh, n, dtype=torch.bool).tril(n - fresh)
        mask = causal & parts[2].transpose(2, 3)
        expected = F.scaled_dot_product_attention(queries, *parts[:2], attn_mask=mask, scale=0.3)
        assert torch.allclose(out, expected, atol=2e-3)
        assert not source.step
    limits = own[0].progress.limits
    assert limits.all is None or int(source.slots.count.sum()) < 2 * 2 * 60


def test_a_source_gives_nothing_up_before_the_last_has_read() -> None:
    own = make_layers(Recipe.parse("streaming_llm(sink=2)@12"), [None] * 4, sources=[0, 1, 0, 1])
    layers = all_layers(own, [0, 1, 0, 1])
    keys = torch.randn(1, 2, 30, 8)
    lengths = []
    for layer in layers:
        layer.update(keys, keys)
        layer.attend(torch.randn(1, 4, 30, 8), 0.3)
        lengths.append([one.slots.length for one in own])
    assert lengths == [[30, 0], [30, 30], [12, 30], [12, 12]]


def test_the_last_that_holds_any_ends_with_the_last_of_all() -> None:
    """There layers that compete are evicted from."""
    assert closing([0, 1, 2, 0]) == {0: 3, 1: 1, 2: 3}
    assert closing([0, 0, 2, 2, 4]) == {0: 1, 2: 3, 4: 4}
    assert holders([0, 0, 2, 2, 4]) == [0, 2, 4]


def test_a_step_that_failed_halfway_is_noticed(deep: PreTrainedModel) -> None:
    cache = caches(deep, "full", [(4, 3)])
    read(deep, cache, random_ids(1, 20), 20)
    hook = deep.model.layers[4].self_attn.q_proj.register_forward_hook(_fails)
    with pytest.raises(RuntimeError, match="broken"):
        read(deep, cache, random_ids(1, 1), 1)
    hook.remove()
    with pytest.raises(ValueError, match="or the last step failed halfway; make a new cache"):
        read(deep, cache, random_ids(1, 1), 1)
    cache.reset()
    assert read(deep, cache, random_ids(1, 20), 20).isfinite().all()


def _fails(*_: object) -> None:
    raise RuntimeError("broken")


def test_out_of_turn_and_twice_are_refused() -> None:
    own = make_layers(Recipe.parse("full"), [None] * 2, sources=[0, 0])
    source, reader = all_layers(own, [0, 0])
    keys, query = torch.randn(1, 2, 4, 8), torch.randn(1, 4, 4, 8)
    reader.update(keys, keys)
    with pytest.raises(ValueError, match="was given 4 out of turn: all layers take every step"):
        reader.attend(query, 1.0)
    source.update(keys, keys)
    source.attend(query, 1.0)
    reader.update(keys[..., :6], keys)
    with pytest.raises(ValueError, match=r"this cache holds .* but was given \(1, 2, 6\)"):
        reader.attend(query, 1.0)
    reader.update(keys[:, :, :3], keys[:, :, :3])
    with pytest.raises(ValueError, match="was given 3 out of turn: all layers take every step"):
        reader.attend(query, 1.0)
    assert reader.get_seq_length() == 0
    reader.update(keys, keys)
    assert reader.get_seq_length() == 4
    reader.attend(query, 1.0)
    assert reader.get_seq_length() == 4
    with pytest.raises(ValueError, match="attention came twice"):
        reader.attend(query, 1.0)


@pytest.mark.parametrize("recipe", ["full", "h2o@40", "h2o@40/global", "streaming_llm@40"])
def test_sizes_are_known_in_advance(deep: PreTrainedModel, recipe: str) -> None:
    pairs = [(4, 0), (3, 1)]
    cache = caches(deep, recipe, pairs)
    outline = Outline.of(deep, facts_for(deep).rotations or ())
    work, made = Workload(tokens=330, turn=1), profile_of(deep, pairs)
    bound = footprint(cache.recipe, outline, work, made)
    whole = footprint(Recipe.parse(recipe), outline, work)
    read(deep, cache, random_ids(1, 330), 300)
    assert 0.5 * bound.between_steps <= cache.nbytes <= bound.between_steps
    assert bound.between_steps <= 0.62 * whole.between_steps
    assert bound.while_reading is not None
    assert bound.while_reading > bound.between_steps


@pytest.mark.parametrize("recipe", ROWS)
def test_rows_of_a_padded_batch_are_as_alone(deep: PreTrainedModel, recipe: str) -> None:
    """As `tests/contract/test_rows.py`, with layers that share."""
    pairs, lengths = [(4, 1), (3, 0)], (90, 61)
    rows = [random_ids(length + 20, seed=length) for length in lengths]
    ids, mask = left_padded([row[:-20] for row in rows])
    batch = caches(deep, recipe, pairs)
    tails = torch.stack([row[-20:] for row in rows])
    together = read(deep, batch, torch.cat([ids, tails], 1), 90, mask)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = caches(deep, recipe, pairs)
        single = read(deep, alone, row[None], length)
        assert kept_sets(batch, place) == kept_sets(alone)
        assert divergence(together[place, 90 - length :], single[0]) < 1e-5


# ---- projections --------------------------------------------------------------------------------


class Counting:
    """Counts the tokens that the key projections of a model are given, layer by layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tokens = [0] * LAYERS
        for place, block in enumerate(model.model.layers):
            block.self_attn.k_proj.register_forward_hook(self._hook(place))

    def _hook(self, place: int) -> Any:
        def count(module: object, given: tuple[Tensor], out: Tensor) -> None:
            self.tokens[place] += given[0].shape[1]

        return count


def test_what_is_dropped_is_not_computed() -> None:
    model, pairs, ids = model_of(), [(4, 1), (2, 0)], random_ids(1, 30)
    names = list(model.state_dict())
    cache = caches(model, "full", pairs)
    assert list(model.state_dict()) == names
    counting = Counting(model)
    ours = read(model, cache, ids, 25)
    assert counting.tokens == [30, 30, 0, 30, 0]
    cache = caches(model, "full", pairs)
    cache._skipping = []  # its layers compute what they drop
    assert torch.equal(read(model, cache, ids, 25), ours)
    assert counting.tokens == [60, 60, 30, 60, 30]


def test_any_other_use_of_the_model_is_untouched() -> None:
    model, ids = model_of(), random_ids(1, 30)
    plain = model(ids).logits
    cache = caches(model, "full", [(4, 1), (2, 0)])
    counting = Counting(model)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(read(model, DynamicCache(config=model.config), ids, 30), plain)
    other = HiveCache.for_model(model, "full")
    assert torch.equal(read(model, other, ids, 30), plain)
    assert counting.tokens == [90] * LAYERS
    assert cache.holding == (0, 1, 3)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, plain)
    assert pickle.loads(pickle.dumps(cache._skipping)) is not None
    model(ids).logits.sum().backward()
    assert model.model.layers[4].self_attn.k_proj.weight.grad is not None


def test_hooks_go_with_the_last_cache() -> None:
    model = model_of()
    attention = model.model.layers[4].self_attn

    def hooks() -> int:
        parts = (attention, attention.k_proj, attention.v_proj)
        return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in parts)

    first, second = (caches(model, "full", [(4, 1)]) for _ in range(2))
    assert hooks() == 5, "both want the same"
    fork = first.fork()
    del first, second
    assert hooks() == 5
    del fork
    assert hooks() == 0


def test_threads_with_caches_of_both_kinds() -> None:
    model, ids = model_of(), random_ids(1, 40)
    kinds = {
        "shared": lambda: caches(model, "full", [(4, 1), (2, 0)]),
        "whole": lambda: HiveCache.for_model(model, "full"),
    }
    expected = {name: read(model, make(), ids, 10) for name, make in kinds.items()}
    wrong = []

    def work(name: str) -> None:
        for _ in range(3):
            if not torch.equal(read(model, kinds[name](), ids, 10), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in [*kinds, *kinds]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
