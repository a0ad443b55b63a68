"""Texts of unequal length as the rows of one batch, all through one recipe's cache.

Rows are padded on the left, and what is fed is cut into steps counted from the right: every row is
then fed as it would be alone, and comes out as it would alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvhive.cache.hive_cache import HiveCache
from kvhive.evaluation.sequences import needs_single_steps, score
from kvhive.inference.driver import Driver, chunks
from kvhive.recipe import Recipe

AT_ONCE = 32  # tokens scored in one step where the recipe allows it: bounds the logits held


class Rows:
    """One cache for several texts, and what comes next in each.

    logits: `[rows, vocabulary]` of the next token; None before anything was fed.
    """

    def __init__(self, driver: Driver, recipe: Recipe) -> None:
        self.driver = driver
        self.cache = HiveCache.for_model(driver.model, recipe)
        self.logits: Tensor | None = None
        self._mask: Tensor | None = None  # bool [rows, seen], False for padding
        self._singly = needs_single_steps(self.cache)

    def read(self, ids: Tensor, real: Tensor, block: int | None = None) -> None:
        """Prompts `[rows, tokens]`: in one step, or in blocks after each of which rows evict.

        real: bool, as `ids`, False for padding.
        """
        for start, stop in chunks(ids.shape[1], block, from_end=True):
            self._step(ids[:, start:stop], real[:, start:stop], 1)

    def stream(self, ids: Tensor, real: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """As `read`, scoring each token under what the block before left: `[rows, tokens - 1]`."""
        return self._scored(ids, real, chunks(ids.shape[1] - 1, block, from_end=True))

    def follow(self, ids: Tensor, real: Tensor) -> None:
        """Feed tokens as decoding would: nothing is compressed anew."""
        for start, stop in chunks(ids.shape[1], self._size(), from_end=True):
            self._step(ids[:, start:stop], real[:, start:stop], 1)

    def score(self, ids: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens `[texts, tokens]`, each text to come next in one of `rows`, fed as decoding would.

        Of every token its log probability (float64) and whether it was the likeliest. The rows stay
        as they are, and may be named more than once.
        """
        if self.logits is None:
            raise ValueError("nothing was read yet, so there is no first token to score")
        index = torch.tensor(rows)
        first = score(self.logits[index.to(self.logits.device)], ids[:, 0].to(self.logits.device))
        parts = [(first[0][:, None], first[1][:, None])]
        if ids.shape[1] > 1:
            copy = self._take(index)
            steps = chunks(ids.shape[1] - 1, copy._size(), from_end=True)
            parts.append(copy._scored(ids, torch.ones_like(ids, dtype=torch.bool), steps))
        logprobs, hits = (torch.cat(kind, 1) for kind in zip(*parts, strict=True))
        return logprobs, hits

    def _take(self, index: Tensor) -> Rows:
        """A copy with these rows, in this order."""
        copy = Rows(self.driver, self.cache.recipe)
        copy.cache = self.cache.fork()
        copy.cache.batch_select_indices(index.to(self.driver.model.device))
        copy._mask = None if self._mask is None else self._mask[index]
        return copy

    def _size(self) -> int:
        """Tokens to a step that is to be like decoding."""
        if self._singly:
            return 1
        self.cache.freeze()
        return AT_ONCE

    def _scored(
        self, ids: Tensor, real: Tensor, steps: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Feed all but the last token; score each but the first."""
        logprobs = torch.zeros(len(ids), ids.shape[1] - 1, dtype=torch.float64)
        hits = torch.zeros(len(ids), ids.shape[1] - 1, dtype=torch.bool)
        for start, stop in steps:
            logits = self._step(ids[:, start:stop], real[:, start:stop], stop - start)
            wanted = ids[:, start + 1 : stop + 1].to(logits.device)
            for place in range(stop - start):
                at = start + place
                logprobs[:, at], hits[:, at] = score(logits[:, place], wanted[:, place])
        return logprobs, hits

    def _step(self, ids: Tensor, real: Tensor, keep: int) -> Tensor:
        self._mask = real if self._mask is None else torch.cat([self._mask, real], 1)
        mask = self._mask.long()
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        logits = self.driver.step(self.cache, ids, keep, mask, positions)
        self.logits = logits[:, -1]
        return logits


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids `[rows, longest]` with padding on the left, and where they are real."""
    width = max(map(len, texts))
    ids = torch.tensor([[*[0] * (width - len(text)), *text] for text in texts], dtype=torch.int64)
    lengths = torch.tensor([len(text) for text in texts])
    return ids, torch.arange(width) >= width - lengths[:, None]
