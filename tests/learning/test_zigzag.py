"""What ZigZagKV learns, against slow and obvious counts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvhive.learning.kept import Kept
from kvhive.learning.watching import Attention, watch
from kvhive.learning.zigzag import ZigZag, mba, window_attention
from tests.support import random_ids, tiny_llama


@given(
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    n=st.integers(2, 40),
    window=st.integers(1, 39),
    seed=st.integers(0, 99),
)
def test_window_attention_is_a_softmax_over_what_is_seen(
    heads: int, group: int, n: int, window: int, seed: int
) -> None:
    window = min(window, n - 1)
    source = torch.Generator().manual_seed(seed)
    queries = torch.randn(heads * group, n, 4, generator=source, dtype=torch.float64) * 2
    keys = torch.randn(heads, n, 4, generator=source, dtype=torch.float64)
    ours = window_attention(queries, keys, window, 0.7)
    for head in range(heads * group):
        total = torch.zeros(n - window, dtype=torch.float64)
        for query in range(n - window, n):
            logits = 0.7 * (keys[head // group, : query + 1] @ queries[head, query])
            total += logits.softmax(0)[: n - window]
        assert torch.allclose(ours[head], total / window, atol=1e-12)


@given(
    row=st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any),
    tau=st.sampled_from([0.5, 0.75, 0.9, 1.0]),
)
def test_mba_counts_from_the_largest(row: list[int], tau: float) -> None:
    count, held = 0, 0
    for value in sorted(row, reverse=True):
        if held >= tau * sum(row):
            break
        held, count = held + value, count + 1
    assert mba(torch.tensor([row]).float(), tau).tolist() == [count]


def test_mba_of_one_token_and_of_all_alike() -> None:
    assert mba(torch.eye(9)[3], 0.9).item() == 1
    for m in range(1, 60):
        for tau in (0.3, 0.8, 0.9, 0.95):
            assert mba(torch.full((m,), 1 / m, dtype=torch.float64), tau).item() == math.ceil(
                round(tau * m, 9)
            )


def test_what_is_watched_is_the_model_as_it_is() -> None:
    """The attention seen is that of the model's own eager attention, layer by layer."""
    model, ids = tiny_llama(), random_ids(1, 50)
    seen: list[Attention] = []
    watch(model, ids[0].tolist(), seen.append)
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions
    assert [one.layer for one in seen] == [0, 1]
    for one, weight in zip(seen, weights, strict=True):
        ours = window_attention(one.queries, one.keys, 8, one.scale)
        assert torch.allclose(ours, weight[0, :, -8:, :-8].mean(1), atol=1e-5)
        values = one.values.repeat_interleave(2, 0)
        assert torch.allclose(one.output, weight[0] @ values, atol=1e-4)


def test_shares_are_the_mean_over_pieces(tmp_path: Path) -> None:
    model = tiny_llama()
    texts = [random_ids(70, seed=seed).tolist() for seed in (1, 2)]
    method = ZigZag(window=8, tau=(0.5, 0.9))
    shares: list[float] = []
    tensors = method.learn(model, texts, Kept.open(tmp_path / "k", ""), shares.append)
    assert shares == [0.0, 0.5, 1.0]
    assert tensors["tau"].tolist() == [0.5, 0.9]
    assert tensors["share"].shape == (2, 2, 4)  # taus, layers, query heads
    assert ((tensors["share"] > 0) & (tensors["share"] <= 1)).all()
    model.set_attn_implementation("eager")
    counts = []
    for ids in texts:
        layers = model(torch.tensor([ids]), output_attentions=True).attentions
        counts.append(torch.stack([mba(w[0, :, -8:, :-8].mean(1), 0.9) / 62 for w in layers]))
    assert torch.allclose(tensors["share"][1], torch.stack(counts).mean(0), atol=1.01 / 62)


def test_a_window_beyond_a_piece_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be below the 64 tokens of a piece, got 64"):
        ZigZag(window=64, tokens=64)
