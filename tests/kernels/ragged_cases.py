"""Random ragged rows for tests of kernels that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvhive.kernels import Needs
from kvhive.kernels.ragged import Extents

HEADROOM = 3  # slots behind each row, at most


@dataclass
class Case:
    """Arguments of `attend` and `report`. Slots of no row hold NaN, so that whoever reads one gives
    himself away.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    extents: Extents
    scale: float
    needs: Needs

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Without where they lie."""
        return self.query, self.keys, self.values


def case(
    lengths: Sequence[Sequence[int]],
    group: int = 4,
    widths: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32,
    q: int = 1,
    seed: int = 0,
    needs: Needs = Needs(columns="sum"),  # noqa: B008
    index: torch.dtype = torch.int64,
    padded: bool = False,
    device: str = "cpu",
) -> Case:
    """Rows of `lengths` [batch row][KV head] that lie in any order."""
    source = torch.Generator().manual_seed(seed)
    flat = torch.tensor(lengths).flatten()
    rooms = flat + torch.randint(0, HEADROOM + 1, flat.shape, generator=source)
    order = torch.randperm(len(flat), generator=source)
    starts = torch.empty_like(flat)
    starts[order] = rooms[order].cumsum(0) - rooms[order]
    slots = int(rooms.sum())
    own = torch.zeros(slots, 1, dtype=torch.bool)
    for start, length in zip(starts.tolist(), flat.tolist(), strict=True):
        own[start : start + length] = True

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    keys, values = (
        normal(slots, width).masked_fill(~own, float("nan")).to(device, dtype) for width in widths
    )
    heads = len(lengths[0]) * group
    query = normal(len(lengths), q, heads, widths[0]).to(device, dtype).transpose(1, 2)
    valid = (torch.rand(slots, generator=source) < 0.7).to(device) if padded else None
    places = starts.to(device, index), flat.to(device, index)
    extents = Extents(*places, int(flat.max()), valid)
    return Case(query, keys, values, extents, widths[0] ** -0.5, needs)


def needs() -> st.SearchStrategy[Needs]:
    """All that can be asked about attention."""
    return st.builds(
        Needs,
        columns=st.sampled_from([None, "sum", "square"]),
        fold=st.booleans(),
        decay=st.sampled_from([1.0, 0.9, 0.0]),
        last_rows=st.sampled_from([0, 1, 3, 100]),
    )


def lengths(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    """Of one to three KV heads in one or two rows of a batch."""
    return st.integers(1, 3).flatmap(
        lambda heads: st.lists(
            st.lists(sizes, min_size=heads, max_size=heads), min_size=1, max_size=2
        )
    )
