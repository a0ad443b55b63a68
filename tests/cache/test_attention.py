"""Attaching: what our attention and mask functions do, and what they refuse rather than ignore."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from kvhive.cache.attention import NAME, attach, attention_forward, mask_forward
from kvhive.cache.hive_cache import HiveCache
from tests.support import divergence, make_layer, random_ids, read, tiny, tiny_llama


class Attention(nn.Module):
    """Stands for a model's attention module."""

    is_causal = True
    num_key_value_groups = 2


def ours(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """A query, and keys and values that come from one of our layers."""
    layer = make_layer("h2o@20")
    keys, values = layer.update(torch.randn(1, 2, count, 8), torch.randn(1, 2, count, 8))
    return torch.randn(1, 4, count, 8), keys, values


def call(module: nn.Module | None = None, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """Our attention function on keys of ours."""
    query, keys, values = ours()
    return attention_forward(module or Attention(), query, keys, values, mask, **settings)[0]


def test_names_are_registered() -> None:
    assert AttentionInterface._global_mapping[NAME] is attention_forward
    assert AttentionMaskInterface._global_mapping[NAME] is mask_forward


def test_the_output_is_laid_out_as_transformers_wants_it() -> None:
    out = call()
    assert out.shape == (1, 6, 4, 8)
    assert out.is_contiguous()


def test_the_scale_is_the_usual_one_unless_given() -> None:
    query, keys, values = ours()
    layer = keys._kvhive_layer
    usual, _ = attention_forward(Attention(), query, keys, values, None)
    assert layer.get_seq_length() == layer.slots.length == 6
    expected = nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=True, enable_gqa=True
    )
    assert torch.allclose(usual, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"softcap": 30.0}, "Attention uses softcap in a full-attention layer"),
        ({"s_aux": torch.zeros(4)}, "Attention uses s_aux"),
        ({"sliding_window": 16}, "Attention uses sliding_window"),
        ({"position_bias": torch.zeros(1)}, "Attention uses position_bias"),
        ({"is_causal": False}, "attends to later tokens too"),
        ({"dropout": 0.1}, r"attention dropout 0.1.*call model.eval\(\) first"),
        ({"mask": torch.ones(1, 1, 6, 6)}, r"2-D padding mask only, got .*\(1, 1, 6, 6\)"),
        ({"mask": torch.ones(1, 6, 6)}, r"2-D padding mask only, got .*\(1, 6, 6\)"),
    ],
)
def test_features_that_are_not_implemented_are_refused(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"softcap": None}, {"sliding_window": None}, {"is_causal": True}, {"use_cache": True}],
)
def test_features_that_are_switched_off_are_no_matter(settings: dict[str, Any]) -> None:
    assert call(**settings).shape == (1, 6, 4, 8)


def test_attention_to_later_tokens_is_refused() -> None:
    module = Attention()
    module.is_causal = False
    with pytest.raises(ValueError, match="kvhive compresses causal attention only"):
        call(module)


def test_dropout_of_a_model_in_training_is_refused() -> None:
    model = tiny("llama", attention_dropout=0.5).train()
    cache = HiveCache.for_model(model, "h2o@20")
    with pytest.raises(ValueError, match=r"asks for attention dropout 0\.5"):
        model(random_ids(1, 6), past_key_values=cache)


def test_a_mask_of_ones_hides_nothing() -> None:
    torch.manual_seed(0)
    plain = call()
    torch.manual_seed(0)
    assert torch.equal(call(mask=torch.ones(1, 6, dtype=torch.bool)), plain)


def test_padding_is_hidden_and_gets_zeros() -> None:
    query, keys, values = ours()
    mask = torch.tensor([[False, False, True, True, True, True]])
    out, _ = attention_forward(Attention(), query, keys, values, mask)
    expected = nn.functional.scaled_dot_product_attention(
        query[:, :, 2:], keys[:, :, 2:], values[:, :, 2:], is_causal=True, enable_gqa=True
    )
    assert torch.allclose(out[:, 2:], expected.transpose(1, 2), atol=1e-6)
    assert float(out[:, :2].abs().max()) == 0


