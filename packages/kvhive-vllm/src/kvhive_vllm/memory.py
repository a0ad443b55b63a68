"""Memory beside the blocks: what slots know of their tokens, and what a step works with. vLLM may
use so much less for blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvhive.lengths import policies_of
from kvhive.recipe import Recipe

from kvhive_vllm.groups import SCRATCH
from kvhive_vllm.held import SHORT
from kvhive_vllm.prompts import AT_ONCE
from kvhive_vllm.sequences import WAITING

NUMBER = 2  # bytes of a position or a place, 4 where requests may be longer than SHORT


@dataclass(frozen=True)
class Shape:
    """Of what one worker holds: `layers` of `heads` query heads and `kv_heads` KV heads, `width`
    numbers of `itemsize` bytes each; up to `requests` of at most `tokens` tokens each.
    """

    layers: int
    heads: int
    kv_heads: int
    width: int
    itemsize: int
    tokens: int
    requests: int

    @property
    def bytes_a_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.width * self.itemsize


@dataclass(frozen=True)
class Reserve:
    """What is set aside: bytes for every token in the pool, and bytes once."""

    a_token: int
    once: int

    def of(self, available: int, bytes_a_token: int) -> int:
        """Bytes to set aside of those that keys, values and this share."""
        rest = max(0, available - self.once)
        return min(available, self.once) + rest * self.a_token // (self.a_token + bytes_a_token)


def reserve(recipe: Recipe, shape: Shape, turned: bool) -> Reserve:
    """For a recipe. turned: whether positions are counted in the cache."""
    policy = policies_of(recipe, 1)[0]
    number = NUMBER if shape.tokens <= SHORT else 2 * NUMBER
    slot = number
    slot += sum(c.dtype.itemsize * math.prod(c.shape) for c in policy.columns.values())
    slot += 1 + _held_twice(recipe, shape) if turned else number
    once = 2 * min(SCRATCH, shape.bytes_a_token * shape.tokens)
    if policy.needs.votes:
        rows = 4 * shape.layers * shape.heads * shape.tokens * max(1, policy.needs.last_rows)
        once += min(AT_ONCE, rows) + shape.requests * WAITING * _queries(shape)
    if policy.needs.queries:
        once += shape.tokens * _queries(shape)
    return Reserve(slot * shape.layers * shape.kv_heads, once)


def _queries(shape: Shape) -> int:
    """Bytes of the queries of one token."""
    return shape.layers * shape.heads * shape.width * shape.itemsize


def _held_twice(recipe: Recipe, shape: Shape) -> int:
    """Bytes a slot that keys take which are held as they were written, too (`cache.positions`)."""
    held = recipe.budget.resolve(shape.tokens, 1) if recipe.budget else shape.tokens
    outlasting = min(held, recipe.policy.sizing.outlasting(held))
    twice = shape.width * shape.itemsize + 8
    return math.ceil(outlasting / max(1, held) * twice)
