"""Expected attention against its definition, written with whole matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.layer import HiveLayer
from kvhive.cache.speculation import crop
from kvhive.policies._parts.futures import Gaussian
from kvhive.policies.expected_attention import ExpectedAttention
from kvhive.rope import Rotation
from tests.support import random_ids, read

from ..conformance import playing

HEADS, KV_HEADS, WIDTH = 4, 2, 8
ROTATION = Rotation(torch.tensor([1.0, 0.3, 0.1, 0.03]))


def turn(position: int) -> Tensor:
    """float64 `[d, d]`: the rotation to `position`."""
    angle = position * ROTATION.frequencies
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


class Tape:
    """One row of made-up tokens: rotated keys and queries that lean to one side, and values."""

    def __init__(self, seed: int, tokens: int) -> None:
        source = torch.Generator().manual_seed(seed)
        turns = torch.stack([turn(p) for p in range(tokens)])
        lean = torch.randn(HEADS, 1, WIDTH, generator=source, dtype=torch.float64)
        plain = lean + torch.randn(HEADS, tokens, WIDTH, generator=source, dtype=torch.float64)
        keys = torch.randn(KV_HEADS, tokens, WIDTH, generator=source, dtype=torch.float64)
        self.plain = plain
        self.queries = (turns @ plain[..., None]).squeeze(-1)
        self.keys = (turns @ keys[..., None]).squeeze(-1)
        self.values = torch.randn(KV_HEADS, tokens, WIDTH, generator=source, dtype=torch.float64)

    def feed(self, layer: HiveLayer, fresh: int) -> list[list[int]]:
        """The next tokens; returns what every head holds then."""
        start, stop = layer.get_seq_length(), layer.get_seq_length() + fresh
        layer.update(*(t[None, :, start:stop].float() for t in (self.keys, self.values)))
        layer.attend(self.queries[None, :, start:stop].float(), WIDTH**-0.5)
        held: list[list[int]] = layer.slots.position[0].tolist()
        return held


def make_layer(policy: ExpectedAttention, budget: int) -> HiveLayer:
    """A layer that knows how its queries were turned."""
    layer = playing.make_layer(policy, budget)
    layer.written = ROTATION
    return layer


def expected(
    policy: ExpectedAttention, tape: Tape, queries: range, head: int, held: list[int], budget: int
) -> list[int]:
    """What KV head `head` keeps of `held`, by the definition; ties: the older.

    queries: whose statistics count.
    """
    newest = held[-1]
    ahead = range(newest + 1, newest + 1 + policy.future)
    average = torch.stack([turn(p) for p in ahead]).mean(0)
    first, rest = held[: policy.sink], held[policy.sink :]
    keys = tape.keys[head, rest]
    shares = []
    for query_head in (2 * head, 2 * head + 1):
        sample = tape.plain[query_head, [p for p in queries if p >= policy.sink]]
        logits = keys @ average @ sample.mean(0) / WIDTH**0.5
        if policy.covariance:
            spread = average @ sample.T.cov(correction=0) @ average.T
            logits = logits + torch.einsum("ni,ij,nj->n", keys, spread, keys) / WIDTH / 2
        shares.append(logits.softmax(0))
    share = torch.stack(shares).mean(0)
    score = (share + policy.epsilon) * tape.values[head, rest].norm(dim=-1)
    best = score.sort(descending=True, stable=True).indices[: budget - len(first)]
    return sorted(first + [rest[int(i)] for i in best])


POLICIES = [
    ExpectedAttention(),
    ExpectedAttention(covariance=False, future=1),
    ExpectedAttention(epsilon=0.05, sink=0),
    ExpectedAttention(queries=10, future=20, sink=2),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("prompt", [150, 60])
def test_decisions_are_those_of_the_definition(policy: ExpectedAttention, prompt: int) -> None:
    """A prompt: all its queries. Decoding: the last ones. A long chunk: all of its own."""
    tape, budget = Tape(prompt, 300), 24
    layer = make_layer(policy, budget)
    held: list[list[int]] = [[], []]
    for fresh in (prompt, *[1] * 12, 3, 40):
        start = layer.get_seq_length()
        now = tape.feed(layer, fresh)
        count = fresh if fresh >= policy.queries else policy.queries
        queries = range(max(0, layer.get_seq_length() - count), layer.get_seq_length())
        for head in range(KV_HEADS):
            there = [*held[head], *range(start, layer.get_seq_length())]
            held[head] = expected(policy, tape, queries, head, there, budget)
        assert now == held


def test_values_count_by_their_length() -> None:
    """A token that is attended to like the others but carries nothing goes first."""
    tape = Tape(1, 80)
    tape.values[:, 30] = 0
    tape.values[:, 31] *= 100
    for held in tape.feed(make_layer(ExpectedAttention(epsilon=0.01), 79), 80):
        assert 30 not in held
    for held in tape.feed(make_layer(ExpectedAttention(epsilon=0.01), 6), 80):
        assert 31 in held


def test_a_model_without_rotary_positions() -> None:
    """Queries are taken as they come."""
    tape = Tape(2, 160)
    still = make_layer(ExpectedAttention(), 30)
    still.written = None
    tape.feed(still, 160)
    state = still.slots.state
    assert torch.allclose(state["mean"][0].double(), tape.queries[:, 4:].mean(1), atol=1e-5)


def test_statistics_are_those_of_queries_before_rotation(model: PreTrainedModel) -> None:
    """On a real attention layer: its query projection, computed by hand."""
    ids = random_ids(1, 150, seed=2)
    cache = HiveCache.for_model(model, "expected_attention@40")
    read(model, cache, ids, 150)
    found = Gaussian.recall(cache.hive_layers()[0].slots.state)
    block = model.model.layers[0]  # type: ignore[union-attr]
    with torch.no_grad():
        hidden = block.input_layernorm(model.model.embed_tokens(ids))  # type: ignore[union-attr]
        queries = block.self_attn.q_proj(hidden)[0, 4:].view(146, 4, 8)
    assert found is not None
    assert found.covariance is not None
    assert torch.allclose(found.mean[0], queries.mean(0), atol=1e-4)
    assert torch.allclose(found.covariance[0, 1], queries[:, 1].T.cov(correction=0), atol=1e-3)


def test_a_prompts_statistics_are_dropped_when_decoding_begins(model: PreTrainedModel) -> None:
    """What stays is the ring of queries, and `nbytes` counts it."""
    ids = random_ids(1, 160, seed=2)
    cache = HiveCache.for_model(model, "expected_attention@40")
    read(model, cache, ids[:, :150], 150)
    slots = cache.hive_layers()[0].slots
    assert sorted(slots.state) == ["covariance", "mean", "position", "queries"]
    before = slots.nbytes
    read(model, cache, ids[:, 150:151], 1)
    assert sorted(slots.state) == ["position", "queries"]
    assert before - slots.nbytes >= 4 * (4 * 8 + 4 * 8 * 8)


def test_queries_that_were_counted_cannot_be_taken_back() -> None:
    """As with votes: only what is recorded can be cropped."""
    tape, layer = Tape(3, 60), make_layer(ExpectedAttention(), 50)
    tape.feed(layer, 30)
    assert not layer.is_croppable
    with pytest.raises(ValueError, match="voted already"):
        crop([layer], 1)
    layer.activate_past_recording()
    assert layer.is_croppable
    tape.feed(layer, 5)
    crop([layer], 2)
    assert layer.slots.state["position"].amax().item() == 32


def test_a_prompt_only_form() -> None:
    """Nothing goes while decoding."""
    tape, layer = Tape(4, 120), make_layer(ExpectedAttention(decode="none"), 20)
    tape.feed(layer, 60)
    for decoded in range(1, 30):
        tape.feed(layer, 1)
        assert layer.slots.length == 20 + decoded


def test_slack_is_larger_than_usual() -> None:
    """An eviction reads every key and multiplies it with a matrix."""
    slack = ExpectedAttention().sizing.slack
    assert [slack(budget) for budget in (8, 65, 1024, 8192)] == [1, 8, 128, 128]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sink": -1}, "expected_attention: sink must be at least 0, got -1"),
        ({"future": 0}, "expected_attention: future must be between 1 and 65536, got 0"),
        ({"epsilon": -0.5}, "expected_attention: epsilon must be at least 0, got -0.5"),
        ({"queries": 0}, "expected_attention: queries must be between 1 and 4096, got 0"),
    ],
)
def test_bad_knobs(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpectedAttention(**knobs)  # type: ignore[arg-type]
