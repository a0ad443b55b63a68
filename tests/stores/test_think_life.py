"""ThinK's store in all that a cache goes through: the contract of every recipe, with thin keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from tests.contract import test_life, test_rows, test_speculation
from tests.support import Feeder

RECIPES = (
    "full+think",
    "full+think(keep=0.3, recent=5, rethin=7)",
    "h2o@48+think(recent=20, value_bits=4)",
    "snapkv@0.4+think(recent=8, rethin=3)",
    "tova@0.9+think(recent=8)",
    "h2o@48/global+think(recent=9)",
)
OF_MODELS = (
    test_life.test_a_fork_goes_its_own_way,
    test_rows.test_a_row_of_a_padded_batch_is_as_it_is_alone,
    test_speculation.test_prompt_lookup_keeps_to_the_budget,
)
OF_LAYERS = (
    test_life.test_reset_begins_anew,
    test_rows.test_padding_on_the_right_does_no_harm,
    test_rows.test_reordered_rows_continue_as_their_source,
    test_rows.test_rows_can_be_repeated_and_selected,
    test_speculation.test_single_drafts_are_decoded_tokens,
)


@pytest.fixture(autouse=True)
def thin_keys_are_not_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is compared in `test_think.py`."""
    monkeypatch.setattr(Feeder, "check", lambda _: None)


@pytest.mark.parametrize("contract", OF_MODELS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("recipe", RECIPES)
def test_contract_of_a_cache(
    contract: Callable[[PreTrainedModel, str], None], model: PreTrainedModel, recipe: str
) -> None:
    contract(model, recipe)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "@0." not in recipe])
def test_freezing(model: PreTrainedModel, recipe: str) -> None:
    test_life.test_a_frozen_cache_loses_nothing(model, recipe)


@pytest.mark.parametrize("contract", OF_LAYERS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("recipe", RECIPES)
def test_contract_of_a_layer(contract: Callable[[str], None], recipe: str) -> None:
    contract(recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("padded", [False, True])
def test_beams(model: PreTrainedModel, recipe: str, padded: bool) -> None:
    test_rows.test_beams_run_within_the_budget(model, recipe, padded)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_all_bytes_are_reported(recipe: str, rows: int) -> None:
    test_life.test_the_bytes_reported_are_all_there_are(recipe, rows)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("prompt", [20, 130])
@pytest.mark.parametrize("draft", [0, 3])
def test_drafts(recipe: str, prompt: int, draft: int) -> None:
    """The queries of a draft that comes with the prompt and is taken back choose no channel."""
    test_speculation.test_speculation_keeps_what_plain_decoding_keeps(recipe, prompt, draft)
