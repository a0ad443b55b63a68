"""Support: whether kvhive can serve a model, told from its config alone.

The model is laid out on torch's meta device, where tensors have shapes and no memory, and reads a
few tokens there. What would refuse the loaded model refuses this one, in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvhive.cache.attention import switch
from kvhive.cache.handoff import offer
from kvhive.model.facts import full_attention, refuse_family
from kvhive.model.rotation_detection import cannot_turn


@dataclass(frozen=True)
class Support:
    """What kvhive makes of a model.

    problem: why it is refused; "" where it is not. full_layers: those that are compressed, of
    `layers`. heads, kv_heads: of queries, and of keys. positions: why positions cannot be counted
    in the cache; "" where they can, as far as a config tells. untried: why the model could not read
    a token without its weights, so that only its config was looked at; "" where it did.
    """

    family: str
    problem: str = ""
    layers: int = 0
    full_layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    trained_length: int | None = None
    positions: str = ""
    untried: str = ""

    @classmethod
    def of(cls, config: PretrainedConfig) -> Support:
        """Of the causal language model with this config."""
        if getattr(config, "is_encoder_decoder", False):
            problem = (
                f"{config.model_type} is an encoder-decoder; kvhive compresses decoder-only models"
            )
            return cls(config.model_type, problem)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config).eval()
        except ValueError:
            kind = f"{config.model_type} is no causal language model that transformers knows"
            return cls(config.model_type, kind)
        except Exception as error:  # a damaged config ends in errors of many kinds
            told = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return cls(config.model_type, f"its config cannot be used ({told})")
        model.config.pad_token_id = None  # some look for it among the tokens, which are none here
        text = model.config.get_text_config(decoder=True)
        facts: dict[str, Any] = {
            "family": type(model).__name__,
            "layers": text.num_hidden_layers,
            "heads": getattr(text, "num_attention_heads", 0),
            "kv_heads": getattr(text, "num_key_value_heads", None)
            or getattr(text, "num_attention_heads", 0),
            "trained_length": getattr(text, "max_position_embeddings", None),
        }
        try:
            refuse_family(model)
            switch(model)
            facts["full_layers"] = len(full_attention(model))
            facts["untried"] = _read(model)
        except ValueError as error:
            return cls(problem=str(error), **facts)
        return cls(positions=cannot_turn(model), **facts)


class _Offering(DynamicCache):
    """A cache whose keys are offered to kvhive's attention, which then checks what it is asked."""

    full: tuple[int, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As of the stock cache; keys of full-attention layers carry someone who attends."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return (offer(keys, _Shapes(values)) if layer_idx in self.full else keys), values


@dataclass(frozen=True, eq=False)
class _Shapes:
    """Attends in shapes alone."""

    values: Tensor

    def check_model(self, config: object) -> None:
        """There is but one."""

    def attend(self, query: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Nothing, in the shape of an output."""
        return query.new_empty(*query.shape[:3], self.values.shape[-1])


@torch.no_grad()
def _read(model: PreTrainedModel) -> str:
    """Let a model without weights read three tokens; why it could not, or "".

    Raises `ValueError` for what kvhive's attention refuses.
    """
    cache = _Offering(config=model.config.get_text_config(decoder=True))
    cache.full = full_attention(model)
    tokens = torch.zeros(1, 3, dtype=torch.int64, device="meta")
    try:
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        return str(error).strip().partition("\n")[0]
    return ""
