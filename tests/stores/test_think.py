"""ThinK's store against the definition: keys as written, less the channels that were pruned."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.footprint import Workload, footprint
from kvhive.cache.hive_cache import HiveCache
from kvhive.kernels import Ask, Needs, reference
from kvhive.model.outline import Outline
from kvhive.plan import Plan
from kvhive.recipe import Recipe
from kvhive.step import Step
from kvhive.stores import LayerFacts
from kvhive.stores._energy import Latest, best_channels, key_energy
from kvhive.stores._segments import served
from kvhive.stores._thin import Thin
from kvhive.stores._whole import Whole
from kvhive.stores.dense import DenseStore
from kvhive.stores.think import Think, ThinkStore
from tests.support import Feeder, random_ids, read


def thin_of(store: object) -> Thin:
    """The thin keys of a store that has some."""
    assert isinstance(store, ThinkStore)
    (part,) = store._keys.parts
    assert isinstance(part, Thin)
    return part


def mask_of(store: object) -> Tensor:
    """bool `[R, d]`: the channels that older keys keep."""
    thin = thin_of(store)
    mask = torch.zeros(len(thin.channels), thin.width, dtype=torch.bool)
    return mask.scatter_(1, thin.channels.long(), True)


def feeder(
    recipe: str, width: int = 8, heads: int = 4, kv_heads: int = 2, **more: object
) -> Feeder:
    """A feeder of heads of such sizes."""
    sizes = {"width": width, "heads": heads, "kv_heads": kv_heads}
    return type("Sized", (Feeder,), sizes)(recipe, **more)


def slow_mask(
    queries: Tensor, keys: Tensor, kept: list[list[list[int]]], window: int, pruned: int
) -> Tensor:
    """bool `[b, K, d]` in plain loops. kept: positions that each head of each row holds."""
    (batch, heads, _, width), kv_heads = queries.shape, keys.shape[1]
    mask = torch.ones(batch, kv_heads, width, dtype=torch.bool)
    group = heads // kv_heads
    for row in range(batch):
        for head in range(kv_heads):
            scores = []
            for channel in range(width):
                asked = queries[row, head * group : (head + 1) * group, -window:, channel]
                held = keys[row, head, kept[row][head], channel]
                scores.append(float((asked**2).mean()) * float((held**2).mean()))
            for channel in sorted(range(width), key=lambda one: (scores[one], one))[:pruned]:
                mask[row, head, channel] = False
    return mask


@pytest.mark.parametrize(
    ("width", "keep", "pruned"),
    [(64, 0.7, 19), (48, 0.7, 14), (40, 0.9, 4), (80, 0.6, 32), (96, 0.6, 38), (8, 0.01, 7)],
)
def test_as_many_channels_go_as_the_share_says(width: int, keep: float, pruned: int) -> None:
    assert Think(keep=keep).pruned(width) == pruned
    assert pruned == min(math.floor(width * float(f"{1 - keep:.6f}")), width - 1)
    one = feeder(f"full+think(keep={keep})", width)
    one.step(60)
    mask = mask_of(one.layer.store)
    assert mask.sum(1).tolist() == [width - pruned] * 2


@pytest.mark.parametrize("recipe", ["full", "h2o@48", "h2o@48/global", "snapkv(window=9)@0.7"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 8), (3, 1, 40), (2, 2, 80)])
@pytest.mark.parametrize("window", [7, 32, 500])
def test_channels_are_those_of_the_definition(
    recipe: str, heads: int, kv_heads: int, width: int, window: int
) -> None:
    """Energies of the last queries, and of the keys that survive the prompt's eviction."""
    one = feeder(f"{recipe}+think(window={window}, recent=5)", width, heads, kv_heads, tapes=(0, 1))
    one.step(130)
    kept = [
        [[p for p in head.tolist() if p >= 0] for head in row] for row in one.layer.slots.position
    ]
    queries = one.queries[:, :, :130]
    slow = slow_mask(queries, one.keys, kept, window, Think().pruned(width))
    assert torch.equal(mask_of(one.layer.store), slow.flatten(0, 1))


