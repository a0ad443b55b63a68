"""The ragged store: what it holds is what the heads keep, and attention reads no more."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvhive.kernels import Ask, Needs, Observed, dispatch, reference, triton_tiles
from kvhive.memory import SMALLEST
from kvhive.plan import Plan
from kvhive.step import Step
from kvhive.stores._ragged import RaggedStore
from kvhive.stores.dense import DenseStore

WIDTH, VALUES = 8, 6
EVERYTHING = [
    Needs(),
    Needs(columns="sum"),
    Needs(columns="square", fold=False, decay=0.9),
    Needs(last_rows=3),
    Needs(columns="sum", last_rows=1, queries=True, keys=True),
]


def tokens(batch: int, heads: int, number: int) -> tuple[Tensor, Tensor]:
    """Keys and values of new tokens."""
    size = batch, heads, number
    return torch.randn(*size, WIDTH), torch.randn(*size, VALUES)


def ragged(counts: Sequence[Sequence[int]], spare: int = 3) -> tuple[RaggedStore, Tensor]:
    """A store whose heads hold so many tokens, and which of the padded slots they are."""
    tally = torch.tensor(counts)
    length = int(tally.max()) + 5
    dense = DenseStore()
    dense.append(*tokens(*tally.shape, length), length)
    keep = torch.zeros(*tally.shape, length, dtype=torch.bool)
    for row, heads in enumerate(counts):
        for head, count in enumerate(heads):
            keep[row, head, torch.randperm(length)[:count]] = True
    plan = Plan.keeping(keep)
    keys, values = dense.view()
    store = dense.compact(plan, plan.longest + spare)
    assert isinstance(store, RaggedStore)
    valid = torch.arange(plan.longest) >= plan.longest - tally[..., None]
    for held, was in zip(store.view(), (keys, values), strict=True):
        assert torch.equal(held[valid], was[keep])
        assert not held[~valid].any()
    return store, valid


def same(seen: Observed, expected: Observed, valid: Tensor) -> None:
    """What is said of empty slots means nothing, but is no number either."""
    for ours, theirs in ((seen.columns, expected.columns), (_rows(seen), _rows(expected))):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            shape = [*ours.shape[:2], *[1] * (ours.dim() - 3), ours.shape[-1]]
            shown = valid.repeat_interleave(ours.shape[1] // valid.shape[1], 1).view(shape)
            assert torch.allclose(ours * shown, theirs * shown, atol=1e-5)
            assert ours.isfinite().all()


def _rows(seen: Observed) -> Tensor | None:
    return None if seen.rows is None else seen.rows.all()


COUNTS = st.lists(st.integers(0, 40), min_size=6, max_size=6)


@given(COUNTS, st.integers(1, 9), st.integers(1, 4), st.sampled_from(EVERYTHING), st.booleans())
def test_attention_is_that_of_the_padded_heads(
    counts: list[int], q: int, group: int, needs: Needs, padded: bool
) -> None:
    counts[0] = max(counts[0], 2 * max(counts[1], 3))
    store, valid = ragged([counts[:3], counts[3:]])
    store.append(*tokens(2, 3, q), store.length + q)
    valid = torch.cat([valid, torch.ones(2, 3, q, dtype=torch.bool)], 2)
    step = Step.plain(90, q)
    if padded:
        real = torch.ones(2, q, dtype=torch.bool)
        real[1, : q // 2] = False
        valid[..., -q:] &= real[:, None]
        step = Step("prefill", q, torch.zeros(2, q, dtype=torch.int64), 90, real.sum(1), real)
    query = torch.randn(2, 3 * group, q, WIDTH)
    keys, values = store.view()
    ask = Ask(step, 0.3, needs, valid)
    expected, reported = reference.attend(query, keys, values, ask)
    unknown = Ask(step, 0.3, needs, valid if padded else None)
    out, seen = store.attend(query, unknown)
    assert torch.allclose(out.double(), expected.double(), atol=1e-5)
    same(seen, reported, valid)
    same(store.report(query, unknown), reported, valid)


@pytest.mark.skipif(not triton_tiles.available(), reason="Triton is not installed")
@pytest.mark.parametrize("needs", EVERYTHING)
@pytest.mark.parametrize("q", [1, 3])
def test_one_launch_serves_all_rows(needs: Needs, q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, in Triton's interpreter, against the blocks."""
    store, valid = ragged([[21, 3, 0], [1, 9, 40]])
    store.append(*tokens(2, 3, q), store.length + q)
    valid = torch.cat([valid, torch.ones(2, 3, q, dtype=torch.bool)], 2)
    query, ask = torch.randn(2, 6, q, WIDTH), Ask(Step.plain(90, q), 0.3, needs)
    expected, reported = store.attend(query, ask)
    monkeypatch.setattr(dispatch, "LAUNCHED", ("cpu",))
    out, seen = store.attend(query, ask)
    assert torch.allclose(out, expected, atol=1e-5)
    same(seen, reported, valid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_those_of_the_tokens(dtype: torch.dtype) -> None:
    """Heads of 10 and 400 tokens cost what 10 and 400 tokens cost."""
    counts = torch.tensor([[10, 10, 400], [300, 40, 20]])
    dense = DenseStore()
    dense.append(*(torch.randn(2, 3, 900, 64, dtype=dtype) for _ in "kv"), 900)
    keep = torch.arange(900) < counts[..., None]
    store = dense.compact(Plan.keeping(keep), 400 + 7)
    exact = int(counts.sum()) * 2 * 64 * dtype.itemsize
    assert exact <= store.nbytes <= 1.1 * exact


def test_a_block_leaves_little_empty() -> None:
    store, _ = ragged([[100, 99, 96, 90], [40, 41, 12, 3]], spare=0)
    held = store.nbytes - store._layout.nbytes
    assert held <= 1.06 * (481) * (WIDTH + VALUES) * 4
    assert len(store._layout.blocks) < 8


def test_decoding_writes_in_place_and_grows_by_copying() -> None:
    store, _ = ragged([[30, 4], [9, 2]], spare=5)
    address = store._keys.data_ptr()
    expected = list(store.view())
    for step in range(12):
        new = tokens(2, 2, 1)
        store.append(*new, max(store.room, store.length + 6))
        expected = [torch.cat(pair, 2) for pair in zip(expected, new, strict=True)]
        for held, known in zip(store.view(), expected, strict=True):
            assert torch.equal(held, known)
        assert (store._keys.data_ptr() == address) == (step < 5)


def test_rows_can_be_selected_and_repeated() -> None:
    store, _ = ragged([[30, 4], [9, 2], [1, 0]])
    keys, values = store.view()
    rows = torch.tensor([2, 0, 0, 1])
    store.select_rows(rows)
    assert torch.equal(store.view()[0], keys[rows])
    assert torch.equal(store.view()[1], values[rows])
    store.select_rows(torch.tensor([0]))
    assert torch.equal(store.view()[0], keys[rows[:1]])
    store.append(*tokens(1, 2, 2), store.length + 2)
    assert torch.equal(store.view()[0][:, :, :-2], keys[rows[:1]])


def test_a_fork_is_independent() -> None:
    store, _ = ragged([[30, 4], [9, 2]])
    before = store.view()[0]
    fork = copy.deepcopy(store)
    fork.append(*tokens(2, 2, 1), fork.room)
    store.append(*tokens(2, 2, 2), store.room)
    assert torch.equal(fork.view()[0][:, :, :-1], before)
    assert torch.equal(store.view()[0][:, :, :-2], before)
    assert not torch.equal(fork.view()[0][:, :, -1], store.view()[0][:, :, -2])


def test_keys_are_replaced_where_they_lie() -> None:
    store, valid = ragged([[30, 4], [9, 2]])
    marked = valid & (torch.rand(valid.shape) < 0.5)
    keys = store.take_keys(marked)
    assert torch.equal(keys, store.view()[0][marked])
    expected = store.view()[0].clone()
    expected[marked] = 2 * keys
    store.put_keys(marked, 2 * keys)
    assert torch.equal(store.view()[0], expected)


def test_an_eviction_gives_memory_back() -> None:
    store, valid = ragged([[9000, 400], [900, 20]])
    assert store._keys.untyped_storage().nbytes() > SMALLEST
    before = store.nbytes
    plan = Plan.keeping(valid & (torch.rand(valid.shape) < 0.1))
    held = store.compact(plan, plan.longest + 3)
    assert held.nbytes < before / 8
