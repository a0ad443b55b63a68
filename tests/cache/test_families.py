"""Model families: exact with room for everything, whatever their attention and positions are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from kvhive.cache.attention import NAME
from kvhive.cache.hive_cache import HiveCache
from tests.support import SIZES, VOCABULARY, random_ids, read, tiny

HEAD = {"head_dim": 8}
HYBRID = {
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
GEMMA4 = {
    **HYBRID,
    **HEAD,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}

# name of the case: (family, settings, compressed layers, layout of the rotation of those turned)
FAMILIES: dict[str, tuple[str, dict[str, object], tuple[int, ...], dict[int, str] | None]] = {
    "llama": ("llama", {}, (0, 1), {0: "halves", 1: "halves"}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
        (0, 1),
        {0: "halves", 1: "halves"},
    ),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
        (0, 1),
        {0: "halves", 1: "halves"},
    ),
    "qwen2": ("qwen2", {}, (0, 1), {0: "halves", 1: "halves"}),
    "qwen2 mixed": (
        "qwen2",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 2,
        },
        (0, 1),
        {0: "halves", 1: "halves"},
    ),
    "qwen3": ("qwen3", HEAD, (0, 1), {0: "halves", 1: "halves"}),
    "phi3": ("phi3", {}, (0, 1), {0: "halves", 1: "halves"}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}, (0, 1), {0: "halves", 1: "halves"}),
    "gpt2": ("gpt2", {**GPT, "n_positions": 512}, (0, 1), None),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, (0, 1), None),
    "cohere": ("cohere", {}, (0, 1), {0: "pairs", 1: "pairs"}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "sliding_window": 16}, (3,), {}),
    "granite": ("granite", {}, (0, 1), {0: "halves", 1: "halves"}),
    "olmo2": ("olmo2", {}, (0, 1), {0: "halves", 1: "halves"}),
    "glm4": ("glm4", {**HEAD, "partial_rotary_factor": 0.5}, (0, 1), {0: "pairs", 1: "pairs"}),
    "starcoder2": ("starcoder2", {"sliding_window": None}, (0, 1), {0: "halves", 1: "halves"}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}, (0, 1), {0: "halves", 1: "halves"}),
    "smollm3": (
        "smollm3",
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
        (0, 1, 2),
        {0: "halves", 2: "halves"},
    ),
    "mistral without window": (
        "mistral",
        {"sliding_window": None},
        (0, 1),
        {0: "halves", 1: "halves"},
    ),
    "llama4": (
        "llama4_text",
        {
            **HEAD,
            **EXPERTS,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 16,
        },
        (3,),
        {},
    ),
    "gemma3": ("gemma3_text", {**HYBRID, **HEAD}, (1, 3), {1: "halves", 3: "halves"}),
    "gemma4": ("gemma4_text", GEMMA4, (1, 3), {1: "halves", 3: "halves"}),
    "exaone4": (
        "exaone4",
        {"num_hidden_layers": 4, "sliding_window": 16, "sliding_window_pattern": 4},
        (3,),
        {},
    ),
}
PROMPT, TOTAL = 40, 46


def build(case: str) -> PreTrainedModel:
    """The tiny model of a case, with transformers' eager attention."""
    family, settings, _, _ = FAMILIES[case]
    return tiny(family, **settings)