def test_of_equal_channels_the_lower_goes() -> None:
    score = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    assert best_channels(score, 2).tolist() == [[0, 2, 4, 5], [2, 3, 4, 5]]
    assert best_channels(score, 4).tolist() == [[2, 5], [4, 5]]
    assert best_channels(score, 0).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_what_scaling_changes_and_what_not() -> None:
    plain, scaled, traded = (Feeder("full+think(keep=0.5)") for _ in range(3))
    scaled.keys[:, 0] *= 8.0
    scaled.queries[:, 2:] *= 0.25  # of the other KV head
    traded.keys[..., 3] *= 4.0
    traded.queries[..., 3] /= 4.0
    for one in (plain, scaled, traded):
        one.step(90)
    assert torch.equal(mask_of(plain.layer.store), mask_of(scaled.layer.store))
    assert torch.equal(mask_of(plain.layer.store), mask_of(traded.layer.store))
    louder = Feeder("full+think(keep=0.5)")
    louder.keys[..., 3] *= 100.0
    louder.step(90)
    assert bool(mask_of(louder.layer.store)[:, 3].all())


def zeroed(one: Feeder, thin: Tensor) -> Tensor:
    """Keys as written, without pruned channels where bool `[b, K, n]` says so."""
    position = one.layer.slots.position.long().clamp_min(0)
    written = one.keys.gather(2, position[..., None].expand(-1, -1, -1, one.width))
    mask = mask_of(one.layer.store).view(*written.shape[:2], 1, -1)
    return torch.where(thin[..., None] & ~mask, 0.0, written)


def same_tokens(one: Feeder, border: Tensor) -> None:
    """What is held is what was written; keys are thin before positions `border` `[b, K, 1]`."""
    position, valid = one.layer.slots.position, one.layer.slots.valid
    keys, values = one.layer.store.view()
    assert torch.equal(keys[valid], zeroed(one, position < border)[valid])
    index = position.long().clamp_min(0)[..., None].expand(-1, -1, -1, one.width)
    assert torch.equal(values[valid], one.values.gather(2, index)[valid])


def same_attention(one: Feeder, queries: int) -> None:
    """Output and report of queries that are the last are those of the keys and values viewed."""
    store, slots = one.layer.store, one.layer.slots
    keys, values = store.view()
    query = torch.randn(len(keys), one.heads, queries, one.width)
    step = Step.plain(store.length - queries, queries)
    needs = Needs(columns="square", last_rows=3)
    out, seen = store.attend(query, Ask(step, 0.4, needs))
    valid = slots.valid if slots.holes else None
    slow, told = reference.attend(query, keys, values, Ask(step, 0.4, needs, valid))
    assert torch.allclose(out, slow, atol=1e-5)
    assert seen.columns is not None
    assert told.columns is not None
    assert seen.rows is not None
    assert told.rows is not None
    assert torch.allclose(seen.columns, told.columns, atol=1e-5)
    assert torch.allclose(seen.rows.all(), told.rows.all(), atol=1e-5)
    report = store.report(query, Ask(step, 0.4, needs))
    assert report.columns is not None
    assert torch.allclose(report.columns, seen.columns, atol=1e-6)


@pytest.mark.parametrize("recipe", ["full", "h2o@48", "tova@48", "h2o@48/global", "h2o@0.6/ada"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 8), (4, 4, 40), (6, 2, 96)])
def test_thin_keys_are_the_keys_without_the_pruned_channels(
    recipe: str, heads: int, kv_heads: int, width: int
) -> None:
    """After a prompt, padded, and while decoding with evictions; in all that attention reports."""
    one = feeder(f"{recipe}+think(recent=9)", width, heads, kv_heads, tapes=(0, 1))
    one.step((131, 90))
    border = one.layer.slots.position[..., -9:-8].clone()
    same_tokens(one, border)
    for steps in (1, 14, 25):
        for _ in range(steps):
            one.step(1)
        same_tokens(one, border)
        for queries in (1, 5, 17):
            same_attention(one, queries)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_moved_as_they_are(dtype: torch.dtype) -> None:
    one = feeder("tova@48+think(recent=9)", tapes=(0, 1), dtype=dtype)
    one.step((131, 90))
    border = one.layer.slots.position[..., -9:-8].clone()
    for _ in range(20):
        one.step(1)
    same_tokens(one, border)
    assert thin_of(one.layer.store).held.row(0, 0, 5).dtype == torch.float32


