"""What the scheduler tells the workers with every step. They never work it out themselves."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cut:
    """An eviction, to be done before anything of the step is written.

    target: heads are cut down to so many tokens. kept: tokens that are left of each head. blocks:
    where they go, in order; the blocks held before may be among them, and are free afterwards.
    """

    target: int
    kept: int
    blocks: list[int]


@dataclass
class Orders:
    """Of one step.

    cuts: by request, in the order in which they are to be done. dropped: tokens of scheduled
    requests that were read and are held no more, where there are any. seen: tokens that each
    scheduled request will have read. decoding: requests that generate; all others read their
    prompt. ending: requests whose prompt ends with the step.
    """

    cuts: dict[str, Cut] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    decoding: set[str] = field(default_factory=set)
    ending: set[str] = field(default_factory=set)
