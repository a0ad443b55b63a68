"""Cells of tables whose ground is the stronger the more they say."""

from __future__ import annotations

from dataclasses import dataclass

from kvhive.templates import SHADES


@dataclass(frozen=True)
class HeatCell:
    """A number as it is written. shade: of its ground, from 0 for the least to `SHADES`."""

    text: str
    shade: int

    @classmethod
    def of(cls, text: str, share: float) -> HeatCell:
        """share: of the strongest ground, in [0, 1]."""
        return cls(text, round(SHADES * share))
