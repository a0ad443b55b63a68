"""One request, as a worker knows it: what its slots hold, who has voted, and what must go."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import torch
from kvhive.cache.eviction import cut
from kvhive.cache.positions import Turning
from kvhive.kernels import Ask, Needs, Observed, Rows, report
from kvhive.slots import Slots
from kvhive.step import Step
from torch import Tensor

from kvhive_vllm.groups import Group
from kvhive_vllm.held import HeldPages
from kvhive_vllm.orders import Cut
from kvhive_vllm.prompts import PromptVotes, columns_alone

WAITING = 16  # decoded queries that wait to vote, so that keys are read once for all of them
HEADROOM = 128  # slots made room for ahead while decoding
FEW = 0.25  # of what is kept: if no more goes, what stays is not written anew


@dataclass(eq=False)
class _Layers:
    """A group, what this request's slots of it hold, and where (see `HeldPages`)."""

    group: Group
    slots: Slots
    turning: Turning
    places: Tensor | None = None

    @classmethod
    def empty(cls, group: Group, device: torch.device) -> _Layers:
        policy, turning = group.policy, Turning(group.turns)
        columns = {**policy.columns, **turning.columns}
        heads = group.pages[0].heads
        slots = Slots(len(group.pages), heads, columns, policy.counters, device)
        return cls(group, slots, turning)


class Sequence:
    """The state of one request, between its first token and its last.

    It dies with the request's blocks. blocks: int64, where its tokens lie, in order.
    """

    def __init__(self, groups: abc.Sequence[Group], layers: int, device: torch.device) -> None:
        self._needs = groups[0].policy.needs
        self._parts = [_Layers.empty(group, device) for group in groups]
        self._votes: PromptVotes | None = PromptVotes(self._needs, layers)
        self._waiting: list[Tensor] = []  # [L, H, d], of decoded tokens that are not heard yet
        self._unheard = 0  # those tokens, where nobody votes too
        self._device = device
        self.seen = 0  # tokens read
        self.blocks = torch.empty(0, dtype=torch.int64, device=device)

    @property
    def held(self) -> int:
        """Tokens that lie in the pages."""
        return self._parts[0].slots.length + self._unheard

    # ---- reading the prompt ----------------------------------------------------------------------

    @property
    def votes(self) -> PromptVotes | None:
        """Where the prompt's queries are collected; None: it has been read."""
        return self._votes

    def end_prompt(self, tokens: int) -> None:
        """The prompt of so many tokens lies in the pages: tell the policies, as one step."""
        step, votes, self._votes = Step.plain(0, tokens), self._votes, None
        assert votes is not None
        self.seen = tokens
        for part in self._parts:
            part.slots.append(step, tokens)
            if part.group.policy.observes:
                keys = self._pages_of(part, tokens).keys_of
                seen = votes.observed(part.group, tokens, keys)
                part.group.policy.observe(part.slots, seen)

    # ---- decoding --------------------------------------------------------------------------------

    def decode(self, queries: Tensor | None) -> None:
        """One more token lies in the pages; its queries `[L, H, d]`, where they vote."""
        self.seen += 1
        self._unheard += 1
        if queries is not None:
            self._waiting.append(queries)
            if len(self._waiting) == WAITING:
                self._hear()

    def _hear(self) -> None:
        """Let the tokens vote that have not done so yet."""
        if not self._unheard:
            return
        count, first, self._unheard = self._unheard, self.seen - self._unheard, 0
        queries = torch.stack(self._waiting, 2) if self._waiting else None  # [L, H, count, d]
        self._waiting = []
        for part in self._parts:
            self._hear_part(part, first, count, queries)

    def _hear_part(self, part: _Layers, first: int, count: int, queries: Tensor | None) -> None:
        policy, slots = part.group.policy, part.slots
        held = slots.length + count
        room = max(slots.room, held + HEADROOM if held > slots.room else held)
        if not policy.observes:
            slots.append(Step.plain(first, count, "decode"), room)
            return
        together = self._needs.together
        said = _Said(part.group, self._pages_of(part, held), held, queries)
        for start in range(0, count, together):
            stop = min(start + together, count)
            slots.append(Step.plain(first + start, stop - start, "decode"), room)
            policy.observe(slots, said.observed(start, stop, count, held))

    # ---- eviction --------------------------------------------------------------------------------

    def evict(self, order: Cut) -> None:
        """Cut every head of every layer down; what stays moves to the blocks that the order names.

        Raises `RuntimeError` where a head would keep another number of tokens than the scheduler
        has foretold.
        """
        self._hear()
        blocks = torch.tensor(order.blocks, dtype=torch.int64, device=self._device)
        for part in self._parts:
            self._evict_part(part, order, blocks)
        self.blocks = blocks

    def _evict_part(self, part: _Layers, order: Cut, blocks: Tensor) -> None:
        slots, group = part.slots, part.group
        held = slots.length
        pages = self._pages_of(part, held)
        target = torch.full_like(slots.tally, order.target)
        plan = cut(group.policy, slots, pages, target, target)
        if plan is not None:
            slots.adopt(plan)
        kept = held if plan is None else plan.longest
        if kept != order.kept or (plan is not None and plan.holes):
            raise RuntimeError(
                f"{group.policy.name}: a head of layers {group.layers} keeps {kept} of {held} "
                f"tokens where {order.kept} were foretold; please report the recipe"
            )
        stays = torch.equal(blocks, self.blocks[: len(blocks)])
        if plan is None and stays:
            return
        if plan is None:
            pages.move(blocks, None)
        elif group.turns is None:
            slots.compact(plan, kept + HEADROOM)
            if stays and held - kept <= FEW * kept:
                part.places = pages.close_up(plan)
                return
            pages.move(blocks, plan)
        else:
            room = kept + HEADROOM
            after = part.turning.compact(pages.whole(), slots, plan, room, self.seen)
            for layer, keys, values in zip(group.pages, *after.view(), strict=True):
                layer.write(blocks, keys, values)
        part.places = None

    def _pages_of(self, part: _Layers, held: int) -> HeldPages:
        return HeldPages(part.group, self.blocks, held, part.places)


