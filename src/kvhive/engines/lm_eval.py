"""A model "kvhive" for lm-evaluation-harness: any of its tasks on a compressed cache.

    python -m kvhive.engines.lm_eval --model kvhive \\
        --model_args pretrained=smollm2,recipe=buzz@0.4 --tasks TASK --batch_size 4

The harness loads no plug-ins, so its command line is started through this module, which registers the
model first; in Python `import kvhive.engines.lm_eval` is enough. Needs `kvhive[lm-eval]`.

Every context is read through the recipe's cache and compressed as a whole (the harness does not tell
a question from its context: mode "aware"). Continuations are scored token by token on what is left,
and generation decodes from it. A recipe with commas is given as JSON:
`--model_args '{"pretrained": "smollm2", "recipe": "buzz(stride=5, drain=false)@0.4"}'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from kvhive.cache import HiveCache
from kvhive.evaluation.voices import evicts_while_decoding
from kvhive.models import load
from kvhive.recipe import Recipe

Request = tuple[tuple[str, str], list[int], list[int]]  # texts; ids of context and continuation


@register_model("kvhive")
class KvhiveLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model with a recipe for its caches.

    pretrained: a name for `kvhive.load`, or a model at hand (then with `tokenizer`). recipe: as
    everywhere. batch_size: contexts read at once; a whole number. dtype, device: as for `kvhive.load`.
    """

    def __init__(
        self,
        pretrained: Any = "smollm2",
        recipe: str = "full",
        dtype: str = "bfloat16",
        device: str | None = "cpu",
        batch_size: int | str = 1,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"kvhive: batch_size must be a whole number, got {batch_size!r}")
        self.recipe = Recipe.parse(recipe)
        if isinstance(pretrained, str):
            pretrained, tokenizer = load(pretrained, dtype=dtype, device=device or "cpu")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        HiveCache.for_model(pretrained, self.recipe)  # says now what cannot work
        super().__init__(
            pretrained=pretrained, tokenizer=tokenizer, batch_size=int(batch_size), **options
        )

    @property
    def max_length(self) -> int:
        """The most tokens of context and answer; with room for one token that is never fed."""
        return int(super().max_length)

    def _cache(self) -> HiveCache:
        return HiveCache.for_model(self.model, self.recipe)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """Greedy or sampled continuations of a left-padded batch, through the recipe's cache."""
        cache = self._cache()
        output: Tensor = super()._model_generate(
            context, max_length, stop, past_key_values=cache, **generation_kwargs
        )
        return output

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Of every continuation: its log probability, and whether greedy decoding would say it.

        Requests with the same context share one reading of it.
        """
        places: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            room = self.max_length - len(continuation) + 1
            places.setdefault(tuple(context[-room:]), []).append(place)
        contexts = iter(sorted(places, key=lambda ids: (-len(ids), ids)))
        answers: dict[int, tuple[float, bool]] = {}
        while batch := list(islice(contexts, override_bs or self.batch_size)):
            rows = [(row, place) for row, ids in enumerate(batch) for place in places[ids]]
            scored = self._score(batch, [row for row, _ in rows], [requests[p][2] for _, p in rows])
            for (_, place), answer in zip(rows, scored, strict=True):
                answers[place] = answer
                self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
        return [answers[place] for place in range(len(requests))]

    @torch.no_grad()
    def _score(
        self,
        contexts: Sequence[Sequence[int]],
        rows: list[int],
        continuations: Sequence[Sequence[int]],
    ) -> list[tuple[float, bool]]:
        """`continuations[i]` after `contexts[rows[i]]`; the contexts are read as one padded batch."""
        cache, pad = self._cache(), self.tokenizer.pad_token_id
        width = max(map(len, contexts))
        ids = torch.tensor([[pad] * (width - len(c)) + list(c) for c in contexts])
        mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts])
        logits = self._step(cache, ids, mask)[:, -1]
        index = torch.tensor(rows)
        cache.batch_select_indices(index.to(self.device))
        logits, mask = logits[index.to(logits.device)], mask[index]
        longest = max(map(len, continuations))
        # What follows a continuation's end is read, but not scored.
        answer = torch.tensor([[*c, *[c[-1]] * (longest - len(c))] for c in continuations])
        size = 1
        if not evicts_while_decoding(self.recipe):
            cache.freeze()
            size = longest
        told = [logits[:, None]]
        for start in range(0, longest - 1, size):
            step = answer[:, start : min(start + size, longest - 1)]
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            told.append(self._step(cache, step, mask))
        return _sums(torch.cat(told, 1), answer.to(logits.device), list(map(len, continuations)))

    def _step(self, cache: HiveCache, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits `[rows, tokens, vocabulary]` of new tokens; mask: of all tokens so far."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits


def _sums(logits: Tensor, answer: Tensor, lengths: list[int]) -> list[tuple[float, bool]]:
    """Sum of log probabilities and greedy agreement of the first `lengths[i]` tokens of each row."""
    scored = []
    for row, length in enumerate(lengths):
        wide, tokens = logits[row, :length].float(), answer[row, :length]
        chosen = wide.gather(-1, tokens[:, None])[:, 0] - wide.logsumexp(-1)
        scored.append((float(chosen.double().sum()), bool((wide.argmax(-1) == tokens).all())))
    return scored


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
