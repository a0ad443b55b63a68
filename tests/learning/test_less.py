"""LESS learns: what is read, what is wanted, that training helps, and that it can be stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.calibration import Profile
from kvhive.kernels.low_rank import FeatureMaps
from kvhive.learning import CALIBRATIONS, calibrate, partial_file
from kvhive.learning.less import LessCalibration, _Episode
from kvhive.learning.residual import output_projections
from kvhive.learning.watching import Attention, watch
from kvhive.recipe import Recipe
from kvhive.spec import parse
from kvhive.stores.less import SHAPES
from tests.cli.tiny import text, tokenizer
from tests.support import random_ids, read, tiny, tiny_llama

FEW = LessCalibration(
    pieces=4, tokens=160, scored=40, rank=4, hidden=6, budgets=(0.1, 0.2), epochs=3, layers=1
)
TEXTS = [text(80), text(75)]


def learn(out: Path, method: LessCalibration = FEW, model: Any = None) -> Profile:
    """With a tiny model of bytes."""
    return calibrate(model or tiny_llama(), tokenizer(), method, TEXTS, "two texts", out)


def episode(recipe: str, n: int = 90, scored: int = 30) -> tuple[Attention, _Episode]:
    """The last layer of a tiny model, and what becomes of a prompt of n tokens."""
    seen: list[Attention] = []
    watch(tiny_llama(), random_ids(1, n + scored)[0].tolist(), seen.append)
    return seen[-1], _Episode.of(seen[-1], n, Recipe.parse(recipe), None)


@pytest.mark.parametrize("recipe", ["h2o@20", "streaming_llm(positions=original)@17", "corm@60"])
def test_what_is_read_is_what_a_cache_keeps(recipe: str) -> None:
    """By attention worked out whole: to all tokens, and to those that were not dropped."""
    one, ours = episode(recipe)
    model, ids = tiny_llama(), random_ids(1, 120)
    cache = HiveCache.for_model(model, recipe)
    read(model, cache, ids[:, :90], 90)
    kept = cache.positions_kept()[-1][0]
    for head in range(2):
        dropped = ours.dropped[0, head].nonzero().flatten().tolist()
        assert sorted({*kept[head].tolist()} - {-1} | {*dropped}) == list(range(90))
        assert not {*kept[head].tolist()} & {*dropped}
    keys, values = (held.repeat_interleave(2, 0) for held in (one.keys, one.values))
    logits = (one.queries[:, 90:] @ keys.transpose(1, 2)) * one.scale
    logits += torch.full((30, 120), float("-inf")).triu(91)
    assert torch.allclose(ours.wanted[0], logits.softmax(-1) @ values, atol=1e-5)
    gone = torch.zeros(2, 120, dtype=torch.bool)
    gone[:, :90] = ours.dropped[0]
    logits = logits.masked_fill(gone.repeat_interleave(2, 0)[:, None], float("-inf"))
    assert torch.allclose(ours.sparse[0], logits.softmax(-1) @ values, atol=1e-5)
    assert torch.allclose(ours.lse[0], logits.logsumexp(-1), atol=1e-5)


def test_the_error_is_that_behind_the_output_projection() -> None:
    _, ours = episode("h2o@20")
    model = tiny_llama()
    projection = output_projections(model)[1]
    off = (ours.sparse - ours.wanted)[0].transpose(0, 1).flatten(1)
    expected = model.model.layers[1].self_attn.o_proj(off).square().mean().detach()
    assert float(ours.alone(projection)) == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) > 0
    quiet = FeatureMaps(*FEW._start(ours, torch.Generator().manual_seed(0)))
    assert float(ours.error(quiet, projection)) == pytest.approx(float(expected), rel=0.1)


def test_gradients_reach_every_weight() -> None:
    _, ours = episode("h2o@20")
    projection = output_projections(tiny_llama())[1]
    weights = [torch.randn_like(w) for w in FEW._start(ours, torch.Generator().manual_seed(0))]
    for weight in weights:
        weight.requires_grad_()
    ours.error(FeatureMaps(*weights), projection, dropout=0.3).backward()
    for weight in weights:
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all())
        assert bool(weight.grad.any())


def toy(seed: int) -> _Episode:
    """A layer whose evicted tokens are of two kinds, which a query tells apart by its first number:
    what a state of rank 8 can say.
    """
    source = torch.Generator().manual_seed(seed)
    kind = torch.randint(2, (1, 1, 64, 1), generator=source) * 2.0 - 1
    keys = torch.cat([2 * kind, 0.1 * torch.randn(1, 1, 64, 3, generator=source)], -1)
    values = torch.cat([kind, kind.square()], -1) + 0.1 * torch.randn(1, 1, 64, 2, generator=source)
    queries = torch.randn(1, 2, 40, 4, generator=source)
    one = Attention(
        0, queries[0], keys[0], values[0], torch.empty(2, 64, 2), 0.5
    )  # tokens that are seen by all queries
    dropped = torch.ones(1, 1, 64, dtype=torch.bool)
    dropped[..., -6:] = False
    logits = (one.queries @ one.keys.transpose(1, 2)) * one.scale
    near = logits[..., -6:]
    return _Episode(
        keys=keys,
        values=values,
        dropped=dropped,
        queries=queries,
        sparse=(near.softmax(-1) @ values[0, :, -6:])[None],
        lse=near.logsumexp(-1)[None],
        wanted=(logits.softmax(-1) @ values[0])[None],
    )


def test_training_beats_the_policy_on_texts_kept_apart() -> None:
    """Card, test 5: one layer, 200 steps of toy data."""
    method = replace(FEW, epochs=5, rate=0.1, rank=8, hidden=12)
    learnt = method._train([toy(seed) for seed in range(44)], torch.eye(4), 0)
    curve = learnt["curve"].tolist()
    assert len(curve) == 5
    assert min(curve) < 0.5
    maps = FeatureMaps(*(learnt[name].float() for name in FeatureMaps.names()))
    fresh = [toy(seed) for seed in range(100, 120)]
    left = sum(float(one.error(maps, torch.eye(4))) for one in fresh)
    assert left < 0.7 * sum(float(one.alone(torch.eye(4))) for one in fresh)


def test_what_is_learnt_can_be_used_at_once(tmp_path: Path) -> None:
    model = tiny_llama()
    made = learn(tmp_path / "p", model=model)
    made.check_tensors(SHAPES)
    assert made.data == "two texts: 3 pieces of 160 tokens"
    assert made.tensors["curve"].shape == (2, 3)
    assert made.tensors["reach"].tolist() == [160]
    assert made.tensors["query_in"].dtype == torch.float16
    cache = HiveCache.for_model(model, f"h2o@40+less(rank=4, profile='{tmp_path / 'p'}')")
    assert not read(model, cache, random_ids(1, 120), 100).isnan().any()
    (picture,) = CALIBRATIONS["less"].pictures(made)
    assert picture.columns == ("epoch 0", "epoch 1", "epoch 2")
    assert torch.equal(picture.values, made.tensors["curve"])


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, whatever part of them was read at a time."""
    whole = learn(tmp_path / "whole")
    train = LessCalibration._train

    def stopping(self: LessCalibration, *given: Any) -> dict[str, Tensor]:
        if given[-1] == 1:
            raise KeyboardInterrupt
        return train(self, *given)

    monkeypatch.setattr(LessCalibration, "_train", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "p")
    assert partial_file(tmp_path / "p").exists()
    monkeypatch.setattr(LessCalibration, "_train", train)
    made = learn(tmp_path / "p")
    together = learn(tmp_path / "together", replace(FEW, layers=2))
    for name, tensor in whole.tensors.items():
        assert torch.equal(made.tensors[name], tensor)
        assert torch.equal(together.tensors[name], tensor)


