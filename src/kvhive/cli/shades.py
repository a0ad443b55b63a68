"""Grounds of the terminal: from dark to bright, with letters that stay readable on them."""

from __future__ import annotations

SHADES = (
    "#b9a98c on #2b2417",
    "#d9c7a4 on #4a3815",
    "#f3e6cc on #715012",
    "#1a1408 on #b87c10",
    "bold #1a1408 on #ffb020",
)


def shade_of(share: float) -> str:
    """The style for a share in [0, 1]: the brighter the more."""
    return SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]
