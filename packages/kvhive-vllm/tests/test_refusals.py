"""What is refused at start, before a model is loaded, each in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

import kvhive_vllm
from kvhive_vllm.refusals import checked_recipe, recipe_of
from tests.models import Tiny, make


def config(tiny: Tiny, recipe: str | None = "h2o@80", **options: Any) -> VllmConfig:
    """As an engine would make it."""
    chosen = {} if recipe is None else kvhive_vllm.engine_args(recipe)
    defaults: dict[str, Any] = {
        "model": str(tiny.folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 512,
        "kv_cache_memory_bytes": 2**28,
    }
    return EngineArgs(**defaults | chosen | options).create_engine_config()


def test_a_plain_engine_runs_a_recipe(tiny: Tiny) -> None:
    assert str(checked_recipe(config(tiny))) == "h2o@80"
    assert recipe_of(config(tiny, None)) is None


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("h2o@80", {"kv_cache_dtype": "fp8"}, "pages in fp8 cannot be moved without rounding"),
    ("h2o@80", {"scheduler_cls": None}, r"its scheduler is missing; add --scheduler-cls kvhive"),
    ("h2o@80", {"worker_cls": "auto"}, r"its worker is missing; add --worker-cls kvhive"),
    ("tova@80", {"tensor_parallel_size": 2}, "the heads of a layer choose together in tova"),
    (
        "elastic(merge=false)@80",
        {"tensor_parallel_size": 2},
        "the heads of a layer choose together in elastic",
    ),
    ("h2o@80", {"pipeline_parallel_size": 2}, "pipeline parallelism has not been tried"),
    (
        "h2o@80",
        {
            "kv_transfer_config": KVTransferConfig(
                kv_connector="ExampleConnector", kv_role="kv_both"
            )
        },
        "a KV connector finds blocks by the position",
    ),
    (
        "h2o@80",
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "speculative decoding takes back tokens",
    ),
]


@pytest.mark.parametrize(("recipe", "options", "why"), REFUSED)
def test_features_are_refused_by_name(
    tiny: Tiny, recipe: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=f"kvhive-vllm cannot run .* here: {why}"):
        checked_recipe(config(tiny, recipe, **options))


def test_context_parallelism_is_refused(tiny: Tiny) -> None:
    made = config(tiny)
    made.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(ValueError, match="context parallelism deals a request's tokens out"):
        checked_recipe(made)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "was given no recipe"),
        ({"kvhive": {}}, "must be"),
        ({"kvhive": "h2o@80"}, "must be"),
        ({"kvhive": {"recipe": "h2o@80", "budget": 3}}, "must be"),
        ({"kvhive": {"recipe": "corm@80"}}, "corm lets heads hold"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tiny: Tiny, given: Any, why: str) -> None:
    made = config(tiny)
    made.additional_config = given
    with pytest.raises(ValueError, match=why):
        checked_recipe(made)


def test_an_engine_refuses_before_it_loads_the_model(tiny: Tiny) -> None:
    options = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    with (
        pytest.raises(ValueError, match="speculative decoding takes back tokens"),
        tiny.engine("h2o@80", **options),
    ):
        pass


def test_a_model_with_sliding_windows_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("sliding") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=64)).save_pretrained(folder)
    with (
        pytest.raises(ValueError, match="a layer sees a window of"),
        Tiny(folder).engine("h2o@80"),
    ):
        pass


def test_rotations_that_nobody_knows_are_refused_where_they_are_needed(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 10000.0,
    }
    tiny = make(tmp_path_factory.mktemp("yarn") / "model", rope_parameters=scaling)
    with (
        pytest.raises(ValueError, match="positions=cache needs to know how this model turns"),
        tiny.engine("h2o(positions=cache)@80"),
    ):
        pass
    with tiny.engine("buzz@0.4"):  # by its own rule, where that can be followed
        pass
