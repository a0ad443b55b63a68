"""BaKlaVa learns: importances against the obvious way, and a search that can be stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.allocations.baklava import SHAPES, Baklava
from kvhive.cache.hive_cache import HiveCache
from kvhive.calibration import Profile
from kvhive.learning import CALIBRATIONS, Kept, calibrate, partial_file
from kvhive.learning.baklava import BaklavaCalibration, importance
from kvhive.spec import parse
from tests.cli.tiny import text, tokenizer
from tests.support import random_ids, tiny, tiny_llama

POLICY = "streaming_llm(positions=original)"  # whose choice depends on no rounding
FEW = BaklavaCalibration(
    policy=POLICY,
    pieces=3,
    tokens=256,
    searched=1,
    scored=64,
    low_fracs=(0.0, 0.5),
    low_scales=(0.25, 0.75),
)
TEXTS = [text(70), text(75), text(72)]


def one_minus_cosine(before: Tensor, after: Tensor) -> float:
    """Mean over tokens, one at a time."""
    pairs = zip(before.double(), after.double(), strict=True)
    return 1 - sum(float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / len(before)


@torch.no_grad()
def obvious(ids: list[int]) -> tuple[list[list[float]], list[float]]:
    """From the attention weights and hidden states that transformers gives of a tiny Llama."""
    model = tiny("llama")
    seen = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    heads, layers = [], []
    for place, block in enumerate(model.model.layers):
        before, weights = seen.hidden_states[place][0], seen.attentions[place][0]
        attention = block.self_attn
        values = attention.v_proj(block.input_layernorm(before)).view(len(ids), 2, -1)
        values = values.transpose(0, 1).repeat_interleave(2, 0)
        outputs = weights @ values
        heads.append([one_minus_cosine(v, out) for v, out in zip(values, outputs, strict=True)])
        added = attention.o_proj(outputs.transpose(0, 1).flatten(1))
        layers.append(one_minus_cosine(before, before + added))
    return heads, layers


def test_importances_are_the_obvious_ones() -> None:
    ids = random_ids(1, 90)[0].tolist()
    found = importance(tiny("llama"), ids)
    heads, layers = obvious(ids)
    assert torch.allclose(found["heads"], torch.tensor(heads).double(), rtol=1e-4)
    assert torch.allclose(found["layers"], torch.tensor(layers).double(), rtol=1e-4)
    assert found["kv_heads"].tolist() == [2]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {}),
        ("gpt_neox", {}),
        ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 6, "head_dim": 8}),
    ],
)
def test_other_families(family: str, settings: dict[str, object]) -> None:
    """Layers with sliding windows are left out."""
    found = importance(tiny(family, **settings), random_ids(1, 60)[0].tolist())
    full = 1 if family == "gemma3_text" else 2
    assert found["heads"].shape == (full, 4)
    assert found["layers"].shape == (full,)
    assert float(found["heads"].min()) > 0
    assert float(found["layers"].min()) > 0


def test_no_hook_is_left() -> None:
    model = tiny_llama()
    importance(model, random_ids(1, 30)[0].tolist())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def learn(out: Path, method: BaklavaCalibration = FEW, model: Any = None) -> Profile:
    """With a tiny model of bytes."""
    return calibrate(model or tiny_llama(), tokenizer(), method, TEXTS, "three texts", out)


def test_the_search_reads_the_last_piece_under_every_plan(tmp_path: Path) -> None:
    """Every loss is that of an own cache under the plan, and the choice is the best of the grid."""
    model = tiny_llama()
    made = learn(tmp_path / "p", model=model)
    made.check_tensors(SHAPES)
    held = made.tensors
    assert held["heads"].shape == (2, 2, 4)
    ids = torch.tensor([tokenizer()(TEXTS[2]).input_ids[:256]])
    losses = {
        plan: slow_loss(model, made, ids, plan)
        for plan in ("tiers, low_frac=0.0", "proportional", *grid())
    }
    assert held["uniform"].item() == pytest.approx(losses["tiers, low_frac=0.0"], abs=1e-4)
    assert held["proportional"].item() == pytest.approx(losses["proportional"], abs=1e-4)
    found = held["losses"]
    assert found[0].tolist() == held["uniform"].tolist() * 2
    for place, scale in enumerate((0.25, 0.75)):
        expected = losses[f"tiers, low_frac=0.5, low_scale={scale}"]
        assert found[1, place].item() == pytest.approx(expected, abs=1e-4)
    row, column = divmod(int(found.argmin()), 2)
    best = [0.0 if row == 0 else 0.5, (0.25, 0.75)[column]]
    assert held["choice"].tolist() == best
    assert len({round(loss, 6) for loss in losses.values()}) > 2, "plans differ"


def grid() -> list[str]:
    """What the search tries beside uniform."""
    return [f"tiers, low_frac=0.5, low_scale={scale}" for scale in (0.25, 0.75)]


@torch.no_grad()
def slow_loss(model: PreTrainedModel, made: Profile, ids: Tensor, plan: str) -> float:
    """By a cache of its own, which reads alone."""
    recipe = f"{POLICY}@0.25/baklava(allocation={plan})"
    cache = HiveCache.for_model(model, recipe, made)
    cache.read(ids[:, :192])
    with cache.freeze():
        logits = model(ids[:, 192:-1], past_key_values=cache).logits[0]
    each = logits.float().log_softmax(-1).gather(-1, ids[0, 193:, None])
    return -float(each.mean())


def test_a_policy_with_a_second_pass_can_be_searched_with(tmp_path: Path) -> None:
    settings = parse(CALIBRATIONS, "baklava(policy='hive(chunk=64)', searched=1, pieces=2)")
    assert isinstance(settings, BaklavaCalibration)
    few = {name: getattr(FEW, name) for name in ("tokens", "scored", "low_fracs", "low_scales")}
    method = BaklavaCalibration(pieces=2, searched=1, policy=settings.policy, **few)
    assert learn(tmp_path / "p", method).tensors["losses"].isfinite().all()


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn(tmp_path / "whole").tensors
    real, done = Kept.put, []

    def put(self: Kept, key: str, tensors: dict[str, Tensor]) -> None:
        real(self, key, tensors)
        done.append(key)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "put", put)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "p")
    assert partial_file(tmp_path / "p").exists()
    again = learn(tmp_path / "p").tensors
    assert done == ["importance 0", "importance 1", "losses 2"], "nothing is done twice"
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_pictures_show_heads_and_the_plan(tmp_path: Path) -> None:
    made = learn(tmp_path / "p")
    heads, plan = BaklavaCalibration.pictures(made)
    assert heads.columns == plan.columns == ("KV head 0", "KV head 1")
    assert torch.equal(heads.values, Baklava().importance(made))
    assert plan.values.mean() == pytest.approx(1.0)
    assert "uniform" in plan.meaning


def test_one_piece_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learns from one piece of 256 tokens and searches on an"):
        calibrate(tiny_llama(), tokenizer(), FEW, TEXTS[:1], "one", tmp_path / "p")


def test_predictions_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="numbers that are not finite; calibrate it in another"):
        learn(tmp_path / "p", model=broken)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("scored=1280", "scored must be less than the 1280 tokens of a piece"),
        ("policy=nothing", "unknown policy 'nothing'"),
        ("policy='h2o@0.4'", "cannot read|budget"),
        ("policy=full", "takes no budget"),
        ("budget=0.0", "budget must be between 0.01 and 0.99"),
        ("low_fracs=[]", "low_fracs must be"),
    ],
)
def test_settings_that_cannot_work(settings: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(CALIBRATIONS, f"baklava({settings})")
