"""Recipes at work on token ids: read a prompt, ask on, score given answers, write new ones.

Everything here is teacher forcing and greedy decoding on caches; texts and tasks are not known.
"""

from __future__ import annotations

import inspect
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.evaluation.types import CacheStats
from kvhive.inference.generation import read
from kvhive.inference.shared_prefill import SharedPrefill, SharedStep, can_join, reads_like_others
from kvhive.recipe import Recipe

MOST_BYTES = 2**30  # of copies of caches at work at one time


@dataclass(eq=False)
class Sequence:
    """One recipe's cache of one row, and what it says next.

    logits: `[vocabulary]` of the next token; None when nothing was read. singly: whether tokens
    that follow the prompt must come one at a time, because the recipe evicts while decoding.
    """

    recipe: str
    cache: HiveCache
    logits: Tensor | None
    singly: bool

    def __post_init__(self) -> None:
        self.end = held(self.cache)

    def fork(self) -> Sequence:
        """An independent copy."""
        return Sequence(self.recipe, self.cache.fork(), self.logits, self.singly)


@dataclass(frozen=True)
class Continuation:
    """Token ids to feed after what was read; those from `start` on are scored."""

    ids: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True)
class TokenScores:
    """Of every scored token of a script: its natural log probability, and whether it was the
    likeliest.
    """

    logprobs: tuple[float, ...]
    hits: tuple[bool, ...]


