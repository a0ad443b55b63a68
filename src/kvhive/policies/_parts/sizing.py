"""Sizing: how a policy's hyper-parameters and a recipe's budget become a limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _same(budget: int) -> int:
    return budget


def some_slack(budget: int) -> int:
    """1/32 of the budget, at most 64: an eviction's copying is spread over that many steps."""
    return min(64, budget // 32)


def no_slack(budget: int) -> int:
    """None, as the reference implementations do, or because an eviction frees many slots anyway."""
    return 0


@dataclass(frozen=True)
class Sizing:
    """The sizes a policy asks for; the defaults are those of most methods.

    least: the smallest budget: what is always kept, and one more.
    implied: the budget that the hyper-parameters fix by themselves; None: they do not.
    budgeted: whether a budget may be given at all.
    alone: for a policy without a budget, tokens a head may hold after `seen` before something must
    go; 0: the policy is asked after every step and decides how many stay. None: the policy needs a
    budget, or, where it takes none, nothing is limited.
    peak: the most tokens held between two steps for a nominal budget.
    outlasting: of so many tokens held, the most that may be older than one that is dropped. Where
    positions are counted in the cache their keys move, and may be held twice.
    slack: tokens to free beyond need when a decoded token goes over a budget.
    decoding: whether the policy evicts while decoding; some compress prompts alone.
    """

    least: int = 1
    implied: int | None = None
    budgeted: bool = True
    alone: Callable[[int], int] | None = None
    peak: Callable[[int], int] = _same
    outlasting: Callable[[int], int] = _same
    slack: Callable[[int], int] = some_slack
    decoding: bool = True
