"""A recipe's cache after some text, what can be fed to it, and how likely it found that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvhive.cache.hive_cache import HiveCache
from kvhive.evaluation.types import CacheStats
from kvhive.inference.shared_prefill import reads_like_others
from kvhive.recipe import Recipe


@dataclass(eq=False)
class Sequence:
    """One recipe's cache of one row, and what comes next.

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

    @property
    def next_logits(self) -> Tensor:
        """`logits`. Raises `ValueError` when nothing was read."""
        if self.logits is None:
            raise ValueError("nothing was read yet, so there is no first token to score")
        return self.logits


@dataclass(frozen=True)
class Continuation:
    """Token ids to feed after what was read; those from `start` on are scored."""

    ids: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True)
class TokenScores:
    """Of every scored token of a continuation: its natural log probability, and whether it was the
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


def score(logits: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability (float64) and arg-max agreement of `token` `[rows]` in `[rows, words]`."""
    wide = logits.float()
    chosen = wide.gather(-1, token[:, None])[:, 0] - wide.logsumexp(-1)
    return chosen.double().cpu(), (wide.argmax(-1) == token).cpu()
