"""Perplexity while a text streams through the cache, and fidelity to the full cache on one."""

from __future__ import annotations

from collections import abc
from statistics import mean, median, quantiles

import torch
from torch import Tensor

from kvhive.cache.hive_cache import HiveCache
from kvhive.evaluation.protocols import ModelUnderTest
from kvhive.evaluation.scoring import Continuation, Sequence, held
from kvhive.evaluation.teacher_forcing import Attended, lead
from kvhive.evaluation.types import CacheStats, Item, Outcome, RecipeResult

TOP = 5
TOGETHER = 16  # recipes whose logits are held at one time


def stream(
    asked: ModelUnderTest, ids: abc.Sequence[int], block: int, skip: int
) -> list[RecipeResult]:
    """Feed a text block by block, every policy acting after each; score each token from `skip` on.

    A token is scored under the cache that the block before left (and the tokens of its own block).
    """
    stage = asked.stage
    caches = [HiveCache.for_model(stage.model, recipe) for recipe in asked.recipes]
    starts: list[CacheStats] = []
    scores: list[list[tuple[float, bool]]] = [[] for _ in caches]
    for begin in range(0, len(ids) - 1, block):
        step = list(ids[begin : min(begin + block, len(ids) - 1)])
        said = stage.sing(caches, [[step]] * len(caches), keep=len(step))
        if not starts and begin + len(step) >= skip:
            starts = [held(cache) for cache in caches]
        wanted = torch.tensor(ids[begin + 1 : begin + 1 + len(step)], device=stage.model.device)
        first = max(0, skip - begin - 1)
        for score, logits in zip(scores, said, strict=True):
            score += list(zip(*_scored(logits[0, first:], wanted[first:]), strict=True))
    return [
        RecipeResult(str(recipe), (_outcome(score),), start, held(cache))
        for recipe, score, start, cache in zip(asked.recipes, scores, starts, caches, strict=True)
    ]


def in_pieces(asked: ModelUnderTest, ids: abc.Sequence[int], piece: int, skip: int) -> RecipeResult:
    """The floor of `stream`: every piece of the text read alone by the full cache."""
    score: list[tuple[float, bool]] = []
    (recipe,) = asked.recipes
    for begin in range(skip - skip % piece, len(ids) - 1, piece):
        part = list(ids[begin : begin + piece])
        (voice,) = asked.stage.read((), [recipe])
        if part[1:]:
            ((forced,),) = asked.stage.force([voice], [Continuation(tuple(part), 1)])
            score += list(zip(forced.logprobs, forced.hits, strict=True))
    return RecipeResult(str(recipe), (_outcome(score),), voice.end, voice.end)


def compare(asked: ModelUnderTest, item: Item) -> list[RecipeResult]:
    """Next-token distributions on the item's target after its prefix, against the full cache's.

    The first recipe is the full cache. All are fed the same ids: one by one where a recipe evicts
    while decoding.
    """
    stage, ids = asked.stage, asked.frame.target(item.probes[0])
    voices = stage.read(asked.frame.prefix(item, item.prefix), asked.recipes)
    starts = [held(voice.cache) for voice in voices]
    attended = lead(stage, [voice.cache for voice in voices], ids)
    truth = _logits(asked, voices[:1], ids)[0]
    told = [_fidelity(truth, truth, ids, attended[0])]
    for begin in range(1, len(voices), TOGETHER):
        group = slice(begin, begin + TOGETHER)
        pairs = zip(_logits(asked, voices[group], ids), attended[group], strict=True)
        told += [_fidelity(logits, truth, ids, seen) for logits, seen in pairs]
    return [
        RecipeResult(voice.recipe, (outcome,), start, voice.end)
        for voice, outcome, start in zip(voices, told, starts, strict=True)
    ]


def compare_bare(asked: ModelUnderTest, item: Item) -> RecipeResult:
    """The floor of `compare`: the full cache, which is the only recipe, without the prefix."""
    ids = asked.frame.target(item.probes[0])
    (informed,) = asked.stage.read(asked.frame.prefix(item, item.prefix), asked.recipes)
    (without,) = asked.stage.read((), asked.recipes)
    truth, bare = (_logits(asked, [voice], ids)[0] for voice in (informed, without))
    outcome = _fidelity(bare, truth, ids, None)
    return RecipeResult(without.recipe, (outcome,), without.end, without.end)


def _logits(
    asked: ModelUnderTest, voices: abc.Sequence[Sequence], ids: abc.Sequence[int]
) -> list[Tensor]:
    """Logits `[tokens, vocabulary]` after each token but the last, on the CPU; the voices go on."""
    said = asked.stage.follow(voices, ids[:-1])
    return [logits.cpu() for logits in said]


def _scored(logits: Tensor, wanted: Tensor) -> tuple[list[float], list[bool]]:
    wide = logits.float()
    chosen = wide.gather(-1, wanted[:, None])[:, 0] - wide.logsumexp(-1)
    return chosen.tolist(), (wide.argmax(-1) == wanted).tolist()


def _outcome(score: abc.Sequence[tuple[float, bool]]) -> Outcome:
    logprobs, hits = zip(*score, strict=True)
    return Outcome(tuple(logprobs), tuple(hits))


def _fidelity(
    logits: Tensor, truth: Tensor, ids: abc.Sequence[int], attended: Attended | None
) -> Outcome:
    """Distances of `[tokens, vocabulary]` logits from the full cache's, and what was attended."""
    ours, theirs = logits.float().log_softmax(-1), truth.float().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0).tolist()
    token = torch.tensor(ids[1:])[:, None]
    worse = (theirs.gather(-1, token) - ours.gather(-1, token)).mean()
    best, their_best = (one.topk(TOP).indices for one in (ours, theirs))
    shared = (best[:, :, None] == their_best[:, None, :]).any(-1).float().mean()
    values = {
        "kl": mean(kl),
        "kl_median": median(kl),
        "kl_p95": quantiles(kl, n=20)[-1] if len(kl) > 1 else kl[0],
        "top1": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "top5_overlap": float(shared),
        "delta_nll": float(worse),
    }
    if attended is not None:
        values |= {
            "mass": attended.mass,
            "mass_min": attended.least_mass,
            "out_err": attended.error,
        }
    return Outcome(values=values)
