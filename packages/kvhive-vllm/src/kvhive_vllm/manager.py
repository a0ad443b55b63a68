"""Blocks of compressed requests: as many as their tokens need that are held."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kvhive.lengths import Event, Lengths
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvhive_vllm.orders import Cut


@dataclass(frozen=True, kw_only=True)
class HiveSpec(FullAttentionSpec):
    """Full attention whose requests may hold fewer tokens than they have read.

    read_anew: how many of a prompt's last tokens must be computed even where all of them are found
    in the prefix cache, because their queries vote; -1: all.
    """

    read_anew: int = 1

    @classmethod
    def of(cls, spec: FullAttentionSpec, read_anew: int) -> HiveSpec:
        """The same, for layers whose tokens may go."""
        held = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(**held | {"read_anew": read_anew})

    @classmethod
    def merge(cls, specs: list[HiveSpec]) -> HiveSpec:
        """One spec for a group of layers."""
        merged = FullAttentionSpec.merge(list(specs))
        return cls.of(merged, specs[0].read_anew)


class HiveManager(FullAttentionManager):
    """Counts what a request holds, where vLLM counts what it has read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lengths: dict[str, Lengths] = {}  # of requests that have read their prompt
        self.tokens_dropped = self.blocks_freed = 0  # since the engine started

    def dropped(self, request_id: str) -> int:
        """Tokens that were read and are held no more."""
        lengths = self.lengths.get(request_id)
        return 0 if lengths is None else lengths.dropped

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Blocks that are missing for the tokens held."""
        held = num_tokens - self.dropped(request_id)
        return int(super().get_num_blocks_to_allocate(request_id, held, *args, **kwargs))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Take them from the pool."""
        gone = self.dropped(request_id)
        return list(
            super().allocate_new_blocks(request_id, num_tokens - gone, num_tokens_main_model - gone)
        )

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Blocks whose tokens are not those of the prompt in order are shared with nobody."""
        if not self.dropped(request.request_id):
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Blocks of the prefix cache that serve, up to the tokens whose queries must vote."""
        spec = kwargs["kv_cache_spec"]
        keep_off = max_length if spec.read_anew < 0 else spec.read_anew - 1
        return super().find_longest_cache_hit(
            block_hashes, max(0, max_length - keep_off), *args, **kwargs
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """All blocks of a request that ends or is preempted; what it dropped is forgotten."""
        self.lengths.pop(request_id, None)
        return list(super().pop_blocks_for_free(request_id))

    def shrink(self, request_id: str, event: Event, dropped: int) -> Cut | None:
        """Give blocks back that `event.kept` tokens do not need; `dropped` tokens go.

        Blocks that others share, or may find in the prefix cache, are never written: then the
        tokens that stay move to blocks taken from the pool, and None is returned where it has too
        few.
        """
        held = self.req_to_blocks[request_id]
        size = cdiv(event.kept, self.block_size)
        if any(block.ref_cnt > 1 or block.block_hash is not None for block in held[:size]):
            blocks = self._moved(held, size)
            if blocks is None:
                return None
        else:
            blocks = held[:size]
            self.block_pool.free_blocks(reversed(held[size:]))
        self.tokens_dropped += dropped
        self.blocks_freed += len(held) - size
        self.req_to_blocks[request_id] = blocks
        self.num_cached_block[request_id] = 0
        return Cut(event.target, event.kept, [block.block_id for block in blocks])

    def _moved(self, held: list[KVCacheBlock], size: int) -> list[KVCacheBlock] | None:
        """Other blocks. Those held are given back first, and may come back: workers read all that
        stays before they write any of it.
        """
        ours = sum(block.ref_cnt == 1 for block in held)
        if self.block_pool.get_num_free_blocks() + ours < size:
            return None
        self.block_pool.free_blocks(reversed(held))
        return list(self.block_pool.get_new_blocks(size))


KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(HiveSpec, HiveManager, FullAttentionSpec)
