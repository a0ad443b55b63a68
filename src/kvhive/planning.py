"""What fits a memory: weights, the cache of each recipe, the largest batch and the longest context.

Worked out from a model in outline; nothing is loaded and nothing runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvhive.cache.footprint import Footprint, Workload, footprint
from kvhive.model.outline import Outline
from kvhive.recipe import Recipe

MOST_ROWS, MOST_TOKENS = 1 << 16, 1 << 24  # beyond these nobody asks


@dataclass(frozen=True)
class Planned:
    """One recipe for one workload.

    cache: bytes of the cache after reading, between two steps, at most. reading: bytes of the cache
    while the prompt is read, at most; what the model itself works with comes on top. fits: whether
    the weights and `reading` fit the memory, None where no memory was named. largest_batch: rows
    that fit at this context; longest_context: tokens that fit at this batch, of those the model was
    trained on (or of this context, if that is longer); 0: not even one, None: no memory was named.
    """

    recipe: Recipe
    cache: int
    reading: int
    fits: bool | None
    largest_batch: int | None
    longest_context: int | None


def plan(outline: Outline, recipe: Recipe, work: Workload, memory: int | None = None) -> Planned:
    """How much a recipe needs for a workload whose tokens are known, and what fits `memory` bytes.

    Raises `ValueError` for a workload without tokens.
    """
    if work.tokens is None:
        raise ValueError("plan: say how many tokens will be read")
    needed = footprint(recipe, outline, work)
    reading = needed.between_steps if needed.while_reading is None else needed.while_reading
    if memory is None:
        return Planned(recipe, needed.between_steps, reading, None, None, None)

    def held(rows: int, tokens: int) -> int:
        cache: Footprint = footprint(recipe, outline, replace(work, batch=rows, tokens=tokens))
        return outline.weight_bytes + max(cache.between_steps, cache.while_reading or 0)

    tokens = work.tokens
    longest = max(tokens, outline.trained_length or MOST_TOKENS)
    return Planned(
        recipe,
        needed.between_steps,
        reading,
        outline.weight_bytes + reading <= memory,
        _largest(lambda rows: held(rows, tokens), memory, MOST_ROWS),
        _largest(lambda length: held(work.batch, length), memory, longest),
    )


def _largest(needed: Callable[[int], int], memory: int, most: int) -> int:
    """The largest number from 1 to `most` for which what is needed fits; 0: none does."""
    return bisect_right(range(1, most + 1), memory, key=needed)