class _Said:
    """What decoded queries say of a group's layers, some of them at a time.

    queries: `[L, H, count, d]`, of the last tokens held.
    """

    def __init__(self, group: Group, pages: HeldPages, held: int, queries: Tensor | None) -> None:
        self._group, self._keys, self._held = group, pages.keys_of, held
        self._needs = group.policy.needs
        self._queries = None if queries is None else queries[group.first : group.layers.stop]
        self._rows: Tensor | None = None

    def observed(self, start: int, stop: int, count: int, held: int) -> Observed:
        """Of queries start .. stop - 1 of `count`, when no slot behind the last one was there."""
        seen = held - count + stop
        needs, queries = self._needs, self._queries
        assert queries is not None or not needs.votes
        columns, rows = None, None
        if needs.columns is not None:
            columns = self._reported_columns(start, stop, seen)
        if needs.last_rows:
            rows = Rows.of(self._all_rows(count)[:, :, start:stop, :seen][:, :, -needs.last_rows :])
        return Observed(
            fresh=stop - start,
            columns=columns,
            rows=rows,
            queries=queries[:, :, start:stop] if needs.queries and queries is not None else None,
            scale=self._group.scale,
            rotation=self._group.written,
        )

    def _reported_columns(self, start: int, stop: int, seen: int) -> Tensor:
        assert self._queries is not None
        step = Step.plain(seen - (stop - start), stop - start, "decode")
        needs = columns_alone(self._needs)
        parts = []
        for place, layer in enumerate(self._group.layers):
            query = self._queries[place : place + 1, :, start:stop]
            ask = Ask(step, self._group.scale, needs)
            parts.append(report(query, self._keys(layer)[None, :, :seen], ask).columns)
        return torch.cat([part for part in parts if part is not None])

    def _all_rows(self, count: int) -> Tensor:
        """`[S, H, count, held]`, worked out once."""
        if self._rows is None:
            assert self._queries is not None
            held = self._held
            ask = Ask(
                Step.plain(held - count, count, "decode"), self._group.scale, Needs(last_rows=count)
            )
            parts = [
                report(self._queries[place : place + 1], self._keys(layer)[None], ask).rows
                for place, layer in enumerate(self._group.layers)
            ]
            self._rows = torch.cat([part.all() for part in parts if part is not None])
        return self._rows
