"""The reconstruction pass: what a step brought is fed once more before anything of it goes.

Its tokens come behind the words that ask for a repetition, are attended to as any others, and are
taken back: nothing of them is left but what the policy observed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.speculation import truncate
from kvhive.model.chat import ChatFormat
from kvhive.model.forward import forward, padding
from kvhive.model.tokenizers import tokenizer_of
from kvhive.policies import Reconstruction

WHOLE = "\n\nRepeat the previous context exactly."
PART = "\n\nRepeat the part of the previous context exactly, starting with "
LEAD = 8  # tokens before a later chunk that say where it starts


@dataclass(frozen=True)
class Words:
    """Token ids around what is repeated: before the first chunk, before the tokens that later ones
    start with, and between these and the chunk.
    """

    whole: tuple[int, ...]
    part: tuple[int, ...]
    close: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Words | None:
        """In the model's tokens and chat form; None where its tokenizer is not known."""
        tokenizer = tokenizer_of(model)
        if tokenizer is None:
            return None
        try:
            chat = ChatFormat.of(tokenizer)
        except ValueError:  # a template that hides words of a turn
            chat = ChatFormat(tokenizer, "", "\n", "")
        close = chat.answer if tokenizer.chat_template else "\n"
        return cls(chat.ids(WHOLE), chat.ids(PART), chat.ids(close))

    @property
    def longest(self) -> int:
        """The most tokens that come before a chunk."""
        return max(len(self.whole), len(self.part) + LEAD) + len(self.close)

    def before(self, row: Sequence[int], start: int) -> tuple[int, ...]:
        """What asks for the repetition of a row from token `start` on."""
        if not start:
            return (*self.whole, *self.close)
        return (*self.part, *row[max(0, start - LEAD) : start], *self.close)


@dataclass(frozen=True, eq=False)
class Passage:
    """One chunk of the pass: what to feed, and what it repeats.

    ids: int64 `[rows, m]`, padded on the left. real: bool, as `ids`, False for padding. repeats:
    int64 `[rows, 2]`, where what is repeated begins and ends, in tokens before the end of what the
    row was given; equal where the row has no such chunk.
    """

    ids: Tensor
    real: Tensor
    repeats: Tensor


def passages(rows: Sequence[Sequence[int]], chunk: int, words: Words | None) -> list[Passage]:
    """The pass over what rows of a batch were given, `chunk` tokens of each at a time; without
    words nothing but the tokens themselves.
    """
    made = []
    for start in range(0, max(map(len, rows)), chunk):
        fed, ends = [], []
        for row in rows:
            piece = row[start : start + chunk]
            asked = words.before(row, start) if words and piece else ()
            fed.append([*asked, *piece])
            ends.append([len(row) - min(len(row), end) for end in (start, start + chunk)])
        width = max(map(len, fed))
        ids = torch.tensor([[*[0] * (width - len(one)), *one] for one in fed])
        lengths = torch.tensor([len(one) for one in fed])
        real = torch.arange(width) >= width - lengths[:, None]
        made.append(Passage(ids, real, torch.tensor(ends)))
    return made


@contextmanager
def reconstructed(
    model: PreTrainedModel, cache: HiveCache, ids: Tensor, mask: Tensor | None = None
) -> Iterator[None]:
    """Around a step that brings int64 ids `[rows, tokens]`: at its end they are repeated, and only
    then something is evicted.

    mask: `[rows, seen + tokens]`, 0 for padding. Raises `ValueError`, before the step, for a pass
    that leads beyond the length the model was trained on.
    """
    asked = _asked(cache, ids.shape[1])
    if asked is None:
        yield
        return
    check_fits(cache, _reach(cache) + ids.shape[1], ids.shape[1])
    words = Words.of(model)
    with cache.freeze(), cache.progress.reconstruction():
        yield
        rooms = [layer.store.room for layer in cache.hive_layers()]
        for passage in passages(_rows(ids, mask), asked.chunk, words):
            _repeat(model, cache, passage, mask)
    for layer, room in zip(cache.hive_layers(), rooms, strict=True):
        layer.make_room(0)
        layer.shrink(room)


def check_fits(cache: HiveCache, reach: int, step: int) -> None:
    """Raises `ValueError` when the second pass over a step of `step` tokens leads beyond the length
    the model was trained on.

    reach: positions that the model knows of when the pass begins.
    """
    asked, trained = _asked(cache, step), cache.facts.trained_length
    if asked is None or trained is None:
        return
    words = Words.of(cache.facts.loaded_model())
    total = reach + min(step, asked.chunk) + (0 if words is None else words.longest)
    if total > trained:
        raise ValueError(
            f"{cache.recipe}: reading and repeating {step:,} tokens, {asked.chunk:,} at a time, "
            f"leads to position {total:,}, and the model was trained on {trained:,}; give fewer "
            "tokens, lower chunk, or take a recipe without a second pass"
        )


def _asked(cache: HiveCache, step: int) -> Reconstruction | None:
    """The second pass over a step of so many tokens; None: there is none. Single tokens are not
    repeated, nor what comes while nothing may go: in a frozen cache, and while drafts wait.
    """
    progress = cache.progress
    held_back = progress.frozen or progress.recording
    return None if step == 1 or held_back else cache.recipe.policy.reconstruction


def _reach(cache: HiveCache) -> int:
    """Positions between the oldest token held and the newest seen."""
    if cache.positions == "original":
        return cache.progress.seen
    return max(layer.slots.length for layer in cache.hive_layers())


def _rows(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The ids that each row was given, padding left out."""
    if mask is None:
        given: list[list[int]] = ids.tolist()
        return given
    real = mask[:, -ids.shape[1] :].bool()
    return [row[own.to(row.device)].tolist() for row, own in zip(ids, real, strict=True)]


def _repeat(
    model: PreTrainedModel, cache: HiveCache, passage: Passage, mask: Tensor | None
) -> None:
    """Feed a chunk of the pass, let the policy observe it, and take it back."""
    layers = cache.hive_layers()
    stock = {i: layer for i, layer in enumerate(cache.layers) if i not in cache.compressed}
    saved = copy.deepcopy(stock)
    padded: tuple[Tensor, Tensor] | tuple[()] = ()
    if mask is not None:
        mask = torch.cat([mask.long(), passage.real.to(mask.device).long()], 1)
        padded = padding(mask, 0, passage.ids.shape[1])
    cache.progress.repeats = passage.repeats
    try:
        forward(model, cache, passage.ids, 1, *padded)
        truncate(layers, passage.ids.shape[1])
    finally:
        cache.progress.repeats = None
    for index, layer in saved.items():
        cache.layers[index] = layer
