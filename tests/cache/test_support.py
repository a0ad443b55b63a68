"""What a config tells of a model is what the model itself would say."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, PretrainedConfig

from kvhive.cache.support import Support
from tests.cache.test_families import DYNAMIC, FAMILIES, REFUSED
from tests.support import SIZES

pytestmark = pytest.mark.filterwarnings("ignore:The explicitly set RoPE scaling factor")


def config(family: str, settings: dict[str, object]) -> PretrainedConfig:
    """As `tests.support.tiny` has it."""
    return AutoConfig.for_model(family, **{**SIZES, **settings})


@pytest.mark.parametrize("case", FAMILIES)
def test_families_that_are_served(case: str) -> None:
    family, settings, compressed, layouts = FAMILIES[case]
    support = Support.of(config(family, settings))
    assert support.problem == support.untried == ""
    assert support.full_layers == len(compressed)
    assert support.layers >= support.full_layers
    assert bool(support.positions) == (layouts is None)
    assert (support.heads, support.kv_heads) in {(4, 2), (4, 4)}


@pytest.mark.parametrize("case", REFUSED)
def test_families_that_are_refused(case: str) -> None:
    family, settings, reason = REFUSED[case]
    support = Support.of(config(family, settings))
    assert reason in support.problem
    assert "\n" not in support.problem


def test_encoders_are_refused() -> None:
    support = Support.of(AutoConfig.for_model("bert", num_hidden_layers=1))
    assert "attends to later tokens too" in support.problem


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_encoder_decoders_are_refused(family: str) -> None:
    support = Support.of(AutoConfig.for_model(family, is_encoder_decoder=True))
    assert "encoder-decoder" in support.problem


def test_what_is_no_language_model_is_refused() -> None:
    support = Support.of(AutoConfig.for_model("vit"))
    assert support.problem == "vit is no causal language model that transformers knows"


def test_positions_that_change_with_length_are_told() -> None:
    support = Support.of(config("llama", {"rope_parameters": DYNAMIC}))
    assert "rope type dynamic" in support.positions
    assert support.problem == ""


def test_a_large_model_takes_no_memory() -> None:
    """70 billion parameters, in shapes alone."""
    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    support = Support.of(AutoConfig.for_model("llama", **sizes))
    assert support == Support("LlamaForCausalLM", "", 80, 80, 64, 8, 131072)
