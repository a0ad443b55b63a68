"""Budgets found by their loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvhive.budget import Budget
from kvhive.comparison.compare import compare
from kvhive.comparison.sweep import STEP_TOKENS, Probe, Sweep, sweep
from kvhive.recipe import Recipe
from tests.cli.tiny import model, text, tokenizer

QUESTIONS = ["What did the keeper keep?"]


@pytest.fixture(scope="module")
def network() -> LlamaForCausalLM:
    return model()


@pytest.fixture(scope="module")
def coder() -> PreTrainedTokenizerFast:
    return tokenizer()


def test_the_smallest_budget_within_the_loss(network, coder):
    tried = []
    reference, (found,) = sweep(
        network,
        coder,
        text(90),
        QUESTIONS,
        ["h2o"],
        0.5,
        unit="tokens",
        max_new_tokens=6,
        tried=tried.append,
    )
    assert reference.reference
    assert tried == list(found.probes)
    assert found.found is not None
    assert found.found.kl <= 0.5
    smaller = [probe.recipe.budget.tokens for probe in tried if probe.kl > 0.5]
    budget = found.found.recipe.budget.tokens
    if budget > STEP_TOKENS:  # its smaller neighbour was tried, and lost more
        assert -(-budget // STEP_TOKENS) * STEP_TOKENS - STEP_TOKENS in smaller
    assert len(tried) <= 8


def test_the_loss_is_the_one_that_compare_measures(network, coder):
    _, (found,) = sweep(network, coder, text(90), QUESTIONS, ["h2o"], 0.5, max_new_tokens=6)
    recipes = [probe.recipe for probe in found.probes]
    measured = compare(network, coder, text(90), QUESTIONS, recipes, max_new_tokens=6)
    kl = {result.recipe: result.fidelity.kl for result in measured}
    assert [probe.kl for probe in found.probes] == [kl[str(recipe)] for recipe in recipes]
    assert all(recipe.budget.share is not None for recipe in recipes)


def test_any_loss_allows_the_least_budget(network, coder):
    _, both = sweep(
        network,
        coder,
        text(40),
        QUESTIONS,
        ["h2o", "snapkv(window=20)"],
        1e9,
        unit="tokens",
        max_new_tokens=2,
    )
    assert [str(one.found.recipe) for one in both] == ["h2o@16", "snapkv(window=20)@32"]


def probe(tokens: int, kl: float, result) -> Probe:
    return Probe(replace(Recipe.parse("h2o@9"), budget=Budget(tokens=tokens)), result, kl)


def test_a_loss_that_does_not_fall_is_noticed(network, coder):
    (result,) = compare(network, coder, text(20), QUESTIONS, ["full"], max_new_tokens=2)
    probes = tuple(probe(*one, result) for one in ((96, 0.1), (16, 0.3), (48, 0.4), (80, 0.1)))
    rises = Sweep(Recipe.parse("h2o@9"), 0.2, probes, None).rises
    assert [(small.kl, large.kl) for small, large in rises] == [(0.3, 0.4)]


def test_bad_input_is_refused_before_anything_runs(network, coder):
    def refused(match: str, recipes=("h2o",), kl=0.1, words=40):
        with pytest.raises(ValueError, match=match):
            sweep(network, coder, text(words), QUESTIONS, list(recipes), kl, max_new_tokens=2)

    refused("kl must be at least 0 nats, got -1", kl=-1.0)
    refused("kl must be at least 0 nats, got nan", kl=float("nan"))
    refused("at least one recipe", recipes=())
    refused("h2o@0.4 has a budget already", recipes=["h2o@0.4"])
    refused("full takes no budget", recipes=["full"])
    refused("longer than the model was trained on, so there is no full cache", words=400)
