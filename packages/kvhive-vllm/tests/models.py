"""The tiny model, in vLLM and in transformers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import kvhive
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams

import kvhive_vllm

VOCABULARY = 512
Prompt = Sequence[int]


@dataclass(frozen=True)
class Tiny:
    """A saved model."""

    folder: Path

    @cached_property
    def model(self) -> Any:
        """In transformers."""
        return LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def expected(self, recipe: str, prompt: Prompt, new: int) -> list[int]:
        """What a `HiveCache` makes of a prompt, greedily."""
        cache = kvhive.HiveCache.for_model(self.model, recipe)
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            given = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return given[0, ids.shape[1] :].tolist()

    @contextmanager
    def engine(
        self, recipe: str | None, plugins: Sequence[str] = (), **options: Any
    ) -> Iterator[LLM]:
        """vLLM, in this process unless the options say otherwise."""
        defaults: dict[str, Any] = {
            "model": str(self.folder),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "block_size": 32,
            "num_gpu_blocks_override": 128,
            "kv_cache_memory_bytes": 2**28,
            "enable_prefix_caching": False,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 2048,
            "seed": 0,
        }
        if recipe is not None:
            defaults |= kvhive_vllm.engine_args(recipe, plugins)
        llm = LLM(**defaults | options)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            _clean_up()


def make(folder: Path, **changes: Any) -> Tiny:
    """A model of random weights whose next tokens are far from ties."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes))
    model.save_pretrained(folder)
    words = {f"w{token}": token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return Tiny(folder)


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Random tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


def greedy(new: int, **options: Any) -> SamplingParams:
    """So many tokens, the likeliest each time."""
    return SamplingParams(
        temperature=0, max_tokens=new, min_tokens=0, ignore_eos=True, detokenize=False, **options
    )


def generated(llm: LLM, texts: Sequence[Prompt], params: Any) -> list[list[int]]:
    """The new tokens of each prompt."""
    inputs = [{"prompt_token_ids": list(text)} for text in texts]
    given = llm.generate(inputs, params, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in given]


def scheduler_of(llm: LLM) -> Any:
    """Of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm: LLM) -> tuple[int, int]:
    """Blocks that are free, and all there are but the one that stands for nothing."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1


def _clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()