def held(cache: HiveCache, rows: int = 1) -> CacheStats:
    """What the cache holds now, per row."""
    report = cache.report()
    kept = float(report.kept.double().mean()) if report.kept.numel() else 0.0
    return CacheStats(report.tokens_seen, kept, report.nbytes // rows, report.full_nbytes // rows)


def evicts_while_decoding(recipe: Recipe) -> bool:
    """Whether single tokens after the prompt can change what is held of it."""
    sizing = recipe.policy.sizing
    return (recipe.budget is not None or sizing.alone is not None) and sizing.decoding


def needs_single_steps(cache: HiveCache) -> bool:
    """Whether tokens after the prompt must come one at a time, to leave what decoding would."""
    return evicts_while_decoding(cache.recipe) or not reads_like_others(cache)


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
        self.model, self.block, self.most_bytes, self.hold = model, block, most_bytes, hold
        self._skips_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    # ---- reading --------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, ids: abc.Sequence[int], recipes: abc.Sequence[Recipe]) -> list[Sequence]:
        """Every recipe's cache after the prompt, in the order of `recipes`."""
        caches = [HiveCache.for_model(self.model, recipe) for recipe in recipes]
        logits: dict[int, Tensor] = {}
        if ids and self.block is None:
            shared = [place for place, cache in enumerate(caches) if reads_like_others(cache)]
            if shared:
                said = self.step(SharedPrefill([caches[place] for place in shared]), [ids], keep=1)[
                    0, -1
                ]
                logits.update((place, said) for place in shared)
            for place in set(range(len(caches))) - set(shared):
                logits[place] = read(self.model, caches[place], ids)
        elif ids:
            for start in range(0, len(ids), self.block or 1):
                block = ids[start : start + (self.block or 1)]
                parts = self.sing(caches, [[block]] * len(caches), keep=1)
                logits = {place: rows[0, -1] for place, rows in enumerate(parts)}
        return [
            Sequence(
                str(recipe),
                cache,
                logits.get(place),
                singly=not self.hold and needs_single_steps(cache),
            )
            for place, (recipe, cache) in enumerate(zip(recipes, caches, strict=True))
        ]

    # ---- going on -------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, voices: abc.Sequence[Sequence], ids: abc.Sequence[int]) -> list[Tensor]:
        """As `advance`; the logits after every token, `[tokens, vocabulary]` for each voice."""
        told: list[list[Tensor]] = [[] for _ in voices]
        for group, size in _by_step(voices, len(ids) - 1):
            # The last token comes alone: storage grows as for decoding before copies are made.
            cuts = [*range(0, len(ids) - 1, max(1, size)), len(ids) - 1]
            for start, stop in zip(cuts, [*cuts[1:], len(ids)], strict=True):
                step, caches = list(ids[start:stop]), [voice.cache for voice in group]
                said = self.sing(caches, [[step]] * len(group), len(step))
                for voice, logits in zip(group, said, strict=True):
                    told[voices.index(voice)].append(logits[0])
            for voice in group:
                voice.logits, voice.end = told[voices.index(voice)][-1][-1], held(voice.cache)
        return [torch.cat(parts) for parts in told]

    def advance(self, voices: abc.Sequence[Sequence], ids: abc.Sequence[int]) -> None:
        """Feed the same tokens to all voices, as decoding would: nothing is compressed anew."""
        if ids:
            self.follow(voices, ids)

    @torch.no_grad()
    def force(
        self, voices: abc.Sequence[Sequence], scripts: abc.Sequence[Continuation]
    ) -> list[list[TokenScores]]:
        """How likely each voice finds each script, from where it stands; the voices stay as they
        are.

        The result is `[voice][script]`. Each voice's `end` is set to what its copy held at last.
        """
        results: list[list[TokenScores]] = [[] for _ in voices]
        longest = max(len(script.ids) for script in scripts)
        for group, size in _by_step(voices, longest):
            for batch in self._batches(group, scripts, size):
                self._force_batch(batch, size, results, voices)
        return results

    def _batches(
        self, group: abc.Sequence[Sequence], scripts: abc.Sequence[Continuation], size: int
    ) -> list[list[tuple[Sequence, list[Continuation]]]]:
        """Voices with some of their scripts each, together within the memory allowed."""
        batches: list[list[tuple[Sequence, list[Continuation]]]] = []
        logits = min(size, max(len(script.ids) - script.start for script in scripts))
        logits *= 4 * int(self.model.config.get_text_config().vocab_size)
        room = 0
        for voice in group:
            each = held(voice.cache).nbytes + logits
            waiting = list(scripts)
            while waiting:
                if room < each:
                    batches.append([])
                    room = max(self.most_bytes, each)
                count = min(len(waiting), room // each)
                batches[-1].append((voice, waiting[:count]))
                waiting, room = waiting[count:], room - count * each
        return batches

    def _force_batch(
        self,
        batch: list[tuple[Sequence, list[Continuation]]],
        size: int,
        results: list[list[TokenScores]],
        voices: abc.Sequence[Sequence],
    ) -> None:
        caches = [_copies(voice.cache, len(part)) for voice, part in batch]
        scripts = [script for _, part in batch for script in part]
        start, stop = min(script.start for script in scripts), max(len(s.ids) for s in scripts)
        rows = [[*script.ids, *[script.ids[-1]] * (stop - len(script.ids))] for script in scripts]
        ids = torch.tensor(rows, device=self.model.device)
        logprobs = torch.zeros(len(rows), stop, dtype=torch.float64)
        hits = torch.zeros(len(rows), stop, dtype=torch.bool)
        if start == 0:
            first = torch.stack([_said(voice) for voice, part in batch for _ in part])
            logprobs[:, 0], hits[:, 0] = score(first, ids[:, 0])
        counts = [len(part) for _, part in batch]
        for begin in range(0, stop - 1, size):
            end = min(begin + size, stop - 1)
            wanted = end - max(begin, start - 1)
            said = self._step_choir(caches, counts, ids[:, begin:end], max(1, wanted))
            for place in range(wanted):
                at = end - wanted + place + 1
                logprobs[:, at], hits[:, at] = score(said[:, place], ids[:, at])
        place = 0
        for (voice, part), cache in zip(batch, caches, strict=True):
            voice.end = held(cache, len(part)) if stop > 1 else voice.end
            for script in part:
                scored = slice(script.start, len(script.ids))
                forced = TokenScores(
                    tuple(logprobs[place, scored].tolist()), tuple(hits[place, scored].tolist())
                )
                results[voices.index(voice)].append(forced)
                place += 1

    @torch.no_grad()
    def generate(
        self, voices: abc.Sequence[Sequence], limit: int, done: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Greedy answers of at most `limit` tokens, `[voice]`; the voices go on with them.

        done: whether an answer is finished. The last token of an answer is not fed.
        """
        answers = [[int(_said(voice).argmax())] for voice in voices]
        for group, _ in _by_step(voices, 1):
            writing = list(group)
            while writing := [
                voice
                for voice in writing
                if len(answer := answers[voices.index(voice)]) < limit and not done(answer)
            ]:
                steps = [[answers[voices.index(voice)][-1:]] for voice in writing]
                said = self.sing([voice.cache for voice in writing], steps, keep=1)
                for voice, logits in zip(writing, said, strict=True):
                    voice.logits = logits[0, -1]
                    answers[voices.index(voice)].append(int(voice.logits.argmax()))
            for voice in group:
                voice.end = held(voice.cache)
        return answers

    # ---- the model ------------------------------------------------------------------------------

    def sing(
        self,
        caches: abc.Sequence[HiveCache],
        rows: abc.Sequence[abc.Sequence[abc.Sequence[int]]],
        keep: int,
    ) -> list[Tensor]:
        """One step for all caches, `rows[cache][row]`; logits of the last `keep` tokens of each."""
        counts = [len(part) for part in rows]
        flat = [row for part in rows for row in part]
        ids = torch.tensor(flat, device=self.model.device)
        return list(self._step_choir(caches, counts, ids, keep).split(counts))

    def _step_choir(
        self, caches: abc.Sequence[HiveCache], counts: abc.Sequence[int], ids: Tensor, keep: int
    ) -> Tensor:
        if len(caches) == 1:
            return self.step(caches[0], ids, keep)
        if all(can_join(cache) for cache in caches):
            return self.step(SharedStep(caches, counts), ids, keep)
        parts = zip(caches, ids.split(list(counts)), strict=True)
        return torch.cat([self.step(cache, rows, keep) for cache, rows in parts])

    @torch.no_grad()
    def step(
        self,
        cache: object,
        ids: Tensor | abc.Sequence[abc.Sequence[int]],
        keep: int,
        **padding: Tensor,
    ) -> Tensor:
        """Logits `[rows, keep, vocabulary]` of the last ids; padding: what the model takes."""
        new = torch.as_tensor(ids, device=self.model.device)
        more = {"logits_to_keep": keep} if self._skips_logits else {}
        output = self.model(input_ids=new, past_key_values=cache, use_cache=True, **more, **padding)
        logits: Tensor = output.logits[:, -keep:]
        return logits


def _by_step(voices: abc.Sequence[Sequence], length: int) -> list[tuple[list[Sequence], int]]:
    """Voices that take `length` tokens in one step, held still meanwhile, and those that take them
    singly.
    """
    at_once = [voice for voice in voices if not voice.singly]
    for voice in at_once:
        voice.cache.freeze()
    singly = [voice for voice in voices if voice.singly]
    return [(group, size) for group, size in ((at_once, length), (singly, 1)) if group]


def _copies(cache: HiveCache, rows: int) -> HiveCache:
    copy = cache.fork()
    if rows > 1:
        copy.batch_repeat_interleave(rows)
    return copy


def _said(voice: Sequence) -> Tensor:
    if voice.logits is None:
        raise ValueError("nothing was read yet, so there is no first token to score")
    return voice.logits


def score(logits: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability (float64) and arg-max agreement of `token` `[rows]` in `[rows, words]`."""
    wide = logits.float()
    chosen = wide.gather(-1, token[:, None])[:, 0] - wide.logsumexp(-1)
    return chosen.double().cpu(), (wide.argmax(-1) == token).cpu()
