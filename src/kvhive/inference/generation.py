"""Feed a model through a HiveCache by hand: read a prompt, then decode token by token.

`model.generate` does the same; these loops exist where every step is measured or compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvhive.cache.hive_cache import HiveCache
from kvhive.inference.driver import Driver, chunks

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

    chunk: tokens to a step, after each of which the cache evicts; None: all in one step. tick: gets
    the share that has been read. Raises `ValueError` for a chunk below 1, and for no ids.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill chunk must be at least 1 token, got {chunk}")
    if not ids:
        raise ValueError("there is nothing to read: give at least 1 token id")
    driver = Driver(model)
    for start, stop in chunks(len(ids), chunk):
        logits = driver.step(cache, torch.tensor([ids[start:stop]]))
        if tick is not None:
            tick(stop / len(ids))
    return logits[0, -1]


def decode(
    model: PreTrainedModel,
    cache: HiveCache,
    logits: Tensor,
    limit: int,
    ends: Collection[int] = (),
    temperature: float = 0.0,
) -> Iterator[tuple[int, Tensor]]:
    """Up to `limit` new tokens, each with the logits `[vocabulary]` it was taken from.

    temperature: 0 takes the likeliest token, above 0 draws one. Stops behind a token in `ends`,
    which is yielded too; the last token is not fed to the model.
    """
    driver = Driver(model)
    for step in range(limit):
        token = _pick(logits, temperature)
        yield token, logits
        if token in ends or step == limit - 1:
            return
        logits = driver.step(cache, torch.tensor([[token]]))[0, -1]


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


def _pick(logits: Tensor, temperature: float) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.float() / temperature).softmax(-1), 1))
