"""What knobs of packed stores have in common: bits there are, and groups that divide a head."""

from __future__ import annotations

from typing import Any

from kvhive.kernels.bits import MULTIPLE, WIDTHS
from kvhive.spec import Spec, knob

GROUP = 32  # numbers that share a grid, where nothing else is asked for


def bits_knob(of_what: str, default: int | None = 4) -> Any:
    """A knob for a number of bits."""
    return knob(default, f"bits {of_what}: {_WORDS}")


def check_bits(spec: Spec, *names: str) -> None:
    """Raises `ValueError` for a number of bits that there is no packing for."""
    for name in names:
        value = getattr(spec, name)
        if value is not None and value not in WIDTHS:
            raise ValueError(f"{spec.name}: {name} must be {_WORDS}, got {value}")


def group_for(owner: str, width: int, wanted: int | None) -> int:
    """Channels of a head of `width` numbers that share a grid.

    Raises `ValueError` for a head that cannot be packed, or that `wanted` does not divide.
    """
    if width % MULTIPLE:
        raise ValueError(
            f"{owner} packs heads whose size is a multiple of {MULTIPLE}; this model's have {width}"
        )
    fitting = [size for size in range(MULTIPLE, width + 1, MULTIPLE) if not width % size]
    if wanted is None:
        return max(size for size in fitting if size <= GROUP)
    if wanted not in fitting:
        sizes = ", ".join(map(str, fitting))
        raise ValueError(
            f"{owner}: group={wanted} does not divide this model's heads of {width} numbers into "
            f"whole bytes; choose one of {sizes}"
        )
    return wanted


def due_in_groups(tail: int, residual: int) -> int:
    """How many of `tail` newest tokens are packed, GROUP at once; `residual` stay at least."""
    return max(0, (tail - residual) // GROUP * GROUP)


_WORDS = f"{', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]}"
