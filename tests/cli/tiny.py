"""A tiny random model with a tokenizer of bytes, saved as an ordinary model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TRAINED_LENGTH = 1024
HEADS = 2 * 2  # layers x KV heads
SENTENCE = "the old keeper of the lock kept nine blue hives and a very small boat in the rain"


def text(words: int) -> str:
    """Some words of running text with a letter outside ASCII; about five tokens (bytes) a word."""
    known = SENTENCE.split()
    return " ".join(known[(7 * i + i // 5) % len(known)] for i in range(words - 1)) + " café"


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token for every byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
    )
    if chat:
        fast.chat_template = CHAT
    return fast


def model() -> LlamaForCausalLM:
    """Two layers, four heads, two KV heads, sharp attention."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TRAINED_LENGTH,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def save(folder: Path, chat: bool = True) -> Path:
    """Model and tokenizer in `folder`."""
    model().save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder
