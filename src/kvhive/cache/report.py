"""What a cache holds: tokens and bytes, per layer and head, against the full cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvhive.units import MIB


@dataclass(frozen=True)
class Report:
    """The truth about a cache at one moment.

    seen: int64 `[rows]`, real tokens each row has read. kept: int64 `[layers, rows, kv_heads]`,
    tokens held by every head of the compressed layers (`layers` lists their indices). nbytes: bytes
    of every tensor held, metadata and spare room included, stock layers too. full_nbytes: bytes of
    keys and values that the full cache would hold for the same tokens (padding included, as it
    does).
    """

    recipe: str
    positions: str
    layers: tuple[int, ...]
    seen: Tensor
    kept: Tensor
    nbytes: int
    full_nbytes: int

    @property
    def tokens_seen(self) -> int:
        """Tokens read by the longest row."""
        return int(self.seen.max()) if self.seen.numel() else 0

    @property
    def tokens_kept(self) -> float:
        """Mean number of tokens a KV head holds for the longest row."""
        return float(self.kept[:, self.seen.argmax()].double().mean()) if self.kept.numel() else 0.0

    @property
    def ratio(self) -> float:
        """How many times smaller than the full cache, in bytes."""
        return self.full_nbytes / self.nbytes if self.nbytes else 1.0

    def __str__(self) -> str:
        rows = f" in the longest of {len(self.seen)} rows" if len(self.seen) > 1 else ""
        return (
            f"{self.tokens_seen:,} tokens seen{rows}, {self.tokens_kept:,.0f} kept, "
            f"{self.nbytes / MIB:.1f} MiB of {self.full_nbytes / MIB:.1f} MiB ({self.ratio:.2f}x)"
        )

    def as_data(self) -> dict[str, Any]:
        """The main figures as plain values, for JSON."""
        return {
            "recipe": self.recipe,
            "tokens_seen": self.tokens_seen,
            "tokens_kept": self.tokens_kept,
            "cache_bytes": self.nbytes,
            "full_cache_bytes": self.full_nbytes,
            "times_smaller": self.ratio,
        }

    def _repr_html_(self) -> str:
        from kvhive.templates import render

        cells = (
            ("tokens seen", f"{self.tokens_seen:,}"),
            ("tokens kept, mean of a head", f"{self.tokens_kept:,.0f}"),
            ("MiB", f"{self.nbytes / MIB:.1f}"),
            ("full cache, MiB", f"{self.full_nbytes / MIB:.1f}"),
            ("times smaller", f"{self.ratio:.2f}"),
            ("rows", f"{len(self.seen)}"),
        )
        return render("cache_report.html.j2", report=self, cells=cells)


def summary(recipe: object, report: Callable[[], Report]) -> str:
    """One line about a cache in any state, for its `repr`, which must not raise."""
    try:
        held = report()
        if not held.nbytes:
            return f"HiveCache({recipe}: empty)"
        rows = f"{len(held.seen)} rows, " if len(held.seen) > 1 else ""
        return (
            f"HiveCache({recipe}: {rows}{held.tokens_seen:,} tokens seen, "
            f"{held.tokens_kept:,.0f} kept, {held.nbytes / MIB:.1f} MiB)"
        )
    except Exception as error:  # whatever a step that failed halfway has left
        return f"HiveCache({recipe}: cannot be read, {type(error).__name__})"
