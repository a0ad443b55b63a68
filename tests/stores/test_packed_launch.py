"""What a GPU runs over packed stores, in Triton's interpreter, against what a CPU does."""

from __future__ import annotations

import pytest
import torch

from kvhive.kernels import Ask, Needs, dispatch
from kvhive.plan import Plan
from kvhive.step import Step
from kvhive.stores import LayerFacts
from kvhive.stores._packed import PackedKind
from kvhive.stores.kivi import Kivi
from kvhive.stores.rotated import Rotated
from kvhive.stores.tiers import Tiers

TOKENS, WIDTH = 70, 64
KINDS = (Kivi(group=16, residual=16, sink=2), Rotated(residual=8, sink=2))
TIERED = Tiers(share=0.1, residual=8, sink=2)
VOTES = Needs(columns="sum", last_rows=2)


def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a step, of two KV heads."""
    return torch.randn(1, 2, count, WIDTH), torch.randn(1, 2, count, WIDTH)


@pytest.mark.parametrize(
    ("kind", "needs", "q"),
    [*((kind, VOTES, 3) for kind in KINDS), (TIERED, Needs(), 1)],
    ids=lambda part: getattr(part, "name", ""),
)
@pytest.mark.parametrize("uneven", [False, True])
def test_one_launch_serves_all_parts(
    kind: PackedKind, needs: Needs, q: int, uneven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(1)
    store = kind.new(LayerFacts(), ())
    store.append(*tokens(TOKENS), TOKENS)
    if uneven:
        keep = torch.rand(1, 2, TOKENS) > torch.tensor([0.3, 0.6])[None, :, None]
        store.compact(Plan.keeping(keep, best=keep & (torch.rand(keep.shape) > 0.5)), TOKENS)
    store.pack()
    store.append(*tokens(q), TOKENS + q)
    query, ask = torch.randn(1, 4, q, WIDTH), Ask(Step.plain(TOKENS, q), 0.125, needs)
    expected, reported = store.attend(query, ask)
    monkeypatch.setattr(dispatch, "LAUNCHED", ("cpu",))
    assert store._launches(query, ask)
    out, seen = store.attend(query, ask)
    assert torch.allclose(out, expected, atol=1e-5)
    if needs.attention:
        assert seen.columns is not None
        assert reported.columns is not None
        assert seen.rows is not None
        assert reported.rows is not None
        assert torch.allclose(seen.columns, reported.columns, atol=1e-5)
        assert torch.allclose(seen.rows.all(), reported.rows.all(), atol=1e-5)
