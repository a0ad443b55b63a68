"""A cascade of windows: tokens that fall out of one may enter the next, which moves more rarely.

When a token may enter is a matter of time alone; only which of the candidates wins depends on
scores. So tokens are not inserted one by one: level by level, arrivals are cut into the groups that
compete for one place, and each group's winner is found at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.policies._parts.cells import winners

NOW = 0  # an arrival time at which every level is open


def insert(
    level: Tensor,
    pending: Tensor,
    time: Tensor,
    score: Tensor,
    sizes: Tensor,
    strides: tuple[int, ...],
    eager: Tensor,
) -> tuple[Tensor, Tensor]:
    """Insert the `pending` tokens, in order, into a cascade of `len(strides)` levels.

    Shapes: level (0 newest, -1 none) int64, pending bool, time (of arrival, 0 for the first token
    after the sinks) int64 and score float `[b, K, n]`, slots ascending by age; sizes int64
    `[levels, b, K]`, places in each level; eager int64 `[b, K]`, the last time at which all levels
    are open (-1: never).

    At its time a level that is open takes an arrival as its newest and, when full, hands its oldest
    on to the next level. A closed one compares the arrival with its newest: the higher score stays
    (ties: the later). Levels held beyond their size hand their oldest on at once.
    Returns the levels afterwards and the tokens alive, bool, among those pending or in a level.
    """
    arriving, after, alive = pending, level, torch.zeros_like(pending)
    for index, (stride, size) in enumerate(zip(strides, sizes, strict=True)):
        held = level == index
        member = held | arriving
        opens = (time % stride == 0) | (time <= eager[..., None])
        starts = held | (arriving & opens) | (member & (member.cumsum(-1) == 1))
        group = (starts.cumsum(-1) - 1).clamp_min(0)
        best = latest_winners(group, member, score)
        leaving = best & (group < (starts.sum(-1) - size)[..., None])
        after = torch.where(best & ~leaving, index, after)
        alive = alive | (best & ~leaving)
        time = torch.where(leaving, pushed_at(group, starts & arriving, time, size), time)
        arriving = leaving
    return torch.where(alive, after, -1), alive


def latest_winners(group: Tensor, member: Tensor, score: Tensor) -> Tensor:
    """bool `[b, K, n]`: the best-scored member of every group, the latest of equals."""
    return winners(group.flip(-1), member.flip(-1), score.flip(-1)).flip(-1)


def pushed_at(group: Tensor, opening: Tensor, time: Tensor, size: Tensor) -> Tensor:
    """int64 `[b, K, n]`: when each member is handed on, if it is.

    That is when the group `size` groups later opens, `NOW` if it is open already. opening: bool,
    arrivals that open their group; time: when.
    """
    table = torch.full_like(time, NOW)
    last = torch.full_like(group, table.shape[-1])
    table = torch.nn.functional.pad(table, (0, 1)).scatter(
        -1, torch.where(opening, group, last), time
    )
    return table.gather(-1, (group + size[..., None]).clamp_max(table.shape[-1] - 2))
