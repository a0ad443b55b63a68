"""What a compressed cache must answer: attention over the tokens it kept, by transformers alone."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvhive.cache.hive_cache import HiveCache
from tests.support import random_ids, read


@torch.no_grad()
def check_dense_decoding(model: PreTrainedModel, stock: PreTrainedModel, recipe: str) -> HiveCache:
    """Logits after a compressed prompt equal those of the stock model on the tokens kept.

    Keys and values of the whole prompt are computed by the stock model, those of the kept positions
    are picked out by hand into a stock cache, and decoding goes on with the real positions. The
    recipe must not evict while decoding. Returns the compressed cache.
    """
    prompt, decoded = 90, 6
    ids = random_ids(1, prompt + decoded, seed=3)
    cache = HiveCache.for_model(model, recipe)
    ours = read(model, cache, ids[:, :prompt], prompt)
    whole = DynamicCache(config=stock.config)
    theirs = read(stock, whole, ids[:, :prompt], prompt)
    assert torch.allclose(ours, theirs, atol=1e-4), "the prompt itself is attended in full"
    picked = pick(whole, cache.positions_kept())
    for place in range(prompt, prompt + decoded):
        token, position = ids[:, place : place + 1], torch.tensor([[place]])
        expected = stock(token, past_key_values=picked, position_ids=position).logits
        logits = model(token, past_key_values=cache, position_ids=position).logits
        assert torch.allclose(logits, expected, atol=1e-4)
    return cache


def pick(whole: DynamicCache, kept: list[Tensor]) -> DynamicCache:
    """A stock cache of the positions kept, int `[1, K, n]` for each layer."""
    picked = DynamicCache()
    for index, position in enumerate(kept):
        layer = whole.layers[index]
        place = position.long()[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
        picked.update(layer.keys.gather(2, place), layer.values.gather(2, place), index)
    return picked
