"""What a cache can read: ids and their padding, checked against what it has seen."""

from __future__ import annotations

from torch import Tensor

from kvhive.cache.progress import Progress


def check_reading(ids: Tensor, mask: Tensor | None, progress: Progress) -> None:
    """Raises `ValueError` unless ids are `[rows, tokens]` and the mask covers them, and all tokens
    seen before, with padding on the left alone.
    """
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError(
            "read: input_ids must be token ids [rows, tokens], at least one, got "
            f"{ids.dtype} of shape {tuple(ids.shape)}"
        )
    if mask is None:
        if progress.rows is not None:
            raise ValueError(
                "read: this cache holds a padded batch; give attention_mask [rows, seen + tokens] "
                f"for the {progress.seen} tokens seen and these"
            )
        return
    wanted = (len(ids), progress.seen + ids.shape[1])
    if tuple(mask.shape) != wanted:
        raise ValueError(
            f"read: attention_mask must have the shape {wanted} (rows, tokens seen before and "
            f"these), got {tuple(mask.shape)}"
        )
    if not bool(mask[:, -1].all()):
        raise ValueError(
            "read: a row ends in padding; pad on the left (tokenizer.padding_side = 'left'), so "
            "that what comes next follows the last token of every row"
        )
