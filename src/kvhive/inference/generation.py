"""Feed a model through a HiveCache by hand: read a prompt, then decode token by token.

`model.generate` does the same; these loops exist where every step is measured or compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvhive.cache.hive_cache import HiveCache
from kvhive.cache.reading import prefill
from kvhive.cache.reconstruction import check_fits
from kvhive.inference.sampling import GREEDY, Sampling
from kvhive.model.forward import forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read(
    model: PreTrainedModel,
    cache: HiveCache,
    ids: Sequence[int],
    chunk: int | None = None,
    tick: Callable[[float], None] | None = None,
) -> Tensor:
    """Feed the token ids through the cache; logits `[vocabulary]` of the token that comes next.

    As `kvhive.cache.reading.prefill`, for one row.
    """
    return prefill(model, cache, torch.tensor([list(ids)], dtype=torch.int64), chunk, tick=tick)[0]


def decode(
    model: PreTrainedModel,
    cache: HiveCache,
    logits: Tensor,
    limit: int,
    ends: Collection[int] = (),
    sampling: Sampling = GREEDY,
) -> Iterator[tuple[int, Tensor]]:
    """Up to `limit` new tokens, each with the logits `[vocabulary]` it was taken from.

    sampling: how it is taken. Stops behind a token in `ends`, which is yielded too; the last token
    is not fed to the model.
    """
    for step in range(limit):
        token = sampling.pick(logits)
        yield token, logits
        if token in ends or step == limit - 1:
            return
        logits = forward(model, cache, torch.tensor([[token]]))[0, -1]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the model's own and the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(token for token in [*listed, tokenizer.eos_token_id] if token is not None)


def check_length(cache: HiveCache, prompt: int, new: int, chunk: int | None) -> None:
    """Whether the model stays within the length it was trained on.

    prompt: tokens to read, in steps of `chunk`; new: tokens to decode. Raises `ValueError` that
    says what would help.
    """
    trained = cache.facts.trained_length
    if trained is None or _farthest(cache, prompt, new, chunk) <= trained:
        check_fits(cache, _farthest(cache, prompt, 0, chunk), min(chunk or prompt, prompt))
        return
    what = f"{prompt:,} tokens to read and {new:,} to write"
    if cache.recipe.budget is None:
        way = "give a shorter text, or leave that recipe out"
    elif cache.facts.rotations is None:
        way = f"give a shorter text ({cache.facts.no_rotation})"
    elif cache.positions == "cache":
        way = "read it in chunks (--prefill-chunk 512, prefill_chunk=512) at a smaller budget"
    else:
        way = (
            f"count positions in the cache ({cache.recipe.policy.name}(positions=cache)@1024) and "
            "read it in chunks (--prefill-chunk 512, prefill_chunk=512)"
        )
    raise ValueError(
        f"{cache.recipe}: {what} are more than the {trained:,} positions the model was trained "
        f"on; {way}"
    )


def _farthest(cache: HiveCache, prompt: int, new: int, chunk: int | None) -> int:
    """The largest distance between two tokens, plus one, that the model will see."""
    total, recipe = prompt + new, cache.recipe
    if cache.positions == "original" or recipe.budget is None:
        return total
    sizing = recipe.policy.sizing
    budget = recipe.budget.resolve(total, sizing.least)
    step = min(chunk or prompt, prompt)
    return min(total, max(step, sizing.peak(budget) + (step if chunk else 1)))
