"""What a policy needs of attention, in words, for tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvhive.kernels import Needs


def needs_text(needs: Needs) -> str:
    """What a policy asks of attention, in words."""
    wants = []
    if needs.columns is not None:
        squares = {"sum": "column sums", "square": "column sums of squares"}
        wants.append(squares[needs.columns])
    if needs.last_rows:
        wants.append("last row" if needs.last_rows == 1 else f"last {needs.last_rows} rows")
    parts = {"keys": needs.keys or needs.score_keys, "queries": needs.queries}
    parts["values"] = needs.score_values
    wants += [part for part, wanted in parts.items() if wanted]
    return ", ".join(wants) or "nothing"