@pytest.mark.parametrize("recipe", ["full", "tova@48", "h2o@48/global"])
@pytest.mark.parametrize("rows", [1, 2])
def test_bytes_are_those_of_the_tokens(recipe: str, rows: int) -> None:
    """Keys: thin tokens times D - k and whole ones times D; values: all that there are. Besides
    that the channels' numbers (2 bytes each), and 16 bytes a row and part for where it lies.
    """
    one = feeder(f"{recipe}+think(recent=9)", 40, tapes=range(rows), dtype=torch.bfloat16)
    one.step([131, 90][:rows])
    store = one.layer.store
    assert isinstance(store, ThinkStore)
    tokens, all_rows, pruned = int(one.layer.slots.count.sum()), 2 * rows, 16
    whole = 9 * all_rows
    keys = 2 * ((tokens - whole) * (40 - pruned) + whole * 40)
    places = 3 * 8 * all_rows
    assert store._keys.nbytes == keys + 2 * (40 - pruned) * all_rows + places
    assert store._values.nbytes == 2 * 40 * tokens + places
    assert store.nbytes == store._keys.nbytes + store._values.nbytes


def test_a_short_prompt_is_left_whole_until_a_longer_one_comes() -> None:
    one = Feeder("full+think(recent=20)")
    one.step(20)
    for _ in range(30):
        one.step(1)
    assert not one.layer.store._keys.parts
    one.step(10)
    assert thin_of(one.layer.store).lengths.tolist() == [40, 40]


@pytest.mark.parametrize("prompt", [60, 130])
def test_kernels_of_few_bits_leave_it_alone(prompt: int) -> None:
    """Evicted from and not thinned yet, and thinned."""
    one = Feeder("tova@48+think(recent=50)" if prompt == 60 else "tova@48+think(recent=9)")
    one.step(prompt)
    assert not served(*one.layer.store._sides, reports=False)


def test_later_prompts_stay_whole_under_the_same_channels() -> None:
    one = Feeder("full+think(recent=9)")
    one.step(90)
    border, mask = torch.full((1, 2, 1), 81), mask_of(one.layer.store)
    for tokens in (1, 60, 1, 30):
        one.step(tokens)
        same_tokens(one, border)
    assert torch.equal(mask_of(one.layer.store), mask)


def test_what_was_decoded_is_thinned_every_so_many_tokens() -> None:
    one = Feeder("full+think(recent=9, rethin=12)")
    one.step(90)
    for decoded in range(1, 60):
        one.step(1)
        thin = 81 + decoded // 12 * 12
        assert thin_of(one.layer.store).lengths.tolist() == [thin, thin]
        same_tokens(one, torch.full((1, 2, 1), thin))
    same_attention(one, 1)


@pytest.mark.parametrize("chunk", [1, 7, 40, 59, 64, 119])
def test_a_prompt_read_in_chunks_chooses_at_its_end(model: PreTrainedModel, chunk: int) -> None:
    """By the energies of all of its last queries where the last chunk has a window of them, and
    always by those of all keys; no key is thinned before.
    """
    ids = random_ids(1, 120)
    whole, cut = (HiveCache.for_model(model, "full+think(window=8)") for _ in range(2))
    whole.read(ids)
    cut.read(ids, prefill_chunk=chunk)
    for ours, theirs in zip(cut.hive_layers(), whole.hive_layers(), strict=True):
        thin = thin_of(ours.store)
        assert thin.lengths.tolist() == thin_of(theirs.store).lengths.tolist() == [88, 88]
        if chunk in (40, 64):
            assert torch.equal(mask_of(ours.store), mask_of(theirs.store))
    ours, theirs = (read(model, cache, random_ids(1, 5, seed=3), 1) for cache in (cut, whole))
    assert ours.shape == theirs.shape


