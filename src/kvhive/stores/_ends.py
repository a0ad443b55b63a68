"""How tokens of all rows, one row after another, are laid side by side for a packed store."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_rows(tensor: Tensor) -> Tensor:
    """`[b, K, q, d]` as rows `[b * K, q, d]` that may be written to later."""
    rows = tensor.reshape(-1, *tensor.shape[2:])
    return rows.clone() if rows.is_inference() else rows


def ends(flat: Tensor, counts: Tensor, sinks: Tensor, tail: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of tokens `[N, d]`, `counts` of each row one row after another: the first `sinks` and the
    last `tail` of each row, `[R, most sinks + longest tail, d]`, both right-aligned, and which
    columns are missing; None: none is. All int64 `[R]`.
    """
    base = counts.cumsum(0) - counts
    parts, missing = [], []
    for size, end in ((sinks, base + sinks), (tail, base + counts)):
        most = int(size.max())
        back = torch.arange(most, 0, -1, device=flat.device)
        parts.append((end[:, None] - back).clamp(0, max(len(flat) - 1, 0)))
        missing.append(back > size[:, None])
    gone = torch.cat(missing, 1)
    return flat[torch.cat(parts, 1)], gone if bool(gone.any()) else None


def aligned_labels(labels: Tensor, row: Tensor, rows: int) -> Tensor:
    """uint8 `[rows, most]`, right-aligned, of labels `[N]` in rows `[N]`, one row after another."""
    counts = row.bincount(minlength=rows)
    most = int(counts.max()) if rows else 0
    held = torch.arange(most, device=row.device) >= most - counts[:, None]
    found = torch.zeros(rows, most, dtype=torch.uint8, device=row.device)
    found[held] = labels.to(torch.uint8)
    return found
