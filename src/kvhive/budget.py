"""Budget: the most tokens a KV head may hold between two steps, as a count or as a share."""

from __future__ import annotations

from dataclasses import dataclass

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
        if (self.tokens is None) == (self.share is None):
            raise ValueError("budget: give exactly one of tokens= and share=")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"budget: a token count must be at least 1, got {self.tokens}")
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
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError(f"budget: expected a number of tokens or a share, got {value!r}")
        if isinstance(value, int):
            return cls(tokens=value)
        if isinstance(value, float):
            return cls(share=value)
        text = value.strip()
        try:
            if text.endswith("%"):
                return cls(share=float(text[:-1]) / 100)
            if text.lstrip("+-").isdigit():
                return cls(tokens=int(text))
            number = float(text)
        except ValueError as error:
            if str(error).startswith("budget:"):
                raise
            raise ValueError(
                f"budget: {value!r} is neither a number of tokens (1024) nor a share (0.4 or 40%)"
            ) from None
        return cls(share=number)

    def resolve(self, seen: int, least: int) -> int:
        """Tokens a head may hold once `seen` were read; `least` is the policy's own minimum."""
        if self.tokens is not None:
            return self.tokens
        assert self.share is not None
        return max(round(self.share * seen), FLOOR, least)

    def __str__(self) -> str:
        return str(self.tokens) if self.share is None else repr(float(self.share))
