"""What a policy asks of attention, and what attention reports back.

Plain values only: nothing here knows a policy, a store or a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kvhive.rope import Rotation
from kvhive.step import Step


@dataclass(frozen=True)
class Needs:
    """What a policy must be told about the attention of each step. The kernel computes this and no
    more.

    columns: `"sum"` for the attention every slot received in this step, `"square"` for the sum of
    its squares, `None` for neither.
    fold: whether columns are summed over the query heads that share a KV head; else per query head.
    decay: weight of the step's queries in the columns: the last counts 1, each one before it
    `decay` times the next.
    last_rows: how many of the step's last queries report their whole row of probabilities.
    together: how many decoded queries may wait and report at once, at the latest before something
    goes: more than one where the policy takes several as it takes one after the other. Attention
    then need not report at every token.
    queries: whether the step's queries are wanted (methods that model the queries to come).
    keys: whether all keys held are wanted with every step.
    score_keys, score_values: whether keys or values are read where something must go (`Held`).
    """

    columns: Literal["sum", "square"] | None = None
    fold: bool = True
    decay: float = 1.0
    last_rows: int = 0
    together: int = 1
    queries: bool = False
    keys: bool = False
    score_keys: bool = False
    score_values: bool = False

    @property
    def attention(self) -> bool:
        """Whether any attention probability is wanted, so that a fused kernel alone will not do."""
        return self.columns is not None or self.last_rows > 0

    @property
    def votes(self) -> bool:
        """Whether queries leave a trace in what the policy knows and cannot be taken back."""
        return self.attention or self.queries


NOTHING = Needs()
TOGETHER = 16  # enough for the cost of a report to vanish among that many steps


@dataclass(frozen=True, eq=False)
class Ask:
    """What a kernel is to do beside attending.

    step: the last `step.fresh` slots are its own tokens, which see each other causally; padded
    queries give zeros and count nowhere. scale: multiplies the product of a query and a key.
    valid: bool `[b, K, n]`, False for empty slots; None: every slot holds a token. causal: False
    for a segment of older slots, all of which every query sees. lse: whether the log-sum-exp of
    every query is wanted, for a store that holds more than these slots.
    """

    step: Step
    scale: float
    needs: Needs = NOTHING
    valid: Tensor | None = None
    causal: bool = True
    lse: bool = False


class Rows:
    """Probabilities of a step's last `count` queries over the `n` slots held, a block at a time.

    Hundreds of rows of all heads would be as large as the whole cache, so they are worked out as
    they are read and never lie side by side.

    count: how many there are. block(start, stop): float32 `[b, H, stop - start, n]`, those rows;
    size: how many are best read at once.
    """

    def __init__(self, count: int, block: Callable[[int, int], Tensor], size: int) -> None:
        self.count = count
        self.block, self.size = block, max(1, size)

    @classmethod
    def of(cls, rows: Tensor) -> Rows:
        """Rows at hand, float32 `[b, H, r, n]`."""
        return cls(rows.shape[2], lambda start, stop: rows[:, :, start:stop], rows.shape[2])

    def __iter__(self) -> Iterator[Tensor]:
        """Blocks `[b, H, few, n]`, float32, oldest query first; zeros for padded queries."""
        for start in range(0, self.count, self.size):
            yield self.block(start, min(start + self.size, self.count))

    def all(self) -> Tensor:
        """`[b, H, r, n]` at once, for those who ask for few."""
        return torch.cat(list(self), 2)


@dataclass(frozen=True, eq=False)
class Observed:
    """What one step's attention saw of the `n` slots held (the step's own `q` tokens are the last).

    Shapes: b batch, K KV heads, H query heads, n slots, q tokens of the step, r rows.
    Only what was asked for is present. Rows of padded queries are zero and count nowhere.

    columns: float32 `[b, K, n]`, summed over the step's queries and over the query heads that
    share the KV head (query head h belongs to KV head `h // (H // K)`); `[b, H, n]` without fold.
    rows: probabilities of the last `r = min(last_rows, q)` queries.
    queries: `[b, H, q, d]`. keys: `[b, K, n, d]` as held.
    fresh: `q`, how many of the slots this step brought.
    scale: what attention multiplies the product of a query and a key by.
    rotation: how the layer turns queries and keys; None where it does not, or nobody knows how.
    lse: `[b, H, q]`, natural log of the sum of exp(logit) over the slots, float32 or better; minus
    infinity where a query sees none.
    """

    fresh: int
    columns: Tensor | None = None
    rows: Rows | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    scale: float = 1.0
    rotation: Rotation | None = None
    lse: Tensor | None = None


class Held(ABC):
    """What a layer holds, for methods that score keys or values when something must go. Either is
    fetched when it is read, and once.

    scale, rotation: as in `Observed`.
    """

    def __init__(self, scale: float = 1.0, rotation: Rotation | None = None) -> None:
        self.scale, self.rotation = scale, rotation

    @property
    @abstractmethod
    def keys(self) -> Tensor:
        """`[b, K, n, d]`, as attention reads them."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """`[b, K, n, e]`, as attention reads them."""


class Viewed(Held):
    """view: fetches keys and values together: a store of few bits unpacks them."""

    def __init__(
        self,
        view: Callable[[], tuple[Tensor, Tensor]],
        scale: float = 1.0,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__(scale, rotation)
        self._view = view

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        return self._view()

    @property
    def keys(self) -> Tensor:
        """As `Held.keys`."""
        return self._both[0]

    @property
    def values(self) -> Tensor:
        """As `Held.values`."""
        return self._both[1]
