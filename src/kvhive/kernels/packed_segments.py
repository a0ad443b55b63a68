"""Rows whose tokens lie in several forms, cut into segments that kernels walk over in one pass.

A row is one KV head of one row of the batch; its first tokens may be exact (sinks), the next in few
bits, the newest exact again. Where keys and values change their form at different tokens (KIVI), a
segment ends at both places: all its keys have one form, and all its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.kernels.packed_rows import PackedRows


@dataclass(eq=False)
class ExactRows:
    """R rows of tokens as the model wrote them.

    numbers: `[S, width]` in a float dtype; starts, lengths: int64 `[R]` on the CPU, as in
    `PackedRows`: slot of a row's first token, and its tokens.
    """

    numbers: Tensor
    starts: Tensor
    lengths: Tensor

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self.numbers.shape[-1]


Form = ExactRows | PackedRows


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens of R rows whose keys have one form, and whose values have one.

    All int64 `[R]` on the CPU. lengths: tokens of each row, which may be none. key_first,
    value_first: of a row's segment the first token, counted in the row of `keys` and of `values`.
    at: that token's place among all tokens of its row, the oldest being 0.
    """

    keys: Form
    values: Form
    lengths: Tensor
    key_first: Tensor
    value_first: Tensor
    at: Tensor


def cut(keys: Sequence[Form], values: Sequence[Form], at: Tensor) -> list[Segment]:
    """The segments of rows whose keys lie in `keys`, one part after the other, and whose values in
    `values`; parts that no row has are left out.

    at: int64 `[R]` on the CPU, the place of each row's first token: 0, or more where rows are
    right-aligned. Raises ValueError where a row has not as many keys as values.
    """
    held = [torch.stack([part.lengths for part in parts]).sum(0) for parts in (keys, values)]
    if not torch.equal(*held):
        raise ValueError(
            f"values: expected as many tokens a row as keys, {held[0].tolist()}, "
            f"got {held[1].tolist()}"
        )
    segments = []
    key_start = torch.zeros_like(at)
    for key in keys:
        value_start = torch.zeros_like(at)
        for value in values:
            first = torch.maximum(key_start, value_start)
            last = torch.minimum(key_start + key.lengths, value_start + value.lengths)
            lengths = (last - first).clamp_min(0)
            if lengths.any():
                starts = first - key_start, first - value_start
                segments.append(Segment(key, value, lengths, *starts, at + first))
            value_start = value_start + value.lengths
        key_start = key_start + key.lengths
    return segments
