"""`compare(turns=True)`: questions as turns of one conversation."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import kvhive
from kvhive.cache.hive_cache import HiveCache
from kvhive.comparison import run as running
from kvhive.comparison.compare import compare
from kvhive.comparison.sweep import sweep
from kvhive.inference.generation import read
from kvhive.inference.prompt import Prompt, question_ids
from kvhive.model.chat import ChatFormat
from tests.cli.tiny import TRAINED_LENGTH, model, text, tokenizer

STREAM = "buzz(preset=paper)@200"  # which counts positions in the cache
QUESTIONS = ["What did the keeper keep?", "Where?", "In what?"]
NEW = 6


@pytest.fixture(scope="module")
def network() -> LlamaForCausalLM:
    return model()


@pytest.fixture(scope="module")
def coder() -> PreTrainedTokenizerFast:
    return tokenizer()


def test_answers_are_those_of_a_conversation_and_what_keeps_everything_loses_nothing(
    network, coder
):
    recipes = ["full(positions=original)", "h2o@4096", "h2o@1.0"]
    full, *others = compare(
        network, coder, text(60), QUESTIONS, recipes, max_new_tokens=NEW, turns=True
    )
    talk = kvhive.read(network, coder, text(60), "full").conversation()
    said = [talk.ask(question, max_new_tokens=NEW) for question in QUESTIONS]
    assert [answer.text for answer in full.answers] == said
    assert full.fidelity.kl == 0
    for other in others:
        assert [answer.tokens for answer in other.answers] == [a.tokens for a in full.answers]
        assert other.fidelity.kl == pytest.approx(0, abs=1e-5)
        assert other.fidelity.positions == full.fidelity.positions
    fresh = compare(network, coder, text(60), QUESTIONS, [], max_new_tokens=NEW)[0]
    assert fresh.answers[0] == full.answers[0]
    assert fresh.answers[1:] != full.answers[1:]


def by_hand(
    network: LlamaForCausalLM, coder: PreTrainedTokenizerFast, recipe: str, answers: list[list[int]]
) -> tuple[list[torch.Tensor], list[int]]:
    """Log-probabilities before every token of the answers, and tokens seen before each answer."""
    form, cache = ChatFormat.of(coder), HiveCache.for_model(network, recipe)
    read(network, cache, Prompt.build(coder, text(60), []).prefix)
    rows, seen, before = [], [], ()
    for question, answer in zip(QUESTIONS, answers, strict=True):
        rows.append(read(network, cache, [*before, *question_ids(form, question)]))
        seen.append(cache.get_seq_length())
        rows += [read(network, cache, [token]) for token in answer[:-1]]
        before = [*(answer[-1:] if answer[-1] != 256 else ()), *form.ids(form.turn)]
    return [row.log_softmax(-1) for row in rows], seen


def test_history_is_the_full_caches_answers(network, coder, monkeypatch):
    """The distance of a window over three turns, computed again by hand."""
    lengths: dict[str, list[int]] = {}

    decode = running.decode

    def noted_decode(model, cache, *rest):
        lengths.setdefault(str(cache.recipe), []).append(cache.get_seq_length())
        return decode(model, cache, *rest)

    monkeypatch.setattr(running, "decode", noted_decode)
    full, window = compare(
        network, coder, text(60), QUESTIONS, ["window@70"], max_new_tokens=NEW, turns=True
    )
    answers = [list(answer.tokens) for answer in full.answers]
    assert answers != [list(answer.tokens) for answer in window.answers]
    expected, seen = by_hand(network, coder, "full", answers)
    given, _ = by_hand(network, coder, "window@70", answers)
    pairs = list(zip(expected, given, strict=True))
    kl = sum(float((wanted.exp() * (wanted - got)).sum()) for wanted, got in pairs) / len(pairs)
    assert kl > 0.01
    assert window.fidelity.kl == pytest.approx(kl, rel=1e-3)
    assert window.fidelity.positions == len(pairs)
    assert lengths["full"][-3:] == seen
    assert lengths["window@70"] == seen


def test_without_a_full_cache_history_is_the_recipes_own_answers(network, coder):
    long = text(TRAINED_LENGTH // 4)
    few = {"max_new_tokens": 3, "prefill_chunk": 64}
    (only,) = compare(network, coder, long, QUESTIONS, [STREAM], **few, turns=True)
    assert only.fidelity is None
    talk = kvhive.read(network, coder, long, STREAM, prefill_chunk=64).conversation()
    said = [talk.ask(question, max_new_tokens=3) for question in QUESTIONS]
    assert [answer.text for answer in only.answers] == said


def test_all_turns_count_towards_the_trained_length(network, coder):
    asked = [text(60)] * 4  # each fits, all do not
    assert compare(network, coder, text(20), asked, ["full"], max_new_tokens=1)
    with pytest.raises(ValueError, match=f"{TRAINED_LENGTH:,} positions"):
        compare(network, coder, text(20), asked, ["full"], max_new_tokens=1, turns=True)


def test_a_sweep_takes_turns_too(network, coder):
    _, (found,) = sweep(
        network, coder, text(60), QUESTIONS, ["h2o"], 0.5, max_new_tokens=3, turns=True
    )
    recipe = found.probes[-1].recipe
    measured = compare(network, coder, text(60), QUESTIONS, [recipe], max_new_tokens=3, turns=True)
    assert found.probes[-1].kl == measured[1].fidelity.kl


def test_turns_cannot_be_read_with_the_document(network, coder):
    with pytest.raises(ValueError, match='leave mode "aware" out'):
        compare(network, coder, text(30), QUESTIONS, [], mode="aware", turns=True)