def test_keys_changed_after_the_cache_are_found_out_at_the_next_step() -> None:
    """They are no longer known as ours, so sdpa attends to them; the layer was passed over."""
    query, keys, values = ours()
    layer = keys._kvhive_layer
    attention_forward(Attention(), query, keys * 1, values, None)
    with pytest.raises(ValueError, match="its model changes the keys between cache and attention"):
        layer.update(keys, values)


def test_other_caches_go_to_sdpa() -> None:
    query, keys, values = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :2] = False
    causal = torch.ones(3, 7, dtype=torch.bool).tril(4)
    for given in (None, mask):
        out, weights = attention_forward(Attention(), query, keys, values, given)
        visible = causal if given is None else causal & given[:, None, None]
        expected = nn.functional.scaled_dot_product_attention(
            query, keys, values, visible, enable_gqa=True
        )
        assert weights is None
        assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)


def test_learned_sinks_are_refused_for_other_caches_too() -> None:
    """Plain sdpa would leave them out without a word."""
    query, keys = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="Attention uses s_aux"):
        attention_forward(Attention(), query, keys, keys, None, s_aux=torch.zeros(4))


def test_masks_are_left_as_they_are() -> None:
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": 7, "q_offset": 4, "kv_offset": 0}
    mask = torch.ones(2, 7, dtype=torch.bool)
    assert mask_forward(mask_function=causal_mask_function, attention_mask=None, **sizes) is None
    kept = mask_forward(mask_function=causal_mask_function, attention_mask=mask, **sizes)
    assert kept is not None
    assert torch.equal(kept, mask)
    longer = torch.nn.functional.pad(mask, (0, 5), value=False)
    cut = mask_forward(mask_function=causal_mask_function, attention_mask=longer, **sizes)
    assert cut is not None
    assert torch.equal(cut, mask)


def test_a_mask_of_some_tokens_only_is_refused() -> None:
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": 7, "q_offset": 4, "kv_offset": 0}
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask has 3 columns, but 7 tokens .*give a mask of all"):
        mask_forward(mask_function=causal_mask_function, attention_mask=mask, **sizes)


def test_other_masks_are_spelled_out() -> None:
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 7, "q_offset": 4, "kv_offset": 0}
    window = mask_forward(
        mask_function=sliding_window_causal_mask_function(2), attention_mask=None, **sizes
    )
    assert window is not None
    row = torch.arange(4, 7)[:, None]
    slot = torch.arange(7)[None]
    assert torch.equal(window[0, 0], (slot <= row) & (slot > row - 2))
    roomy = {**sizes, "kv_length": 10}
    static = mask_forward(mask_function=causal_mask_function, attention_mask=None, **roomy)
    assert static is not None
    assert torch.equal(static[0, 0], torch.arange(10)[None] <= row)


def test_a_forward_that_failed_does_not_spoil_the_next() -> None:
    model = tiny_llama()
    HiveCache.for_model(model, "full")
    ours()  # an update whose attention never came
    assert model(random_ids(1, 4)).logits.shape[1] == 4


def test_attaching_twice_is_the_same() -> None:
    model = tiny_llama()
    facts = attach(model)
    assert model.config._attn_implementation == NAME
    assert attach(model) is facts
    model.set_attn_implementation("sdpa")
    assert attach(model) is facts
    assert model.config._attn_implementation == NAME
    assert facts.family == "LlamaForCausalLM"
    assert facts.full_layers == (0, 1)
    assert facts.trained_length == 2048


@pytest.mark.parametrize("wrong", [None, "model", nn.Linear(2, 2)])
def test_only_models_can_be_attached(wrong: object) -> None:
    attach_any: Any = getattr(attach, "__wrapped__", attach)
    with pytest.raises(TypeError, match="expected a transformers model, got"):
        attach_any(wrong)


def test_custom_masks_need_the_stock_cache(model: PreTrainedModel) -> None:
    cache = HiveCache.for_model(model, "h2o@20")
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    with pytest.raises(ValueError, match="custom masks need the stock cache"):
        model(random_ids(1, 6), attention_mask=causal, past_key_values=cache)


def test_attaching_changes_no_number(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    ids = random_ids(1, 50)
    attach(model)
    logits = read(model, DynamicCache(config=model.config), ids, 40)
    assert divergence(logits, read(stock, DynamicCache(config=stock.config), ids, 40)) < 1e-6
