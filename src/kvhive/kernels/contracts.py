"""What a policy asks of attention, and what attention reports back.

Plain values only: nothing here knows a policy, a store or a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvhive.rope import Rotation


@dataclass(frozen=True)
class Needs:
    """What a policy must be told about the attention of each step. The kernel computes this and no
    more.

    columns: `"sum"` for the attention every slot received in this step, `"square"` for the sum of
        its squares, `None` for neither.
    fold: whether columns are summed over the query heads that share a KV head; else per query head.
    decay: weight of the step's queries in the columns: the last counts 1, each one before it
    `decay`
        times the next.
    last_rows: how many of the step's last queries report their whole row of probabilities.
    keys: whether the keys held are wanted (methods that score keys instead of attention).
    queries: whether the step's queries are wanted (methods that model the queries to come).
    values: whether the values held are wanted.
    """

    columns: Literal["sum", "square"] | None = None
    fold: bool = True
    decay: float = 1.0
    last_rows: int = 0
    keys: bool = False
    queries: bool = False
    values: bool = False

    @property
    def attention(self) -> bool:
        """Whether any attention probability is wanted, so that a fused kernel alone will not do."""
        return self.columns is not None or self.last_rows > 0

    @property
    def votes(self) -> bool:
        """Whether queries leave a trace in what the policy knows and cannot be taken back."""
        return self.attention or self.queries


NOTHING = Needs()


@dataclass(frozen=True)
class Observed:
    """What one step's attention saw of the `n` slots held (the step's own `q` tokens are the last).

    Shapes: b batch, K KV heads, H query heads, n slots, q tokens of the step, r rows.
    Only what was asked for is present. Rows of padded queries are zero and count nowhere.

    columns: float32 `[b, K, n]`, summed over the step's queries and over the query heads that
        share the KV head (query head h belongs to KV head `h // (H // K)`); `[b, H, n]` without
        fold.
    rows: float32 `[b, H, r, n]`, probabilities of the last `r = min(last_rows, q)` queries.
    keys, values: `[b, K, n, d]` as held. queries: `[b, H, q, d]`.
    fresh: `q`, how many of the slots this step brought.
    scale: what attention multiplies the product of a query and a key by.
    rotation: how the layer turns queries and keys; None where it does not, or nobody knows how.
    """

    fresh: int
    columns: Tensor | None = None
    rows: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    queries: Tensor | None = None
    scale: float = 1.0
    rotation: Rotation | None = None
