"""Budget: the most tokens a KV head may hold between two steps, as a count or as a share."""

from __future__ import annotations

from dataclasses import dataclass

from kvhive.kinds import plain
from kvhive.spec import Knob

FLOOR = 65  # a share never asks for fewer tokens: below this there is nothing worth saving


@dataclass(frozen=True)
class Budget:
    """A token count, or a share of the tokens seen.

    A share is taken of the tokens seen when a step brings more than one token (a prompt, a chunk, a
    turn) and stays put while single tokens are decoded, so that decoding costs the same per token
    for ever; in a stream that was fed single tokens from the start it follows the tokens seen. It
    never goes below 65 tokens. A count is taken as it is.
    """

    tokens: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        for knob in _PARTS:
            object.__setattr__(self, knob.name, knob.check("budget", getattr(self, knob.name)))
        if (self.tokens is None) == (self.share is None):
            raise ValueError("budget: give exactly one of tokens= and share=")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(
                f"budget: a share must lie in (0, 1], got {self.share:g}; "
                "for a number of tokens write it without a decimal point"
            )

    @classmethod
    def of(cls, value: Budget | int | float | str) -> Budget:
        """From 1024 (tokens), 0.4 (share), "1024", "0.4" or "40%".

        Raises `ValueError` for anything else, `TypeError` for another type.
        """
        if isinstance(value, Budget):
            return value
        given = plain(value)
        if isinstance(given, bool) or not isinstance(given, int | float | str):
            raise TypeError(f"budget: expected a number of tokens or a share, got {value!r}")
        number = _number(given) if isinstance(given, str) else given
        return cls(tokens=number) if isinstance(number, int) else cls(share=number)

    def resolve(self, seen: int, least: int) -> int:
        """Tokens a head may hold once `seen` were read; `least` is the policy's own minimum."""
        if self.tokens is not None:
            return self.tokens
        assert self.share is not None
        return max(round(self.share * seen), FLOOR, least)

    def __str__(self) -> str:
        return str(self.tokens) if self.share is None else repr(float(self.share))


_PARTS = (Knob("tokens", int | None, None, least=1), Knob("share", float | None, None))


def _number(text: str) -> int | float:
    """A whole number is a count, any other a share. Raises `ValueError` for what is neither."""
    text = text.strip()
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        shown = repr(text) if len(text) <= 40 else f"a text of {len(text):,} letters"
        raise ValueError(
            f"budget: {shown} is neither a number of tokens (1024) nor a share (0.4 or 40%)"
        ) from None
