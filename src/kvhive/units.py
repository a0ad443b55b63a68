"""Sizes and counts as people write them: 24MiB, 1.5 GB, 32k."""

from __future__ import annotations

import re
from fractions import Fraction

MIB = 2**20
MOST_TOKENS = 2**31 - 1
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)")
_SIZE = "a size such as 24MiB, 40GiB, 1.5GB or a whole number of bytes"


def parse_bytes(value: int | str) -> int:
    """Bytes of a size: KiB, MiB, GiB, TiB are powers of 1,024; kB, MB, GB, TB of 1,000.

    Letters may be of either case, a space may come before the unit, and parts of a byte are left
    out. A plain number is bytes. Raises `ValueError` for anything else, "40G" too (which of the
    two?), and for less than one byte; `TypeError` for what is neither a text nor a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"size: expected {_SIZE}, got {value!r}")
    number = value if isinstance(value, int) else _bytes(value)
    if number < 1:
        raise ValueError(f"size: expected at least 1 byte, got {value!r}")
    return number


def _bytes(text: str) -> int:
    match = _NUMBER.fullmatch(text.strip().lower())
    number, unit = match.groups() if match else ("", "?")
    if unit and unit in _POWERS:
        letter = unit.upper()
        raise ValueError(
            f"size: {text!r} may mean two things; write {number}{letter}iB (powers of 1,024) or "
            f"{number}{letter}B (powers of 1,000)"
        )
    binary = unit.endswith("ib")
    power = _POWERS.get(unit.removesuffix("ib" if binary else "b"))
    if power is None or unit == "ib" or (not unit and "." in number):
        raise ValueError(f"size: cannot read {text!r}; expected {_SIZE}")
    return int(Fraction(number) * (1024 if binary else 1000) ** power)


def bytes_text(number: int) -> str:
    """Bytes for people, in powers of 1,024, with three digits or so: 3.1 MiB."""
    size, units = float(number), iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1023.95 and unit != "TiB":
        size, unit = size / 1024, next(units)
    if unit == "bytes":
        return f"{number:,} byte{'s' * (number != 1)}"
    return f"{size:,.1f} {unit}"


def parse_tokens(text: str) -> int:
    """A number of tokens: 4096, 4,096, or 32k for 32 x 1,024 = 32,768 (and 1m for 1,048,576).

    Raises `ValueError` for anything else and for less than one token.
    """
    match = _NUMBER.fullmatch(text.strip().lower().replace(",", "").replace("_", ""))
    number, unit = match.groups() if match else ("", "?")
    if unit not in ("", "k", "m"):
        raise ValueError(f"tokens: cannot read {text!r}; expected 4096, or 32k for 32,768")
    tokens = Fraction(number) * 1024 ** _POWERS[unit]
    if tokens < 1 or tokens.denominator != 1:
        raise ValueError(f"tokens: expected a whole number of at least 1, got {text!r}")
    if tokens > MOST_TOKENS:
        raise ValueError(f"tokens: must be at most {MOST_TOKENS}, got {text!r}")
    return int(tokens)
