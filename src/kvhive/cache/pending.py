"""A step that was attended to, but has not voted yet: it may still be taken back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from kvhive.step import Step


@dataclass(frozen=True, eq=False)
class Pending:
    """A recorded step of one layer. query: `[b, H, q, d]`, None where nobody votes. keys, values:
    `[b, K, q, d]` and `[b, K, q, e]` of drafts; None for a prompt, which stays where it is.
    """

    step: Step
    scale: float
    query: Tensor | None
    keys: Tensor | None
    values: Tensor | None

    @property
    def drafted(self) -> bool:
        """Whether these tokens are a draft, not a prompt (whose draft comes with it)."""
        return self.keys is not None

    @classmethod
    def of(
        cls, step: Step, scale: float, query: Tensor | None, keys: Tensor, values: Tensor
    ) -> Pending:
        """Of a step just taken."""
        query = None if query is None else query.detach()
        if step.phase == "prefill":
            return cls(step, scale, query, None, None)
        return cls(step, scale, query, keys.detach(), values.detach())

    def part(self, start: int, stop: int) -> Pending:
        """Its tokens start..stop-1 alone."""
        query, keys, values = (
            None if tensor is None else tensor[:, :, start:stop]
            for tensor in (self.query, self.keys, self.values)
        )
        return replace(
            self, step=self.step.part(start, stop), query=query, keys=keys, values=values
        )

    def select_rows(self, rows: Tensor) -> Pending:
        """Re-index the batch: row i becomes what row `rows[i]` was."""
        query, keys, values = (
            None if tensor is None else tensor.index_select(0, rows)
            for tensor in (self.query, self.keys, self.values)
        )
        return replace(
            self, step=self.step.select_rows(rows), query=query, keys=keys, values=values
        )

    @property
    def nbytes(self) -> int:
        """Bytes of what waits."""
        held = (self.query, self.keys, self.values)
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)
