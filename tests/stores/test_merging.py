"""Merging slots: plain means of what joins, everything else untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvhive.plan import Plan
from kvhive.stores import LayerFacts
from kvhive.stores._merging import fold
from kvhive.stores.dense import Dense


def random_targets(batch: int, heads: int, n: int, seed: int) -> Tensor:
    """int64: about half of the slots join one of the others that stay; -1 for the rest."""
    source = torch.Generator().manual_seed(seed)
    stays = torch.rand(batch, heads, n, generator=source) < 0.5
    stays[..., 0] = True
    wish = torch.rand(batch, heads, n, n, generator=source)
    target = wish.masked_fill(~stays[:, :, None, :], -1.0).argmax(-1)
    joins = ~stays & (torch.rand(batch, heads, n, generator=source) < 0.8)
    return target.masked_fill(~joins, -1)


def slow_fold(tensor: Tensor, into: Tensor) -> Tensor:
    """Slot by slot, in float64."""
    out = tensor.clone()
    for row in range(tensor.shape[0]):
        for head in range(tensor.shape[1]):
            for slot in range(tensor.shape[2]):
                joining = (into[row, head] == slot).nonzero().flatten().tolist()
                if joining:
                    members = tensor[row, head, [slot, *joining]].double()
                    out[row, head, slot] = members.mean(0).to(tensor.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "heads", "n", "width"), [(1, 1, 1, 3), (2, 3, 17, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_fold_is_the_mean_of_each_group(
    batch: int, heads: int, n: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    tensor = torch.randn(batch, heads, n, width, generator=torch.Generator().manual_seed(seed))
    tensor, into = tensor.to(dtype), random_targets(batch, heads, n, seed)
    before, folded = tensor.clone(), fold(tensor, into)
    torch.testing.assert_close(folded, slow_fold(tensor, into), atol=1e-6, rtol=1e-6)
    assert torch.equal(tensor, before), "the original is left alone"
    slots = torch.arange(n)
    untouched = ~(into[..., None] == slots).any(2)
    assert torch.equal(folded[untouched], tensor[untouched])


def test_many_small_ones_do_not_vanish_beside_a_large_one() -> None:
    """Sums are float32 whatever the dtype: in bfloat16, 256 + 1 is 256."""
    tensor = torch.ones(1, 1, 257, 1, dtype=torch.bfloat16)
    tensor[0, 0, 0] = 256.0
    into = torch.zeros(1, 1, 257, dtype=torch.int64)
    into[0, 0, 0] = -1
    assert float(fold(tensor, into)[0, 0, 0]) == pytest.approx(512 / 257, rel=4e-3)


def test_the_dense_store_folds_keys_and_values_of_slots_in_use() -> None:
    store = Dense().new(LayerFacts(), [])
    keys, values = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 6)
    original = keys.clone(), values.clone()
    store.append(keys, values, room=20)
    into = random_targets(2, 3, 9, seed=5)
    keep = torch.zeros(2, 3, 9, dtype=torch.bool)
    keep[..., [0, 4, 8]] = True
    store.compact(Plan.keeping(keep, into), room=7)
    assert torch.equal(keys, original[0]), "what the model holds is left alone"
    for held, written in zip((store.keys, store.values), original, strict=True):
        torch.testing.assert_close(held, slow_fold(written, into)[:, :, [0, 4, 8]])
    assert (store.length, store.room) == (3, 7)