@pytest.mark.parametrize("case", FAMILIES)
def test_room_for_everything_is_exact(case: str) -> None:
    model = build(case)
    ids = random_ids(2, TOTAL)
    expected = read(model, DynamicCache(config=model.config), ids, PROMPT)
    for recipe in ("full", "buzz@400", "h2o@400"):
        logits = read(model, HiveCache.for_model(model, recipe), ids, PROMPT)
        assert (logits - expected).norm() <= 1e-5 * expected.norm()
    stock = read(model, DynamicCache(config=model.config), ids, PROMPT)
    assert (stock - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("case", FAMILIES)
def test_small_budgets_compress_full_attention_alone(case: str) -> None:
    model = build(case)
    _, _, compressed, layouts = FAMILIES[case]
    recipes = ["h2o@24", "buzz@24"]
    if layouts is not None:
        recipes.append("h2o(positions=cache)@24")
    for recipe in recipes:
        cache = HiveCache.for_model(model, recipe)
        logits = read(model, cache, random_ids(2, 90), PROMPT)
        assert bool(logits.isfinite().all())
        assert cache.report().layers == compressed
        assert int(cache.report().kept.max()) <= 24
        rest = [layer for i, layer in enumerate(cache.layers) if i not in compressed]
        assert all(isinstance(layer, DynamicSlidingWindowLayer) for layer in rest)


@pytest.mark.parametrize("case", FAMILIES)
def test_rotary_layout_is_found(case: str) -> None:
    facts = HiveCache.for_model(build(case), "full").facts
    _, _, _, layouts = FAMILIES[case]
    if layouts is None:
        assert facts.rotations is None
        assert "no rotary" in facts.no_rotation
    else:
        assert facts.rotations is not None
        found = {layer: rotation.layout for layer, rotation in facts.rotations.items()}
        assert found == layouts


@pytest.mark.parametrize("case", [case for case, facts in FAMILIES.items() if facts[3]])
def test_positions_in_the_cache_are_as_the_model_would_write_them(case: str) -> None:
    """With 16 tokens gone, sinks are read as if the model had written them 16 positions later."""
    model = build(case)
    layer = min(FAMILIES[case][3] or ())
    ids = random_ids(1, PROMPT)
    cache = HiveCache.for_model(model, "streaming_llm@24")
    read(model, cache, ids, PROMPT)
    hive = cache.layers[layer]
    assert hive.slots.position[0, 0].tolist() == [*range(4), *range(20, 40)]
    plain, later = (written_keys(model, layer, ids, offset) for offset in (0, 16))
    expected = torch.cat([later[:, :, :4], plain[:, :, 20:]], 2)
    assert (hive.store.view()[0] - expected).norm() <= 1e-4 * expected.norm()
    assert (plain - later).norm() > 0.1 * plain.norm()


def written_keys(model: PreTrainedModel, layer: int, ids: Tensor, offset: int) -> Tensor:
    """The keys the model itself writes in `layer`, with all positions `offset` later."""
    cache = DynamicCache(config=model.config)
    position = torch.arange(ids.shape[1])[None] + offset
    with torch.no_grad():
        model(ids, past_key_values=cache, position_ids=position)
    return cache.layers[layer].keys


@pytest.mark.parametrize("case", ["gpt2", "opt"])
def test_without_rotary_positions_keys_stay_as_written(case: str) -> None:
    model = build(case)
    assert HiveCache.for_model(model, "buzz@24").positions == "original"
    with pytest.raises(ValueError, match=r"positions='cache' cannot.*(GPT2|OPT).*no rotary"):
        HiveCache.for_model(model, "buzz(positions=cache)@24")


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}, "attention interface"),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "attention interface"),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "attention interface"),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
        },
        "latent attention",
    ),
    "gemma2": ("gemma2", {**HEAD, "sliding_window": 16}, "softcap"),
    "gpt_oss": ("gpt_oss", {**HEAD, **EXPERTS, "sliding_window": 16}, "s_aux"),
    "mistral": ("mistral", {"sliding_window": 16}, "nothing to compress"),
    "gemma4 shared": (
        "gemma4_text",
        {**GEMMA4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
        "several layers share one cache",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:The explicitly set RoPE scaling factor")
def test_what_cannot_be_served_is_refused(case: str) -> None:
    """In one sentence that names the model, which is left as it was."""
    family, settings, reason = REFUSED[case]
    model = tiny(family, **settings)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=reason) as refusal:
        HiveCache.for_model(model, "buzz@24")
    sentence = str(refusal.value)
    assert type(model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel") in sentence
    assert "\n" not in sentence
    assert model.config._attn_implementation == before != NAME


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_are_refused(family: str) -> None:
    settings = {**SIZES, "d_model": 32, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **settings))
    with pytest.raises(ValueError, match="ForConditionalGeneration is an encoder-decoder"):
        HiveCache.for_model(model, "buzz@24")


def test_positions_that_change_with_length_cannot_be_recounted() -> None:
    model = tiny("llama", rope_parameters=DYNAMIC)
    assert HiveCache.for_model(model, "buzz@24").positions == "original"
    with pytest.raises(ValueError, match=r"changes with length \(rope type dynamic\)"):
        HiveCache.for_model(model, "buzz(positions=cache)@24")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layout_is_found_in_any_state(dtype: torch.dtype, train: bool) -> None:
    model = tiny("cohere", attention_dropout=0.5).to(dtype).train(train)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    facts = HiveCache.for_model(model, "full").facts
    assert [module.training for module in model.modules()] == modes
    assert facts.rotations is not None
    assert [rotation.layout for rotation in facts.rotations.values()] == ["pairs", "pairs"]
