"""Queries as a Gaussian: fitted to those that were, turned ahead to those to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.rope import Rotation


class QueryRing:
    """The last `size` queries of every row, with their positions, held in a policy's state.

    queries: `[b, H, size, d]` in the model's dtype, in no particular order; position: int32 `[b,
    size]`, -1 where there is none yet. One more place takes what is padding.
    """

    def __init__(self, state: dict[str, Tensor], like: Tensor | None = None, size: int = 0) -> None:
        if "queries" not in state:
            assert like is not None
            batch, heads, _, width = like.shape
            state["queries"] = like.new_zeros(batch, heads, size + 1, width)
            state["position"] = like.new_full((batch, size + 1), -1, dtype=torch.int32)
        self._queries, self._position = state["queries"], state["position"]

    @property
    def queries(self) -> Tensor:
        """`[b, H, size, d]`."""
        return self._queries[:, :, :-1]

    @property
    def position(self) -> Tensor:
        """int32 `[b, size]`."""
        return self._position[:, :-1]

    def add(self, position: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a step's queries `[b, H, q, d]`; the newest replace the oldest.

        position: int32 `[b, q]`, that of the slots under the queries. A query is new if its slot is
        newer than all known: below padding there may be old slots. Returns position and bool `[b,
        q]`, which are new.
        """
        size = self.position.shape[1]
        fresh = position > self.position.amax(1, keepdim=True)
        place = torch.where(fresh, position % size, size)[:, -size:].long()
        written = position.masked_fill(~fresh, -1)[:, -size:]
        self._position.scatter_(1, place, written)
        self._queries.scatter_(
            2, place[:, None, :, None].expand_as(queries[:, :, -size:]), queries[:, :, -size:]
        )
        return position, fresh


@dataclass(frozen=True)
class Gaussian:
    """Mean `[b, H, d]` and covariance `[b, H, d, d]` (None: zero) of a layer's queries, float32."""

    mean: Tensor
    covariance: Tensor | None

    @staticmethod
    def recall(state: dict[str, Tensor]) -> Gaussian | None:
        """What `remember` put into a policy's state, if anything."""
        return Gaussian(state["mean"], state.get("covariance")) if "mean" in state else None

    @staticmethod
    def forget(state: dict[str, Tensor]) -> None:
        """Undo `remember`."""
        state.pop("mean", None)
        state.pop("covariance", None)

    def remember(self, state: dict[str, Tensor]) -> None:
        """Put it into a policy's state."""
        state["mean"] = self.mean
        if self.covariance is not None:
            state["covariance"] = self.covariance

    def where(self, rows: Tensor, other: Gaussian) -> Gaussian:
        """This one for the rows of the batch marked (bool `[b]`), `other` for the rest."""
        mean = torch.where(rows[:, None, None], self.mean, other.mean)
        if self.covariance is None or other.covariance is None:
            return Gaussian(mean, None)
        chosen = torch.where(rows[:, None, None, None], self.covariance, other.covariance)
        return Gaussian(mean, chosen)

    def ahead(self, start: Tensor, span: int, rotation: Rotation | None) -> Gaussian:
        """Turned by the mean rotation of positions start .. start + span - 1 (start: int `[b]`)."""
        if rotation is None:
            return self
        cos, sin = rotation.ahead(start[:, None], span, int(start.max()))
        mean = rotation.turn(self.mean, cos, sin)
        if self.covariance is None:
            return Gaussian(mean, None)
        cos, sin = cos[:, None], sin[:, None]
        half = rotation.turn(self.covariance, cos, sin).transpose(-1, -2)
        return Gaussian(mean, rotation.turn(half, cos, sin))

    def log_expectation(self, keys: Tensor, scale: float) -> Tensor:
        """log E[exp(scale * query * key)], float32 `[b, H, n]`, for keys `[b, K, n, d]`.

        One query head at a time, so that scratch memory is a few times the keys of one KV head.
        """
        heads, kv_heads = self.mean.shape[1], keys.shape[1]
        logs = []
        for head in range(heads):
            key = keys[:, head // (heads // kv_heads)].float() * scale
            log = (key @ self.mean[:, head, :, None]).squeeze(-1)
            if self.covariance is not None:
                log = log + 0.5 * ((key @ self.covariance[:, head]) * key).sum(-1)
            logs.append(log)
        return torch.stack(logs, 1)


def fit(
    queries: Tensor, position: Tensor, use: Tensor, rotation: Rotation | None, covariance: bool
) -> Gaussian:
    """Mean and covariance of queries `[b, H, m, d]` after turning them back to position 0.

    position: int `[b, m]`; use: bool `[b, m]`, which of them count (none: a mean of zero).
    """
    turns = None
    if rotation is not None:
        position = position.clamp_min(0)
        turns = rotation.cos_sin(position, int(position.max()))
    weight = use.float() / use.sum(1, keepdim=True).clamp_min(1)
    means, covariances = [], []
    for head in queries.unbind(1):
        query = head.float()
        if rotation is not None and turns is not None:
            query = rotation.turn(query, turns[0], -turns[1])
        mean = (weight[:, None] @ query).squeeze(1)
        means.append(mean)
        if covariance:
            spread = (query - mean[:, None]) * weight.sqrt()[..., None]
            covariances.append(spread.transpose(-1, -2) @ spread)
    return Gaussian(torch.stack(means, 1), torch.stack(covariances, 1) if covariance else None)