def test_few_queries_at_the_end_leave_the_mean_of_those_before_its_share() -> None:
    earlier, later = torch.randn(1, 4, 30, 8), torch.randn(1, 4, 3, 8)
    energy = Latest.of(later, None, 2, 8, 33).after(
        Latest.of(earlier, None, 2, 8, 30).after(None, 8), 8
    )
    before = earlier[:, :, -8:].square().unflatten(1, (2, 2)).mean((2, 3))
    now = later.square().unflatten(1, (2, 2)).mean(2).sum(2)
    assert energy.count.tolist() == [8]
    assert torch.allclose(energy.mean, (now + 5 * before) / 8)


def test_padding_has_no_energy() -> None:
    queries, keys = torch.randn(2, 4, 12, 8), torch.randn(2, 12, 8)
    real = torch.arange(12) >= torch.tensor([[0], [9]])
    energy = Latest.of(queries, real, 2, 6, 12).after(None, 6)
    alone = Latest.of(queries[1:, :, 9:], None, 2, 6, 3).after(None, 6)
    assert energy.count.tolist() == [6, 3]
    assert torch.allclose(energy.mean[1:], alone.mean)
    both, most = key_energy(keys, real)
    assert most == 12
    assert torch.allclose(both[1], keys[1, 9:].square().mean(0))
    assert torch.allclose(both[0], keys[0].square().mean(0))


def test_queries_that_are_taken_back_have_none() -> None:
    queries = torch.randn(1, 4, 40, 8)
    left = Latest.of(queries, None, 2, 6, 40).until(33).after(None, 6)
    assert torch.equal(left.mean, Latest.of(queries[:, :, :33], None, 2, 6, 33).after(None, 6).mean)


def test_keeping_all_is_the_full_cache(model: PreTrainedModel) -> None:
    ids = random_ids(1, 150)
    caches = [HiveCache.for_model(model, f"h2o@60{rest}") for rest in ("", "+think(keep=1.0)")]
    ours, theirs = (read(model, cache, ids, 100) for cache in caches)
    assert torch.equal(ours, theirs)
    assert isinstance(Think(keep=1.0).new(LayerFacts(), []), DenseStore)
    nearly = HiveCache.for_model(model, "h2o@60+think(keep=0.99)")  # no channel of eight goes
    assert torch.allclose(read(model, nearly, ids, 100), ours, atol=1e-4)


def test_values_in_few_bits(model: PreTrainedModel) -> None:
    """As wide as keys are thin; the newest are exact."""
    one = feeder("full+think(recent=9, value_bits=8)", 40)
    one.step(131)
    keys, values = one.layer.store.view()
    written = one.values[:, :, :131]
    older = 131 - 9 - (131 - 9) % 32
    assert torch.equal(values[:, :, older:], written[:, :, older:])
    assert torch.allclose(values, written, atol=0.03)
    assert not torch.equal(values[:, :, :older], written[:, :, :older])
    assert bool((keys[:, :, : 131 - 9] == 0).any())
    few = feeder("full+think(recent=9, value_bits=4)", 40)
    few.step(131)
    assert one.layer.store.nbytes - few.layer.store.nbytes == 2 * older * 40 // 2


