"""Blocks are given back, taken again and shared, and none is lost or written by two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kvhive.lengths import Event, Lengths
from kvhive.recipe import Recipe
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvhive_vllm.manager import HiveManager, HiveSpec

SIZE, POOL = 16, 24


def made() -> HiveManager:
    spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)
    pool = BlockPool(POOL, enable_caching=True, hash_block_size=SIZE)
    return HiveManager(
        HiveSpec.of(spec, 1),
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=SIZE,
    )


class Blocks(RuleBasedStateMachine):
    """Requests that read prompts, share their blocks, decode, are cut down and end."""

    def __init__(self) -> None:
        super().__init__()
        self.manager, self.count = made(), 0
        self.seen: dict[str, int] = {}
        self.recipe = Recipe.parse("window(slack=3)@40")

    @property
    def pool(self) -> BlockPool:
        return self.manager.block_pool

    def _needed(self, name: str, tokens: int) -> int:
        return self.manager.get_num_blocks_to_allocate(name, tokens, [], 0, 0, tokens)

    def _grow(self, name: str, tokens: int) -> bool:
        if self._needed(name, tokens) > self.pool.get_num_free_blocks():
            return False
        self.manager.allocate_new_blocks(name, tokens, tokens)
        self.manager.num_cached_block.setdefault(name, 0)
        self.seen[name] = tokens
        return True

    @rule(tokens=st.integers(1, 150), shares=st.booleans(), data=st.data())
    def read_a_prompt(self, tokens: int, shares: bool, data: Any) -> None:
        name = f"r{self.count}"
        self.count += 1
        if shares and self.seen:
            other = data.draw(st.sampled_from(sorted(self.seen)))
            blocks = self.manager.req_to_blocks[other][: tokens // SIZE]
            self.pool.touch(blocks)
            self.manager.req_to_blocks[name].extend(blocks)
        if not self._grow(name, tokens):
            self.pool.free_blocks(reversed(self.manager.pop_blocks_for_free(name)))

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def decode_and_cut(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.seen)))
        manager = self.manager
        lengths = manager.lengths.setdefault(name, Lengths(self.recipe))
        before = lengths.dropped
        event = lengths.step(self.seen[name])
        if event is not None:
            held = list(manager.req_to_blocks[name])
            shared = {block.block_id for block in held if block.ref_cnt > 1}
            cut = manager.shrink(name, event, lengths.dropped - before)
            if cut is None:
                return self.end(name)
            assert not shared & set(cut.blocks)
            assert len(cut.blocks) == -(-event.kept // SIZE)
        if not self._grow(name, self.seen[name] + 1):
            self.end(name)
        return None

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def end_one(self, data: Any) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.seen))))

    def end(self, name: str) -> None:
        self.seen.pop(name)
        self.pool.free_blocks(reversed(self.manager.pop_blocks_for_free(name)))

    @invariant()
    def blocks_add_up(self) -> None:
        """Every block is free, or held by as many requests as it counts."""
        holders: dict[int, int] = {}
        for name, tokens in self.seen.items():
            blocks = self.manager.req_to_blocks[name]
            held = tokens - self.manager.dropped(name)
            assert len(blocks) == -(-held // SIZE)
            for block in blocks:
                holders[block.block_id] = holders.get(block.block_id, 0) + 1
        assert all(self.pool.blocks[i].ref_cnt == n for i, n in holders.items())
        assert self.pool.get_num_free_blocks() == POOL - 1 - len(holders)


Blocks.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
TestBlocks = Blocks.TestCase


def test_shrinking_counts_what_it_frees() -> None:
    manager = made()
    manager.allocate_new_blocks("a", 100, 100)
    lengths = manager.lengths["a"] = Lengths(Recipe.parse("window@40"))
    event = lengths.step(100)
    assert event == Event(40, 40)
    ids = [block.block_id for block in manager.req_to_blocks["a"]]
    cut = manager.shrink("a", event, 60)
    assert cut is not None
    assert cut.blocks == ids[:3]
    assert (manager.tokens_dropped, manager.blocks_freed) == (60, 4)
    assert manager.dropped("a") == 60


@pytest.mark.parametrize(("read_anew", "found"), [(1, 5), (17, 4), (32, 4), (33, 3), (-1, 0)])
def test_hits_end_where_queries_must_vote(read_anew: int, found: int) -> None:
    """Six blocks are in the prefix cache; a prompt of 96 tokens asks for all but its last."""
    manager = made()
    blocks = manager.block_pool.get_new_blocks(6)
    hashes = [BlockHash(bytes([place])) for place in range(6)]
    for block, name in zip(blocks, hashes, strict=True):
        manager.block_pool._insert_block_hash(make_block_hash_with_group_id(name, 0), block, SIZE)
    hit, tokens = HiveManager.find_longest_cache_hit(
        hashes,
        95,
        kv_cache_group_ids=[0],
        block_pool=manager.block_pool,
        kv_cache_spec=HiveSpec.of(manager.kv_cache_spec, read_anew),
        drop_eagle_block=False,
        alignment_tokens=SIZE,
    )
    assert len(hit[0]) == found
    assert tokens == found * SIZE
