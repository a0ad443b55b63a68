"""Decodes with a compiled model and prints, as JSON, what it took; run by `test_decode_cost.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvhive.cache import attention
from kvhive.cache.hive_cache import HiveCache
from tests.support import random_ids, tiny_llama

RECIPES = ("full", "h2o@40", "streaming_llm@40")


@torch.no_grad()
def decode(recipe: str) -> dict[str, Any]:
    """frames: compiled so far, after each step. places: where graphs broke. left: how often the
    last step left them for the cache.
    """
    torch._dynamo.reset()
    calls = calls_outside()
    model, ids = tiny_llama(), random_ids(1, 80)
    plain, compiled = (HiveCache.for_model(model, recipe) for _ in range(2))
    counter = CompileCounter()
    fast = torch.compile(model, backend=counter)
    for cache in (plain, compiled):
        model(ids[:, :60], past_key_values=cache)
    frames = []
    for place in range(60, 70):
        step = ids[:, place : place + 1]
        expected = model(step, past_key_values=plain).logits
        calls[0] = 0
        given = fast(step, past_key_values=compiled).logits
        assert torch.allclose(given, expected, atol=1e-5), recipe
        left = calls[0]
        frames.append(counter.frame_count)
    told = torch._dynamo.explain(model)(ids[:, 70:71], past_key_values=compiled)
    frame = {
        (reason.user_stack[-1].filename, reason.user_stack[-1].name)
        for reason in told.break_reasons
    }
    places = sorted(f"{Path(file).name}:{name}" for file, name in frame)
    return {
        "frames": frames,
        "places": places,
        "left": left,
        "layers": len(compiled.hive_layers()),
    }


def calls_outside() -> list[int]:
    """One number, counted up whenever a step calls what is kept out of graphs."""
    calls, inner = [0], attention._attend

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return inner(*arguments)

    attention._attend_untraced = torch.compiler.disable(counted)
    return calls


if __name__ == "__main__":
    print(json.dumps({recipe: decode(recipe) for recipe in RECIPES}))
