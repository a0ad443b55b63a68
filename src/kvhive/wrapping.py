"""Where the name of a recipe or a task may be broken: never within a word or a number."""

from __future__ import annotations

import re

_BETWEEN = re.compile(r"(?<=[_(,])|(?=[@/+])")


def pieces(name: str) -> list[str]:
    """The parts between which a line may end: "h2o(", "recent=6)", "@0.4"."""
    return _BETWEEN.split(name)


def wrap(name: str, width: int) -> str:
    """The name in lines of at most `width` letters, as far as its pieces allow."""
    lines = [""]
    for piece in pieces(name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
