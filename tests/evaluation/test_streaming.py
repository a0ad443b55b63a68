"""Streaming perplexity and fidelity against plain forward passes."""

from __future__ import annotations

import torch

from kvhive.cache.hive_cache import HiveCache
from kvhive.evaluation.streaming import compare, compare_bare, in_pieces, stream
from kvhive.evaluation.types import Item, Probe
from kvhive.recipe import Recipe
from tests.cli import tiny

IDS = tuple((7 * i + i * i // 3) % 250 for i in range(140))


def recipes(*texts: str) -> list[Recipe]:
    return [Recipe.parse(text) for text in texts]


@torch.no_grad()
def true_logprobs(ids: tuple[int, ...]) -> torch.Tensor:
    """Of ids[1:], by one pass of the plain model."""
    logits = tiny.model().double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logits[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_the_full_cache_streams_as_one_pass(tested):
    expected = true_logprobs(IDS)
    for block, skip in ((1, 1), (16, 32), (7, 20), (200, 5)):
        (full,) = stream(tested.only_full(), IDS, block, skip)
        (outcome,) = full.outcomes
        assert len(outcome.logprobs) == len(IDS) - skip
        got = torch.tensor(outcome.logprobs, dtype=torch.float64)
        assert torch.allclose(got, expected[skip - 1 :], atol=1e-4)


@torch.no_grad()
def test_every_policy_acts_after_each_block(tested, network):
    names = ("h2o@40", "streaming_llm@30")
    shown = stream(tested.with_recipes(recipes(*names)), IDS, 8, 64)
    for name, one in zip(names, shown, strict=True):
        cache, logprobs = HiveCache.for_model(network, name), []
        for start in range(0, len(IDS) - 1, 8):
            step = IDS[start : start + 8]
            logits = network(torch.tensor([step]), past_key_values=cache).logits[0]
            assert int(cache.report().kept.max()) <= int(name.partition("@")[2])
            after = IDS[start + 1 : start + 1 + len(step)]
            logprobs += [float(logits[i].log_softmax(-1)[t]) for i, t in enumerate(after)]
        got = torch.tensor(one.outcomes[0].logprobs)
        assert torch.allclose(got, torch.tensor(logprobs[63:]), atol=1e-4)


def test_the_floor_reads_each_piece_alone(tested):
    floor = in_pieces(tested.only_full(), IDS, 32, 64)
    pieces = [IDS[start : start + 32] for start in (64, 96, 128)]
    expected = torch.cat([true_logprobs(piece) for piece in pieces])
    got = torch.tensor(floor.outcomes[0].logprobs, dtype=torch.float64)
    assert torch.allclose(got, expected, atol=1e-4)


def item() -> Item:
    return Item("i", IDS[:100], (), (Probe((), target=IDS[100:]),), chat=False)


def test_a_large_budget_is_perfectly_faithful(tested):
    full, large, small = compare(tested.with_recipes(recipes("full", "h2o@500", "h2o@20")), item())
    for one in (full, large):
        values = one.outcomes[0].values
        assert values["kl"] < 1e-6
        assert values["top1"] == values["top5_overlap"] == 1
        assert abs(values["delta_nll"]) < 1e-4
        assert abs(values["mass"] - 1) < 1e-5
        assert values["out_err"] < 1e-4
    values = small.outcomes[0].values
    assert values["kl"] > 0.01
    assert values["kl_median"] <= values["kl_p95"]
    assert values["mass_min"] <= values["mass"] < 1
    assert values["out_err"] > 0.01


@torch.no_grad()
def test_kl_is_that_of_the_distributions(tested, network):
    (_, got) = compare(tested.with_recipes(recipes("full", "h2o@30")), item())
    plain = tiny.model().double()
    truth = plain(torch.tensor([IDS])).logits[0, 100:-1].log_softmax(-1)
    cache, rows = HiveCache.for_model(network, "h2o@30"), []
    network(torch.tensor([IDS[:100]]), past_key_values=cache)
    for token in IDS[100:-1]:
        rows.append(network(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    ours = torch.stack(rows).log_softmax(-1)
    kl = (truth.exp() * (truth - ours)).sum(-1)
    values = got.outcomes[0].values
    assert abs(values["kl"] - float(kl.mean())) < 1e-3
    agreed = float((truth.argmax(-1) == ours.argmax(-1)).double().mean())
    assert abs(values["top1"] - agreed) < 1e-6
    tokens = torch.tensor(IDS[101:])[:, None]
    delta = float((truth.gather(-1, tokens) - ours.gather(-1, tokens)).mean())
    assert abs(values["delta_nll"] - delta) < 1e-3


def test_the_floor_of_fidelity_never_saw_the_text(tested):
    values = compare_bare(tested.only_full(), item()).outcomes[0].values
    assert values["kl"] > 0.01
    assert "mass" not in values