def test_progress_rises_to_the_end(tmp_path: Path) -> None:
    told: list[float] = []
    calibrate(tiny_llama(), tokenizer(), FEW, TEXTS, "two texts", tmp_path / "p", told.append)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    assert len(told) == 1 + 2 * (3 + 1), "two layers of three pieces"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {"head_dim": 8}),
        ("gpt_neox", {"num_key_value_heads": 4}),
        ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 6, "head_dim": 8}),
    ],
)
def test_other_families(family: str, settings: dict[str, object], tmp_path: Path) -> None:
    """Layers with sliding windows are left out."""
    model: PreTrainedModel = tiny(family, **settings)
    made = learn(tmp_path / "p", model=model)
    assert made.tensors["curve"].shape[0] == (1 if family == "gemma3_text" else 2)
    cache = HiveCache.for_model(model, "h2o@40+less(rank=4)", made)
    assert not read(model, cache, random_ids(1, 100), 90).isnan().any()


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("less(scored=81, tokens=160)", "scored must be at most half of the 160 tokens"),
        ("less(policies=['streaming_llm'])", "counts positions in the cache"),
        ("less(policies=['nosuch'])", "unknown policy 'nosuch'"),
        ("less(budgets=[0])", "budgets must be between 0.001 and 0.99"),
    ],
)
def test_bad_settings(spelled: str, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        parse(CALIBRATIONS, spelled)


def test_texts_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is judged on another, got one alone"):
        learn(tmp_path / "p", replace(FEW, tokens=330))
    wide = replace(FEW, budgets=(0.99,), policies=("window(positions=original)",))
    assert learn(tmp_path / "q", wide).tensors["curve"].shape == (2, 3)


def test_a_training_that_diverges_says_so() -> None:
    with pytest.raises(ValueError, match=r"training of layer 0 diverged; lower rate=1\.0"):
        replace(FEW, rate=1.0)._train([_lost(toy(seed)) for seed in range(4)], torch.eye(4), 0)


def _lost(one: _Episode) -> _Episode:
    """With keys beyond all bounds."""
    return replace(one, keys=one.keys * 1e30)
