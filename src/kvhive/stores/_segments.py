"""A packed store as the segments that a GPU's kernels walk over in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels.packed_segments import ExactRows, Form, Segment, cut
from kvhive.stores._side import Side


def served(keys: Side, values: Side, reports: bool) -> bool:
    """Whether both sides can be cut so: every part in bits, and where a report is wanted, one part
    alone, whose tokens lie in the order of the slots.
    """
    if not (keys.forms and values.forms):
        return False
    parts = [*keys.parts, *values.parts]
    alike = len({form.spreads for side in (keys, values) for form in side.forms}) == 1
    few = not reports or (len(keys.parts) == 1 and len(values.parts) == 1)
    return alike and few and all(part.packed_rows is not None for part in parts)


def segments_of(keys: Side, values: Side, length: int) -> list[Segment]:
    """Of rows right-aligned in `length` slots. What is exact is turned as what is packed."""
    at = length - (keys.sink_counts + keys.lengths)
    return cut(_forms(keys), _forms(values), at)


def _forms(side: Side) -> list[Form]:
    exact, turned = side.exact, side.forms[0].turned
    tokens = exact.tokens
    if side.forms[0].spreads:
        tokens = turned(tokens.float()).to(tokens.dtype)
    numbers = tokens.reshape(-1, tokens.shape[2])
    first = torch.arange(len(tokens)) * exact.used
    counts = side.sink_counts
    empty: Tensor | int = 0 if exact.empty is None else exact.empty
    newest = ExactRows(numbers, first + exact.sinks + empty, exact.tail - empty + 0 * counts)
    sinks = ExactRows(numbers, first + exact.sinks - counts, counts)
    packed = [part.packed_rows for part in side.parts if part.packed_rows is not None]
    return [sinks, *packed, newest]
