"""Recipes at work on token ids: read a prompt, go on, score given continuations, write new ones.

Everything here is teacher forcing and greedy decoding on caches; texts and tasks are not known.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.evaluation.sequences import (
    Continuation,
    Sequence,
    TokenScores,
    held,
    needs_single_steps,
    score,
)
from kvhive.inference.driver import Driver, chunks
from kvhive.inference.generation import read
from kvhive.inference.shared_prefill import reads_like_others
from kvhive.recipe import Recipe

MOST_BYTES = 2**30  # of copies of caches at work at one time


class ModelRunner:
    """A model, and recipes to run on it.

    block: None reads a prompt in one step, shared by all recipes that allow it; a number feeds it
    in blocks of so many tokens, after each of which every recipe evicts ("strict").
    hold: evict nothing after the prompt: what follows is read in one step, by all recipes together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        block: int | None = None,
        most_bytes: int = MOST_BYTES,
        hold: bool = False,
    ) -> None:
        self.driver = Driver(model)
        self.model, self.block, self.most_bytes, self.hold = model, block, most_bytes, hold

    # ---- reading --------------------------------------------------------------------------------

    def read(self, ids: abc.Sequence[int], recipes: abc.Sequence[Recipe]) -> list[Sequence]:
        """Every recipe's cache after the prompt, in the order of `recipes`."""
        caches = [HiveCache.for_model(self.model, recipe) for recipe in recipes]
        logits: list[Tensor | None] = [None] * len(caches)
        if ids and self.block is None:
            logits = list(self._read_whole(caches, ids))
        elif ids:
            for start, stop in chunks(len(ids), self.block):
                logits = list(self.step(caches, ids[start:stop])[:, -1])
        return [
            Sequence(
                str(cache.recipe), cache, last, singly=not self.hold and needs_single_steps(cache)
            )
            for cache, last in zip(caches, logits, strict=True)
        ]

    def _read_whole(self, caches: list[HiveCache], ids: abc.Sequence[int]) -> list[Tensor]:
        """In one step, shared by the caches that allow it; `[vocabulary]` of each."""
        shared = [cache for cache in caches if reads_like_others(cache)]
        if shared:
            step = torch.tensor([ids], device=self.model.device)
            together = self.driver.prefill_together(shared, step)[0, -1]
        return [together if cache in shared else read(self.model, cache, ids) for cache in caches]

    # ---- going on -------------------------------------------------------------------------------

    def follow(self, sequences: abc.Sequence[Sequence], ids: abc.Sequence[int]) -> list[Tensor]:
        """As `advance`; the logits after every token, `[tokens, vocabulary]` for each sequence."""
        parts: dict[Sequence, list[Tensor]] = {sequence: [] for sequence in sequences}
        for group, size in _by_step(sequences, len(ids) - 1):
            # The last token comes alone: storage grows as for decoding before copies are made.
            for start, stop in [*chunks(len(ids) - 1, size), (len(ids) - 1, len(ids))]:
                caches = [sequence.cache for sequence in group]
                logits = self.step(caches, ids[start:stop], stop - start)
                for sequence, part in zip(group, logits, strict=True):
                    parts[sequence].append(part)
            for sequence in group:
                sequence.logits, sequence.end = parts[sequence][-1][-1], held(sequence.cache)
        return [torch.cat(parts[sequence]) for sequence in sequences]

    def advance(self, sequences: abc.Sequence[Sequence], ids: abc.Sequence[int]) -> None:
        """Feed the same tokens to all sequences, as decoding would: nothing is compressed anew."""
        if ids:
            self.follow(sequences, ids)

    def force(
        self, sequences: abc.Sequence[Sequence], continuations: abc.Sequence[Continuation]
    ) -> list[list[TokenScores]]:
        """How likely each sequence finds each continuation, from where it stands, which it stays.

        The result is `[sequence][continuation]`. Each sequence's `end` is set to what its copy held
        at last.
        """
        results: dict[Sequence, list[TokenScores]] = {sequence: [] for sequence in sequences}
        longest = max(len(one.ids) for one in continuations)
        for group, size in _by_step(sequences, longest):
            for batch in self._batches(group, continuations, size):
                for sequence, scores in self._force_batch(batch, size):
                    results[sequence] += scores
        return [results[sequence] for sequence in sequences]

    def _batches(
        self,
        group: abc.Sequence[Sequence],
        continuations: abc.Sequence[Continuation],
        size: int,
    ) -> list[list[tuple[Sequence, list[Continuation]]]]:
        """Sequences with some continuations each, together within the memory allowed."""
        batches: list[list[tuple[Sequence, list[Continuation]]]] = []
        logits = min(size, max(len(one.ids) - one.start for one in continuations))
        logits *= 4 * int(self.model.config.get_text_config().vocab_size)
        room = 0
        for sequence in group:
            each = held(sequence.cache).nbytes + logits
            waiting = list(continuations)
            while waiting:
                if room < each:
                    batches.append([])
                    room = max(self.most_bytes, each)
                count = min(len(waiting), room // each)
                batches[-1].append((sequence, waiting[:count]))
                waiting, room = waiting[count:], room - count * each
        return batches

    def _force_batch(
        self, batch: list[tuple[Sequence, list[Continuation]]], size: int
    ) -> abc.Iterator[tuple[Sequence, list[TokenScores]]]:
        """Copies of the caches, a row for every continuation, fed `size` tokens at a time."""
        counts = [len(part) for _, part in batch]
        caches = [_copies(one.cache, rows) for (one, _), rows in zip(batch, counts, strict=True)]
        continuations = [one for _, part in batch for one in part]
        first = [one for one, part in batch for _ in part]
        logprobs, hits = self._scored(caches, counts, continuations, first, size)
        scores = [
            TokenScores(
                tuple(logprobs[row, one.start : len(one.ids)].tolist()),
                tuple(hits[row, one.start : len(one.ids)].tolist()),
            )
            for row, one in enumerate(continuations)
        ]
        for (sequence, part), cache in zip(batch, caches, strict=True):
            if logprobs.shape[1] > 1:
                sequence.end = held(cache, len(part))
            yield sequence, scores[: len(part)]
            scores = scores[len(part) :]

    def _scored(
        self,
        caches: list[HiveCache],
        counts: list[int],
        continuations: list[Continuation],
        sequences: list[Sequence],
        size: int,
    ) -> tuple[Tensor, Tensor]:
        """Of every token `[rows, longest]` its log probability (float64) and whether it was the
        likeliest, from the first that any continuation wants scored; `sequences` of each row.
        """
        start, stop = (
            min(one.start for one in continuations),
            max(len(c.ids) for c in continuations),
        )
        rows = [[*one.ids, *[one.ids[-1]] * (stop - len(one.ids))] for one in continuations]
        ids = torch.tensor(rows, device=self.model.device)
        logprobs = torch.zeros(len(rows), stop, dtype=torch.float64)
        hits = torch.zeros(len(rows), stop, dtype=torch.bool)
        if start == 0:
            first = torch.stack([one.next_logits for one in sequences])
            logprobs[:, 0], hits[:, 0] = score(first, ids[:, 0])
        for begin, end in chunks(stop - 1, size):
            wanted = end - max(begin, start - 1)
            fed = ids[:, begin:end]
            logits = self.driver.step_together(caches, counts, fed, max(1, wanted))
            for place in range(wanted):
                at = end - wanted + place + 1
                logprobs[:, at], hits[:, at] = score(logits[:, place], ids[:, at])
        return logprobs, hits

    def generate(
        self, sequences: abc.Sequence[Sequence], limit: int, done: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Greedy answers of at most `limit` tokens, `[sequence]`; the sequences go on with them.

        done: whether an answer is finished. The last token of an answer is not fed.
        """
        answers = {one: [int(one.next_logits.argmax())] for one in sequences}
        for group, _ in _by_step(sequences, 1):
            writing = list(group)
            while writing := [
                one for one in writing if len(answers[one]) < limit and not done(answers[one])
            ]:
                last = torch.tensor([answers[one][-1:] for one in writing])
                rows, caches = [1] * len(writing), [one.cache for one in writing]
                logits = self.driver.step_together(caches, rows, last)
                for sequence, after in zip(writing, logits[:, -1], strict=True):
                    sequence.logits = after
                    answers[sequence].append(int(after.argmax()))
            for sequence in group:
                sequence.end = held(sequence.cache)
        return [answers[sequence] for sequence in sequences]

    def step(
        self, caches: abc.Sequence[HiveCache], ids: abc.Sequence[int], keep: int = 1
    ) -> Tensor:
        """The same ids for all caches of one row; logits `[caches, keep, vocabulary]`."""
        rows = torch.tensor([ids]).expand(len(caches), -1)
        return self.driver.step_together(caches, [1] * len(caches), rows, keep)


def _by_step(sequences: abc.Sequence[Sequence], length: int) -> list[tuple[list[Sequence], int]]:
    """Sequences that take `length` tokens in one step, held still meanwhile, and those that take
    them singly.
    """
    at_once = [one for one in sequences if not one.singly]
    for sequence in at_once:
        sequence.cache.freeze()
    singly = [one for one in sequences if one.singly]
    return [(group, size) for group, size in ((at_once, length), (singly, 1)) if group]


def _copies(cache: HiveCache, rows: int) -> HiveCache:
    copy = cache.fork()
    if rows > 1:
        copy.batch_repeat_interleave(rows)
    return copy
