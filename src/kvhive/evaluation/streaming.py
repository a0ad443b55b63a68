"""Perplexity while a text streams through the cache, and fidelity to the full cache on one."""

from __future__ import annotations

from collections import abc
from statistics import mean, median, quantiles

import torch
from torch import Tensor

from kvhive.cache.hive_cache import HiveCache
from kvhive.evaluation.protocols import ModelUnderTest
from kvhive.evaluation.sequences import Continuation, Sequence, held, score
from kvhive.evaluation.teacher_forcing import Attended, attended_by
from kvhive.evaluation.types import CacheStats, Item, Outcome, RecipeResult
from kvhive.inference.driver import chunks

TOP = 5
TOGETHER = 16  # recipes whose logits are held at one time


def stream(
    tested: ModelUnderTest, ids: abc.Sequence[int], block: int, skip: int
) -> list[RecipeResult]:
    """Feed a text block by block, every policy acting after each; score each token from `skip` on.

    A token is scored under the cache that the block before left (and the tokens of its own block).
    """
    runner = tested.model_runner
    caches = [HiveCache.for_model(runner.model, recipe) for recipe in tested.recipes]
    starts: list[CacheStats] = []
    scores: list[list[tuple[float, bool]]] = [[] for _ in caches]
    for begin, end in chunks(len(ids) - 1, block):
        every = runner.step(caches, ids[begin:end], keep=end - begin)
        if not starts and end >= skip:
            starts = [held(cache) for cache in caches]
        wanted = torch.tensor(ids[begin + 1 : end + 1], device=runner.model.device)
        first = max(0, skip - begin - 1)
        for scored, logits in zip(scores, every, strict=True):
            logprobs, hits = score(logits[first:], wanted[first:])
            scored += list(zip(logprobs.tolist(), hits.tolist(), strict=True))
    return [
        RecipeResult(str(recipe), (_outcome(scored),), start, held(cache))
        for recipe, scored, start, cache in zip(tested.recipes, scores, starts, caches, strict=True)
    ]


def in_pieces(
    tested: ModelUnderTest, ids: abc.Sequence[int], piece: int, skip: int
) -> RecipeResult:
    """The floor of `stream`: every piece of the text read alone by the full cache."""
    scored: list[tuple[float, bool]] = []
    (recipe,) = tested.recipes
    for begin in range(skip - skip % piece, len(ids) - 1, piece):
        part = tuple(ids[begin : begin + piece])
        (sequence,) = tested.model_runner.read((), [recipe])
        if part[1:]:
            ((scores,),) = tested.model_runner.force([sequence], [Continuation(part, 1)])
            scored += list(zip(scores.logprobs, scores.hits, strict=True))
    return RecipeResult(str(recipe), (_outcome(scored),), sequence.end, sequence.end)


def compare(tested: ModelUnderTest, item: Item) -> list[RecipeResult]:
    """Next-token distributions on the item's target after its prefix, against the full cache's.

    The first recipe is the full cache. All are fed the same ids: one by one where a recipe evicts
    while decoding.
    """
    ids = tested.target(item.probes[0])
    sequences = tested.model_runner.read(tested.prefix(item, item.prefix), tested.recipes)
    starts = [held(one.cache) for one in sequences]
    attended = attended_by(tested.model_runner.driver, [one.cache for one in sequences], ids)
    truth = _logits(tested, sequences[:1], ids)[0]
    outcomes = [_fidelity(truth, truth, ids, attended[0])]
    for begin in range(1, len(sequences), TOGETHER):
        group = slice(begin, begin + TOGETHER)
        pairs = zip(_logits(tested, sequences[group], ids), attended[group], strict=True)
        outcomes += [_fidelity(logits, truth, ids, seen) for logits, seen in pairs]
    return [
        RecipeResult(one.recipe, (outcome,), start, one.end)
        for one, outcome, start in zip(sequences, outcomes, starts, strict=True)
    ]


def compare_bare(tested: ModelUnderTest, item: Item) -> RecipeResult:
    """The floor of `compare`: the full cache, which is the only recipe, without the prefix."""
    ids = tested.target(item.probes[0])
    (informed,) = tested.model_runner.read(tested.prefix(item, item.prefix), tested.recipes)
    (without,) = tested.model_runner.read((), tested.recipes)
    truth, bare = (_logits(tested, [one], ids)[0] for one in (informed, without))
    outcome = _fidelity(bare, truth, ids, None)
    return RecipeResult(without.recipe, (outcome,), without.end, without.end)


def _logits(
    tested: ModelUnderTest, sequences: abc.Sequence[Sequence], ids: abc.Sequence[int]
) -> list[Tensor]:
    """Logits `[tokens, vocabulary]` after each token but the last, on the CPU; the sequences go
    on.
    """
    return [logits.cpu() for logits in tested.model_runner.follow(sequences, ids[:-1])]


def _outcome(scored: abc.Sequence[tuple[float, bool]]) -> Outcome:
    logprobs, hits = zip(*scored, strict=True)
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
