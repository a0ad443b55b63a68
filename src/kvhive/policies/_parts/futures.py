"""Queries as a Gaussian: fitted to those that were, turned ahead to those to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.rope import Rotation

HEADS_AT_ONCE = 8  # bounds the scratch memory of a long prompt's statistics


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
            state["position"] = like.new_full((batch, size + 1), -1, dtype=torch.int64)
        self._queries, self._position = state["queries"], state["position"]

    @property
    def queries(self) -> Tensor:
        """`[b, H, size, d]`."""
        return self._queries[:, :, :-1]

    @property
    def position(self) -> Tensor:
        """int64 `[b, size]`."""
        return self._position[:, :-1]

    def add_one(self, position: int, query: Tensor) -> None:
        """Take in a single query `[b, H, 1, d]`, which all rows have at the same position."""
        place = position % (self._position.shape[1] - 1)
        self._position[:, place] = position
        self._queries[:, :, place] = query[:, :, 0]

    def add(self, position: Tensor, queries: Tensor, real: Tensor | None) -> None:
        """Take in a step's queries `[b, H, q, d]`; the newest replace the oldest.

        position: int64 `[b, q]`. real: bool `[b, q]`, False for padding; None when there is none.
        """
        size = self._position.shape[1] - 1
        if position.shape[1] > size:
            position, queries = position[:, -size:], queries[:, :, -size:]
            real = None if real is None else real[:, -size:]
        place = position % size
        if real is not None:
            place = place.masked_fill(~real, size)
        self._position.scatter_(1, place, position)
        self._queries.scatter_(2, place[:, None, :, None].expand_as(queries), queries)
        if real is not None:
            self._position[:, size] = -1

    def newer(self, position: Tensor) -> Tensor:
        """bool, as `position`: which are newer than all that the row's ring holds."""
        return position > self.position.amax(1, keepdim=True)


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

        One KV head at a time, so that scratch memory is a few times its group's share of the keys.
        """
        group = self.mean.shape[1] // keys.shape[1]
        logs = []
        for head in range(keys.shape[1]):
            mine = slice(head * group, (head + 1) * group)
            key = keys[:, head].float() * scale
            log = self.mean[:, mine] @ key.transpose(-1, -2)
            if self.covariance is not None:
                key = key[:, None]
                log = log + 0.5 * (key @ self.covariance[:, mine]).mul_(key).sum(-1)
            logs.append(log)
        return torch.cat(logs, 1)


def fit(
    queries: Tensor, position: Tensor, use: Tensor, rotation: Rotation | None, covariance: bool
) -> Gaussian:
    """Mean and covariance of queries `[b, H, m, d]` after turning them back to position 0.

    position: int `[b, m]`; use: bool `[b, m]`, which of them count (none: a mean of zero).
    """
    turns = None
    if rotation is not None:
        position = position.clamp_min(0)
        turns = rotation.cos_sin(position[:, None], int(position.max()))
    weight = use.float() / use.sum(1, keepdim=True).clamp_min(1)
    means, covariances = [], []
    for some in queries.split(HEADS_AT_ONCE, dim=1):
        query = some.float()
        if rotation is not None and turns is not None:
            query = rotation.turn(query, turns[0], -turns[1])
        mean = weight[:, None, None] @ query
        means.append(mean.squeeze(2))
        if covariance:
            spread = (query - mean) * weight.sqrt()[:, None, :, None]
            covariances.append(spread.transpose(-1, -2) @ spread)
    return Gaussian(torch.cat(means, 1), torch.cat(covariances, 1) if covariance else None)
