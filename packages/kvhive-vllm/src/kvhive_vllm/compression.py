"""All requests of one worker: carries out the scheduler's orders, and listens to attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from kvhive.kernels import Needs
from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput

from kvhive_vllm import sequences
from kvhive_vllm.groups import Group
from kvhive_vllm.orders import Orders


@dataclass(frozen=True)
class _Chunk:
    """Part of a prompt: rows `start .. start + fresh - 1` of the batch, and tokens read then."""

    name: str
    start: int
    fresh: int
    seen: int
    ends: bool


@dataclass(frozen=True, eq=False)
class _Step:
    """One forward pass. rows: int64, the rows of the batch that decode, of requests `decoding`."""

    chunks: list[_Chunk]
    decoding: list[str]
    rows: Tensor
    queries: list[Tensor]  # [decoding, H, d] of each layer so far


class Compression:
    """groups: the layers of this worker. layers: their names, in order."""

    def __init__(
        self, groups: Sequence[Group], layers: Sequence[str], device: torch.device
    ) -> None:
        self.groups, self._device = groups, device
        self._place = {name: place for place, name in enumerate(layers)}
        self._group_of = {layer: group for group in groups for layer in group.layers}
        self.needs: Needs = groups[0].policy.needs
        self.requests: dict[str, sequences.Sequence] = {}
        self._orders = Orders()
        self._step: _Step | None = None

    def follow(self, output: SchedulerOutput) -> Orders:
        """Forget requests that are over, evict, and take note of blocks: before anything else of
        the step is done.
        """
        cached = output.scheduled_cached_reqs
        self._forget(output.finished_req_ids)
        self._forget(output.preempted_req_ids or ())
        self._forget(cached.resumed_req_ids)
        orders: Orders = getattr(output, "kvhive", None) or Orders()
        for name, order in orders.cuts.items():
            self.requests[name].evict(order)
        for request in output.scheduled_new_reqs:
            self._new(request.req_id, request.block_ids[0])
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                assert blocks is not None
                self._new(name, blocks[0])
            elif blocks is not None:
                held = self.requests[name]
                held.blocks = torch.cat([held.blocks, self._ids(blocks[0])])
        self._orders = orders
        return orders

    def begin(self, names: Iterable[str], fresh: Sequence[int]) -> None:
        """A forward pass comes: its requests in the order of the batch, and their new tokens.

        Raises `RuntimeError` where a request holds another number of tokens than the scheduler
        knows of.
        """
        chunks: list[_Chunk] = []
        decoding: list[str] = []
        rows: list[int] = []
        start, orders = 0, self._orders
        for name, number in zip(names, fresh, strict=True):
            seen = orders.seen[name]
            if name in orders.decoding:
                self._check(name, seen, number)
                decoding.append(name)
                rows.append(start)
            else:
                chunks.append(_Chunk(name, start, number, seen, name in orders.ending))
            start += number
        where = torch.tensor(rows, dtype=torch.int64, device=self._device)
        self._step = _Step(chunks, decoding, where, [])

    def look(self, layer: str, query: Tensor, key: Tensor) -> None:
        """After a layer's attention: queries `[tokens, H, d]` and new keys `[tokens, K, d]`."""
        step = self._step
        if step is None or not self.needs.votes:
            return
        place = self._place[layer]
        group = self._group_of[place]
        for chunk in step.chunks:
            held, own = self.requests[chunk.name], slice(chunk.start, chunk.start + chunk.fresh)
            assert held.votes is not None
            keys = partial(self._keys, place, chunk, held.blocks, key[own])
            held.votes.add(place, group.scale, query[own], keys)
        if step.decoding:
            step.queries.append(query.index_select(0, step.rows))

    def _keys(self, place: int, chunk: _Chunk, blocks: Tensor, new: Tensor) -> Tensor:
        """`[K, n, d]`: what a prompt holds of a layer; new: `[q, K, d]`, those of the chunk."""
        if chunk.fresh == chunk.seen:
            return new.transpose(0, 1)
        group = self._group_of[place]
        return group.pages[place - group.first].keys(blocks, chunk.seen)

    def end(self) -> None:
        """The forward pass is over."""
        step, self._step = self._step, None
        if step is None:
            return
        for chunk in step.chunks:
            if chunk.ends:
                self.requests[chunk.name].end_prompt(chunk.seen)
        queries = torch.stack(step.queries) if step.queries else None
        for place, name in enumerate(step.decoding):
            own = None if queries is None else queries[:, place].clone()
            self.requests[name].decode(own)

    def _check(self, name: str, seen: int, fresh: int) -> None:
        held, gone = self.requests[name].held, self._orders.dropped.get(name, 0)
        if fresh != 1 or held + fresh != seen - gone:
            raise RuntimeError(
                f"request {name} holds {held} tokens and is given {fresh}, where {seen} were read "
                f"and {gone} dropped; please report the recipe"
            )

    def _new(self, name: str, blocks: Sequence[int]) -> None:
        held = sequences.Sequence(self.groups, len(self._place), self._device)
        held.blocks = self._ids(blocks)
        self.requests[name] = held

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.requests.pop(name, None)

    def _ids(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(list(blocks), dtype=torch.int64, device=self._device)
