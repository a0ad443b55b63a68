"""What a prompt's queries say, collected chunk by chunk and told to the policies as one step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kvhive.kernels import Ask, Needs, Observed, Rows, report
from kvhive.step import Step
from torch import Tensor

from kvhive_vllm.groups import Group

AT_ONCE = 1 << 26  # bytes of rows of probabilities that are worked out at a time

Keys = Callable[[int], Tensor]  # layer -> the keys it holds, [K, n, d]


class PromptVotes:
    """Of one request: the columns so far, or the queries that matter, of every layer.

    needs: what the policies ask for.
    """

    def __init__(self, needs: Needs, layers: int) -> None:
        self.needs = needs
        self._columns: list[Tensor | None] = [None] * layers
        self._queries: list[Tensor | None] = [None] * layers

    def add(self, layer: int, scale: float, query: Tensor, keys: Callable[[], Tensor]) -> None:
        """A chunk of one layer: its queries `[q, H, d]`, and where the keys `[K, n, d]` come from,
        of which its own are the last.
        """
        needs, mine = self.needs, query.transpose(0, 1)
        if needs.columns is not None:
            self._add_columns(layer, scale, mine, keys())
        if needs.queries:
            self._add_queries(layer, mine, None)
        elif needs.last_rows:
            self._add_queries(layer, mine, needs.last_rows)

    def observed(self, group: Group, tokens: int, keys: Keys) -> Observed:
        """What a group's layers report of the whole prompt, of so many tokens."""
        needs, layers = self.needs, group.layers
        columns = [self._columns[layer] for layer in layers]
        queries = [self._queries[layer] for layer in layers]
        rows = None
        if needs.last_rows:
            rows = _rows(group, needs, _stacked(queries), keys)
        return Observed(
            fresh=tokens,
            columns=_stacked(columns) if needs.columns else None,
            rows=rows,
            queries=_stacked(queries) if needs.queries else None,
            scale=group.scale,
            rotation=group.written,
        )

    def _add_columns(self, layer: int, scale: float, query: Tensor, keys: Tensor) -> None:
        fresh = query.shape[1]
        step = Step.plain(keys.shape[1] - fresh, fresh, "prefill")
        ask = Ask(step, scale, columns_alone(self.needs))
        new = report(query[None], keys[None], ask).columns
        assert new is not None
        total, earlier = new[0], self._columns[layer]
        if earlier is not None:
            total[:, : earlier.shape[1]] += earlier * self.needs.decay**fresh
        self._columns[layer] = total

    def _add_queries(self, layer: int, query: Tensor, last: int | None) -> None:
        """query `[H, q, d]`; of all so far the last ones are kept."""
        earlier = self._queries[layer]
        if last is not None:
            query = query[:, -last:]
        whole = query.clone() if earlier is None else torch.cat([earlier, query], 1)
        self._queries[layer] = whole if last is None else whole[:, -last:]


def columns_alone(needs: Needs) -> Needs:
    """Of what is needed the columns."""
    return Needs(columns=needs.columns, fold=needs.fold, decay=needs.decay)


def _stacked(parts: list[Tensor | None]) -> Tensor:
    return torch.stack([part for part in parts if part is not None])


def _rows(group: Group, needs: Needs, query: Tensor, keys: Keys) -> Rows:
    """Rows of the last queries `[S, H, r, d]` of a group's layers, worked out as they are read."""
    layers, heads, count, _ = query.shape
    held = keys(group.first).shape[1]
    alone = Needs(last_rows=count)

    def block(start: int, stop: int) -> Tensor:
        # Queries start .. stop - 1 see all but the keys of those that come after them.
        seen, parts = held - count + stop, []
        step = Step.plain(seen - (stop - start), stop - start, "prefill")
        for place, layer in enumerate(group.layers):
            ask = Ask(step, group.scale, alone)
            given = report(
                query[place : place + 1, :, start:stop], keys(layer)[None, :, :seen], ask
            )
            assert given.rows is not None
            parts.append(given.rows.all())
        rows = torch.cat(parts)
        return torch.nn.functional.pad(rows, (0, held - seen))

    size = max(1, AT_ONCE // (4 * layers * heads * held))
    return Rows(count, block, size)
