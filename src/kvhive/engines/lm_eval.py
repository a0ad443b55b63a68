"""A model "kvhive" for lm-evaluation-harness: any of its tasks on compressed caches.

Importing this module registers the model; `kvhive lm-eval` does so and then runs the harness's own
command line, which looks for no plug-ins itself. Needs `kvhive[lm-eval]`.

The harness does not tell a question from its context, so a recipe compresses what it is given as a
whole, all but the last token: with that, and then token by token, the answer is scored or written
from what was kept.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_arg_string
from torch import Tensor
from tqdm import tqdm

from kvhive import __version__
from kvhive.cache.hive_cache import HiveCache
from kvhive.engines.arguments import count, known
from kvhive.engines.arguments import device as device_for
from kvhive.engines.rows import AT_ONCE, Rows, padded
from kvhive.engines.tally import Tally
from kvhive.evaluation.scoring import MOST_BYTES
from kvhive.inference.driver import Driver
from kvhive.model.loading import load
from kvhive.model.tokenizers import remember
from kvhive.recipe import Recipe
from kvhive.spec import split

BLOCK = 32  # tokens of a text without a question that are fed between two evictions
Request = tuple[Any, list[int], list[int]]  # texts or None; ids of context and continuation
Likelihood = tuple[float, bool]  # log probability; whether greedy decoding would write it

_OURS = (
    *("pretrained", "recipe", "dtype", "device", "batch_size", "max_batch_size", "tokenizer"),
    *("prefill_block", "hold_back", "threads"),
)
_THEIRS = (
    *("max_length", "add_bos_token", "prefix_token_id"),
    *("chat_template_args", "enable_thinking", "think_end_token"),
)
_log = logging.getLogger("lm_eval.kvhive")  # below the harness's own, which sets level and form


@register_model("kvhive")
class KvhiveLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model with a recipe for its caches.

    pretrained: a name for `kvhive.load`, or a model at hand (then with `tokenizer`). recipe: as
    everywhere. dtype: as for `kvhive.load`. device: default: the GPU if there is one. batch_size:
    texts read at once. prefill_block: read them in blocks of so many tokens, evicting after each.
    hold_back: tokens at the end of each context that are read after its compression. threads: CPU
    threads. `max_length` and a few more are the harness's own. Raises `ValueError` with one
    sentence for anything else, and for values that cannot work.
    """

    def __init__(
        self,
        pretrained: Any = "smollm2",
        recipe: str | Recipe = "full",
        *,
        dtype: str = "bfloat16",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        tokenizer: Any = None,
        prefill_block: int | None = None,
        hold_back: int = 1,
        threads: int | None = None,
        **more: Any,
    ) -> None:
        known([*_OURS, *_THEIRS], more)
        size = count("batch_size", batch_size)
        self.block = None if prefill_block is None else count("prefill_block", prefill_block)
        self.hold_back = count("hold_back", hold_back)
        self.recipe = Recipe.parse(recipe)
        if threads is not None:
            torch.set_num_threads(count("threads", threads))
        if isinstance(pretrained, str):
            pretrained, tokenizer = load(pretrained, dtype=dtype, device=device_for(device))
        elif tokenizer is None:
            raise TypeError("kvhive: a model that was loaded already needs its tokenizer, too")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        remember(pretrained, tokenizer)
        self.positions = HiveCache.for_model(pretrained, self.recipe).positions  # or says why not
        with _without_advice():
            super().__init__(pretrained, tokenizer=tokenizer, batch_size=size, **more)
        self.driver = Driver(self.model)
        self.tally = Tally()

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> KvhiveLM:
        """From "name=value,name=value"; commas inside brackets belong to the value."""
        parts = [part.partition("=") for part in split(arg_string)]
        options = {name.strip(): handle_arg_string(value) for name, _, value in parts}
        return cls.create_from_arg_obj(options, additional_config)  # type: ignore[no-any-return]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results: the model, the recipe and what it kept."""
        means = self.tally.means()
        if means:
            _log.info(
                "%s: %s of %s tokens kept (%.1f %%), %.2f of %.2f MB; means of %s texts",
                self.recipe,
                means["tokens_kept"],
                means["tokens_read"],
                100 * means["kept_share"],
                means["bytes"] / 1e6,
                means["full_bytes"] / 1e6,
                means["texts"],
            )
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_sha": getattr(self.config, "_commit_hash", None) or "",
            "kvhive": {
                "version": __version__,
                "recipe": str(self.recipe),
                "positions": self.positions,
                "prefill_block": self.block,
                "hold_back": self.hold_back,
                **means,
            },
        }

    # ---- writing --------------------------------------------------------------------------------

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """Continuations of a left-padded batch `[rows, tokens]`, with the context before them."""
        real = generation_kwargs.get("attention_mask", torch.ones_like(context)).bool().cpu()
        rows = self._read(context.cpu(), real, context.shape[1] - 1)
        beams = int(generation_kwargs.get("num_beams") or 1)
        if beams > 1 and rows.logits is not None:
            rows.cache.batch_repeat_interleave(beams)
        output: Tensor = super()._model_generate(
            context, max_length, stop, past_key_values=rows.cache, **generation_kwargs
        )
        return output

    # ---- scoring --------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Likelihood]:
        """An answer for every request; those with the same context share one reading of it.

        Without texts (the windows of a rolling log-likelihood) there is no context to compress:
        both parts stream through the cache in blocks.
        """
        _check(requests, self.max_length)
        if requests and requests[0][0] is None:
            return self._stream(requests)
        groups = self._by_context(requests)
        contexts = sorted(groups, key=lambda ids: (-len(ids), ids))
        size = override_bs or self.batch_size
        answers: dict[int, Likelihood] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring continuations") as bar:
            for start in range(0, len(contexts), size):
                batch = contexts[start : start + size]
                places = [(row, p) for row, ids in enumerate(batch) for p in groups[ids]]
                wanted = [(row, requests[place][2]) for row, place in places]
                for (_, place), answer in zip(places, self._answers(batch, wanted), strict=True):
                    answers[place] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
                    bar.update()
        return [answers[place] for place in range(len(requests))]

    def _by_context(self, requests: Sequence[Request]) -> dict[tuple[int, ...], list[int]]:
        """Places of the requests with each context, which is cut on the left to fit the model."""
        groups: dict[tuple[int, ...], list[int]] = {}
        cut = 0
        for place, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            cut += len(context) > room
            groups.setdefault(tuple(context[-room:]), []).append(place)
        if cut:
            _log.warning(
                "%d of %d contexts are too long for the model's %d tokens with what follows; "
                "their first tokens were left out",
                cut,
                len(requests),
                self.max_length,
            )
        return groups

    def _answers(
        self, contexts: Sequence[Sequence[int]], wanted: Sequence[tuple[int, list[int]]]
    ) -> Iterator[Likelihood]:
        """For (row, continuation) of `wanted`; as many at once as memory allows."""
        ids, real = padded(contexts)
        rows = self._read(ids, real, ids.shape[1])
        longest = max(len(continuation) for _, continuation in wanted)
        logits = 4 * min(AT_ONCE, longest) * int(self.config.get_text_config().vocab_size)
        most = max(1, MOST_BYTES // (rows.cache.nbytes // len(contexts) + logits))
        for start in range(0, len(wanted), most):
            part = wanted[start : start + most]
            filled = [[*c, *[c[-1]] * (longest - len(c))] for _, c in part]
            scores = rows.score(torch.tensor(filled), [row for row, _ in part])
            for logprobs, hits, (_, continuation) in zip(*scores, part, strict=True):
                yield _answer(logprobs[: len(continuation)], hits[: len(continuation)])

    def _stream(self, requests: Sequence[Request]) -> list[Likelihood]:
        rows = Rows(self.driver, self.recipe)
        ids, real = padded([[*context, *continuation] for _, context, continuation in requests])
        scores = rows.stream(ids, real, self.block or BLOCK)
        self.tally.add(rows.cache)
        return [
            _answer(logprobs[-len(continuation) :], hits[-len(continuation) :])
            for logprobs, hits, (_, _, continuation) in zip(*scores, requests, strict=True)
        ]

    def _read(self, ids: Tensor, real: Tensor, stop: int) -> Rows:
        """Compress all of `[rows, tokens]` but what is held back; feed that up to column `stop`."""
        rows = Rows(self.driver, self.recipe)
        cut = max(0, ids.shape[1] - self.hold_back)
        rows.read(ids[:, :cut], real[:, :cut], self.block)
        self.tally.add(rows.cache)
        rows.follow(ids[:, cut:stop], real[:, cut:stop])
        return rows


def main(arguments: Iterable[str]) -> None:
    """The harness's command line, with the model "kvhive" known to it."""
    sys.argv = ["lm-eval", *arguments]  # the only place where it looks for them
    cli_evaluate()


def _answer(logprobs: Tensor, hits: Tensor) -> Likelihood:
    return float(logprobs.sum()), bool(hits.all())


def _check(requests: Sequence[Request], most: int) -> None:
    for _, context, continuation in requests:
        if not context or not continuation:
            raise ValueError("kvhive: a context or a continuation has no tokens to score")
        if len(continuation) > most:
            raise ValueError(
                f"kvhive: a continuation of {len(continuation)} tokens is longer than the model's "
                f"{most}; raise max_length if the recipe counts positions in the cache"
            )


@contextmanager
def _without_advice() -> Iterator[None]:
    """Hold back what the harness logs about models that were loaded by others."""
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
