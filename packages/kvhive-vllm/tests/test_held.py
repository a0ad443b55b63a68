"""What is evicted in place is what would have been written anew, in another order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvhive.plan import Plan
from kvhive.recipe import Recipe
from torch import Tensor

from kvhive_vllm.cpu_pages import CpuPages
from kvhive_vllm.gpu_pages import GpuPages
from kvhive_vllm.groups import Group
from kvhive_vllm.held import HeldPages, closed_up
from kvhive_vllm.pages import Pages
from tests.test_gpu_pages import writer
from tests.test_pages import written_by

LAYERS, HEADS, WIDTH, BLOCK = 3, 2, 32, 32


def on_cpu() -> Pages:
    cache = torch.randn(9, HEADS, BLOCK, 2 * WIDTH).to(torch.bfloat16)
    return CpuPages(cache, BLOCK, written_by("vec", cache))


def on_gpu() -> Pages:
    """Pages of half a block."""
    cache = torch.zeros(18, HEADS, BLOCK // 2, 2 * WIDTH)
    return GpuPages(cache, WIDTH, BLOCK, writer(cache))


@dataclass
class Truth:
    """What slots hold, kept apart."""

    keys: Tensor
    values: Tensor

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)

    def keep(self, plan: Plan) -> None:
        index = plan.index[..., None].expand(-1, -1, -1, WIDTH)
        self.keys, self.values = self.keys.gather(2, index), self.values.gather(2, index)


def any_plan(held: int, kept: int) -> Plan:
    chosen = torch.rand(LAYERS, HEADS, held).topk(kept).indices
    return Plan.keeping(torch.zeros(LAYERS, HEADS, held, dtype=torch.bool).scatter(2, chosen, True))


@pytest.mark.parametrize("kind", [on_cpu, on_gpu])
@pytest.mark.parametrize("seed", range(4))
def test_slots_are_read_in_their_order_after_any_evictions(kind, seed: int) -> None:  # type: ignore[no-untyped-def]
    """Some in place, some not, with new tokens between them."""
    torch.manual_seed(seed)
    layers = [kind() for _ in range(LAYERS)]
    group = Group(Recipe.parse("window@9").policy, 5, layers, 1.0, None, None)
    blocks, dtype = torch.tensor([7, 2, 5, 0]), layers[0].keys(torch.tensor([0]), 1).dtype
    truth = Truth(*torch.randn(2, LAYERS, HEADS, 0, WIDTH).to(dtype))
    places: Tensor | None = None
    held, new = 0, 90
    for turn in range(7):
        fresh = torch.randn(2, LAYERS, HEADS, new, WIDTH).to(dtype)
        for place, pages in enumerate(layers):
            _write_behind(pages, blocks, held, fresh[:, place])
        truth.append(*fresh)
        held += new
        shown = HeldPages(group, blocks, held, places)
        for place in range(LAYERS):
            assert torch.equal(shown.keys_of(5 + place), truth.keys[place])
        kept = held - 20
        plan = any_plan(held, kept)
        if turn == 4:
            assert torch.equal(shown.values, truth.values)
        if turn == 5:
            blocks, places = blocks.flip(0), shown.move(blocks.flip(0), plan)
        else:
            places = shown.close_up(plan)
        truth.keep(plan)
        held, new = kept, 20 + 7 * turn % 11
    shown = HeldPages(group, blocks, held, places)
    keys, values = shown.whole().view()
    assert torch.equal(shown.keys, keys)
    assert torch.equal(keys, truth.keys)
    assert torch.equal(values, truth.values)


def _write_behind(pages: Pages, blocks: Tensor, held: int, fresh: Tensor) -> None:
    """As the engine does: what is there stays where it is."""
    keys, values = pages.both(blocks, held)
    pages.write(blocks, torch.cat([keys, fresh[0]], 1), torch.cat([values, fresh[1]], 1))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.data())
def test_the_first_places_are_filled(
    layers: int, heads: int, held: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, held))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    places = torch.rand(layers, heads, held).topk(kept).indices
    of_layer, of_head, source, target, after = closed_up(places, held)
    lies = torch.arange(held).expand(layers, heads, held).clone()  # what lies where
    lies[of_layer, of_head, target] = lies[of_layer, of_head, source]
    assert torch.equal(lies.gather(2, after), places)
    assert (after.sort().values == torch.arange(kept)).all()
    assert (of_layer.diff() >= 0).all()
    assert (target < kept).all()
    assert (source >= kept).all()
    assert len(source) <= layers * heads * min(kept, held - kept)