def test_a_random_life_against_lists() -> None:
    """Tokens come, go, are taken back, and rows move; a dense list of keys says what is held."""
    source = torch.Generator().manual_seed(4)
    for width, heads in ((8, 1), (40, 2), (16, 3)):
        store = ThinkStore(Think(recent=6, rethin=10))
        rows = 2
        keys, values = (torch.randn(rows, heads, 50, width, generator=source) for _ in range(2))
        query = torch.randn(rows, 2 * heads, 50, width, generator=source)
        store.append(keys, values, 50)
        store.attend(query, Ask(Step.plain(0, 50), 0.3))
        store.pack()
        mask = mask_of(store).view(rows, heads, width)
        held = [
            [
                [keys[r, h, t] * (mask[r, h] if t < 44 else 1) for t in range(50)]
                for h in range(heads)
            ]
            for r in range(rows)
        ]
        fresh = 0
        for turn in range(120):
            kind = int(torch.randint(0, 5, (1,), generator=source))
            if kind <= 2 or store.length < 12:
                new = torch.randn(rows, heads, 1, width, generator=source)
                store.append(new, new, 0)
                fresh += 1
                for r in range(rows):
                    for h in range(heads):
                        held[r][h].append(new[r, h, 0])
                store.pack()
                if fresh >= 10:
                    fresh = 0
                    for r in range(rows):
                        for h in range(heads):
                            own = held[r][h]
                            own[:-6] = [one * mask[r, h] for one in own[:-6]]
            elif kind == 3:
                keep = torch.rand(rows, heads, store.length, generator=source) < 0.8
                empty = torch.tensor([[store.length - len(one) for one in row] for row in held])
                keep &= torch.arange(store.length) >= empty[..., None]
                keep[..., -8:] = True
                for r in range(rows):
                    for h in range(heads):
                        marks = keep[r, h, int(empty[r, h]) :].tolist()
                        held[r][h] = [
                            one for one, stays in zip(held[r][h], marks, strict=True) if stays
                        ]
                store.compact(Plan.keeping(keep), 0)
            elif turn % 2:
                order = torch.randint(0, rows, (rows,), generator=source)
                store.select_rows(order)
                held = [[list(one) for one in held[i]] for i in order.tolist()]
                mask = mask[order]
            else:
                back = int(torch.randint(0, 4, (1,), generator=source))
                store.truncate(store.length - back)
                fresh = max(0, fresh - back)
                held = [[one[: len(one) - back] for one in row] for row in held]
            viewed = store.view()[0]
            for r in range(rows):
                for h in range(heads):
                    own = torch.stack(held[r][h])
                    assert torch.equal(viewed[r, h, store.length - len(own) :], own), (turn, kind)
            store = pickle.loads(pickle.dumps(store)) if turn % 7 == 0 else store


@pytest.mark.parametrize("recipe", ["h2o@600+think", "h2o@600+think(value_bits=4)"])
def test_long_answers_do_not_outgrow_what_was_foretold(model: PreTrainedModel, recipe: str) -> None:
    """They displace thin keys by whole ones."""
    cache, most = HiveCache.for_model(model, recipe), 0
    for tokens in (490, 180, *[1] * 100):
        read(model, cache, random_ids(1, tokens), tokens)
        most = max(most, cache.nbytes)
    outline = Outline.of(model, cache.facts.rotations or ())
    work = Workload(tokens=770, turn=1)
    assert most <= footprint(cache.recipe, outline, work).between_steps <= 1.3 * most


def test_exact_rows_at_equal_distance_are_one_product() -> None:
    """The fast way and the row-by-row way agree; a place that differs takes the slow one."""
    source = torch.Generator().manual_seed(1)
    numbers, query = torch.randn(30, 5, generator=source), torch.randn(3, 2, 5, generator=source)
    starts = torch.arange(3) * 10
    for lengths, at in (([7, 7, 7], [4, 4, 4]), ([7, 7, 7], [4, 3, 4]), ([7, 0, 3], [4, 11, 8])):
        part = Whole(numbers, starts, torch.tensor(lengths))
        out, places = torch.full((3, 2, 11), 9.0), torch.tensor(at)
        part.logits(query, out, places)
        weights = torch.rand(3, 2, 11, generator=source)
        mixed = torch.ones(3, 2, 5)
        part.mix(weights, mixed, places)
        for row, (length, place) in enumerate(zip(lengths, at, strict=True)):
            tokens = numbers[10 * row : 10 * row + length]
            slow = torch.full((2, 11), 9.0)
            slow[:, place : place + length] = query[row] @ tokens.T
            assert torch.allclose(out[row], slow, atol=1e-6)
            own = 1 + weights[row, :, place : place + length] @ tokens
            assert torch.allclose(mixed[row], own, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("full+think(keep=0.0)", r"think: keep must be more than 0"),
        ("full+think(keep=1.5)", r"think: keep must be between 0.0 and 1.0, got 1.5"),
        ("full+think(window=0)", r"think: window must be at least 1, got 0"),
        ("full+think(rethin=0)", r"think: rethin must be at least 1, got 0"),
        ("full+think(value_bits=5)", r"think: value_bits must be 2, 3, 4 or 8, got 5"),
        ("h2o(positions=cache)@0.4+think", r"think cannot replace single keys"),
        ("elastic@0.4+think", r"think cannot replace single keys"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(recipe: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe.parse(recipe)
