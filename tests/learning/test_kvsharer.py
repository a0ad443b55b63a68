"""KVSharer's search: distances and ranks against slow ones, and a model that really shares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.calibration import Profile
from kvhive.learning import CALIBRATIONS, Kept, calibrate, partial_file
from kvhive.learning.base import cut
from kvhive.learning.kvsharer import (
    KVSharerCalibration,
    Reading,
    dissimilarities,
    ranked,
    search,
)
from kvhive.spec import parse
from kvhive.stores.kvsharer import SHAPES, pairs_of, shared
from tests.cli.tiny import text, tokenizer
from tests.support import random_ids, tiny

LAYERS = 6
FEW = KVSharerCalibration(pieces=4, layers=4, threshold=-0.5)
TEXTS = [text(30), text(40), text(50)]


def deep(family: str = "llama", **settings: object) -> PreTrainedModel:
    """Tiny, of six layers."""
    return tiny(family, "sdpa", **{"num_hidden_layers": LAYERS} | settings)


def learn(out: Path, method: KVSharerCalibration = FEW) -> Profile:
    """With a tiny model of bytes."""
    return calibrate(deep(), tokenizer(), method, TEXTS, "three texts", out)


# ---- ranks and maps -----------------------------------------------------------------------------


@given(layers=st.integers(2, 5), heads=st.integers(1, 3), n=st.integers(1, 7), seed=st.integers())
def test_distances_are_the_obvious_ones(layers: int, heads: int, n: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed % 1000)
    keys, values = (
        [torch.randn(heads, n, d, generator=draw) for _ in range(layers)] for d in (4, 3)
    )
    found = dissimilarities(keys, values)
    assert len(found) == layers * (layers - 1) // 2
    for (i, j), distance in found.items():
        lengths = [
            sum(
                (a[h, t] - b[h, t]).double().square().sum().sqrt()
                for h in range(heads)
                for t in range(n)
            )
            / (heads * n)
            for a, b in ((keys[i], keys[j]), (values[i], values[j]))
        ]
        assert distance == pytest.approx(float(sum(lengths)) / 2, rel=1e-6)


def test_layers_of_other_sizes_are_no_candidates() -> None:
    keys = [torch.ones(heads, 3, d) for heads, d in ((2, 4), (2, 4), (1, 4), (2, 6), (1, 4))]
    assert set(dissimilarities(keys, keys)) == {(1, 0), (4, 2)}
    values = [torch.ones(2, 3, 4), torch.ones(2, 3, 5)]
    assert dissimilarities(keys[:2], values) == {}


@given(st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.integers(0, 3)))
def test_ties_go_to_later_layers(distances: dict[tuple[int, int], int]) -> None:
    order = ranked({pair: float(distance) for pair, distance in distances.items()})
    for one, other in pairwise(order):
        assert (distances[one], one) > (distances[other], other)


@given(
    layers=st.integers(2, 9),
    target=st.integers(1, 8),
    threshold=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 999),
)
def test_the_search_takes_what_stays_alike(
    layers: int, target: int, threshold: float, seed: int
) -> None:
    """Against the loop of the paper, written out."""
    draw = torch.Generator().manual_seed(seed)
    pairs = [(i, j) for i in range(layers) for j in range(i)]
    pairs = [pairs[place] for place in torch.randperm(len(pairs), generator=draw).tolist()]
    costs = 0.4 * torch.rand(layers, layers, generator=draw)

    def alike(sources: Sequence[int]) -> float:
        return 1 - sum(float(costs[i, j]) for i, j in enumerate(sources) if i != j)

    current, accepted = list(range(layers)), []
    for later, earlier in pairs:
        if len(accepted) == target:
            break
        if current[later] != later:
            continue
        trial = [*current]
        trial[later] = earlier
        for place in range(layers):
            if trial[place] != place:
                trial[place] = trial[trial[place]]
        if alike(trial) > threshold:
            current = trial
            accepted.append((later, earlier))
    trials = list(search(pairs, layers, target, threshold, alike))
    assert [trial.pair for trial in trials if trial.accepted] == accepted
    assert list(shared(layers, accepted)) == current


# ---- with a model -------------------------------------------------------------------------------


@torch.no_grad()
def obvious(model: PreTrainedModel, ids: Sequence[int], sources: Sequence[int]) -> Tensor:
    """Last hidden states `[n * width]` of a Llama, layer by layer from its own modules."""
    inner, given = model.model, torch.tensor([list(ids)])
    hidden, held = inner.embed_tokens(given), {}
    place = torch.arange(len(ids))[None]
    turn = inner.rotary_emb(hidden, place)
    for index, block in enumerate(inner.layers):
        attention, normed = block.self_attn, block.input_layernorm(hidden)
        query, key, value = (
            part(normed).view(1, len(ids), -1, attention.head_dim).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = (part * turn[0] + _turned(part) * turn[1] for part in (query, key))
        held[index] = key, value
        keys, values = (one.repeat_interleave(2, 1) for one in held[sources[index]])
        logits = query @ keys.transpose(2, 3) * attention.scaling
        later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        out = logits.masked_fill(later, -torch.inf).softmax(-1) @ values
        hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return inner.norm(hidden).flatten()


def _turned(heads: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    return torch.cat([-heads[..., half:], heads[..., :half]], -1)


def test_a_map_is_tried_by_real_recomputation() -> None:
    model = deep()
    texts = [random_ids(64, seed=seed).tolist() for seed in range(3)]
    reading, plain = Reading.of(model, texts), range(LAYERS)
    for sources in (plain, (0, 1, 1, 0, 4, 5), (0, 0, 0, 0, 4, 4)):
        alike = [
            torch.cosine_similarity(obvious(model, ids, sources), obvious(model, ids, plain), 0)
            for ids in texts
        ]
        assert reading.similarity(sources) == pytest.approx(float(sum(alike)) / 3, abs=1e-5)


def test_keys_and_values_are_those_of_the_cache_averaged() -> None:
    model = deep("qwen2", num_key_value_heads=1)
    texts = [random_ids(64, seed=seed).tolist() for seed in range(2)]
    reading = Reading.of(model, texts)
    cache = HiveCache.for_model(model, "full")
    cache.read(torch.tensor(texts))
    for place, layer in enumerate(cache.hive_layers()):
        keys, values = layer.store.view()
        assert torch.allclose(reading.keys[place].float(), keys.mean(0), atol=1e-4)
        assert torch.allclose(reading.values[place].float(), values.mean(0), atol=1e-4)


def test_what_is_learnt_is_what_the_search_found(tmp_path: Path) -> None:
    made = learn(tmp_path / "p")
    made.check_tensors(SHAPES)
    assert made.data == "three texts: 4 pieces of 64 tokens"
    found, model = pairs_of(made), deep()
    pieces = cut([tokenizer()(one).input_ids for one in TEXTS], 4, 64)
    reading = Reading.of(model, pieces)
    distances = dissimilarities(reading.keys, reading.values)
    assert made.tensors["distance"][3, 1].item() == pytest.approx(distances[3, 1])
    assert found[0] == ranked(distances)[0], "the most distant pair was taken, whatever it does"
    for count in range(1, len(found) + 1):
        alike = reading.similarity(shared(LAYERS, found[:count]))
        assert alike > FEW.threshold
        assert made.tensors["similarity"][count - 1].item() == pytest.approx(alike, abs=1e-6)
    assert KVSharerCalibration.remark(made) == ""


def test_it_can_be_used_at_once(tmp_path: Path) -> None:
    made, model = learn(tmp_path / "p"), deep()
    for layers in range(5):
        cache = HiveCache.for_model(model, f"h2o@40+kvsharer(layers={layers})", made)
        cache.read(random_ids(1, 80))
        assert len(cache.holding) == LAYERS - layers
        assert cache.report().tokens_kept == 40


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn(tmp_path / "whole").tensors
    real, done = Reading.similarity, []

    def similarity(self: Reading, sources: Sequence[int]) -> float:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(tuple(sources))
        return real(self, sources)

    monkeypatch.setattr(Reading, "similarity", similarity)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "p")
    assert partial_file(tmp_path / "p").exists()
    monkeypatch.setattr(Reading, "similarity", real)
    before = len(Kept.open(partial_file(tmp_path / "p"), _mark(tmp_path / "p")).parts)
    assert before == 2, "nothing is done twice"
    again = learn(tmp_path / "p").tensors
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def _mark(out: Path) -> str:
    """What the learning under way belongs to."""
    from safetensors import safe_open

    with safe_open(partial_file(out), framework="pt") as file:
        return str(file.metadata()["belongs"])


def test_progress_ends_at_one(tmp_path: Path) -> None:
    told: list[float] = []
    texts = [random_ids(64, seed=seed).tolist() for seed in range(2)]
    FEW.learn(deep(), texts, Kept.open(tmp_path / "k", ""), told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_fewer_than_asked_for_are_told(tmp_path: Path) -> None:
    method = KVSharerCalibration(pieces=4, layers=5, threshold=0.8)
    made = learn(tmp_path / "p", method)
    found = len(made.tensors["pairs"])
    assert 0 < found < 5
    assert KVSharerCalibration.remark(made).startswith(f"{found} layers can share, of 5 asked for")
    shown, _ = KVSharerCalibration.pictures(made)
    assert f"the search found {found} of 5" in shown.meaning


def test_pictures_show_the_map_and_the_distances(tmp_path: Path) -> None:
    made = learn(tmp_path / "p")
    maps, distances = KVSharerCalibration.pictures(made)
    assert maps.columns == ("1 share", "2 share", "3 share", "4 share")
    assert maps.texts()[0] == ["0", "0", "0", "0"]
    assert maps.values[:, -1].tolist() == list(shared(LAYERS, pairs_of(made)))
    assert torch.equal(distances.values, made.tensors["distance"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("kvsharer(layers=0)", "layers must be at least 1, got 0"),
        ("kvsharer(threshold=1.5)", "threshold must be between -1 and 1"),
        ("kvsharer(tokens=63)", "tokens must be at least 64"),
    ],
)
def test_settings_that_cannot_work(settings: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(CALIBRATIONS, settings)


def test_what_a_model_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers must be below the 6 compressed layers of this"):
        learn(tmp_path / "p", KVSharerCalibration(layers=6))
    with pytest.raises(ValueError, match=r"no layer can share with a cosine above 1\.0; lower the"):
        learn(tmp_path / "p", KVSharerCalibration(pieces=1, threshold=1.0))
    broken = deep()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="ends in numbers that are not finite; calibrate it in"):
        calibrate(broken, tokenizer(), FEW, TEXTS, "", tmp_path / "q")
