"""Scoring and writing through compressed caches, against the obvious way to do the same."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from kvhive.cache.hive_cache import HiveCache
from kvhive.evaluation.scoring import ModelRunner
from kvhive.evaluation.sequences import (
    Continuation,
    Sequence,
    TokenScores,
    evicts_while_decoding,
    held,
)
from kvhive.recipe import Recipe
from tests.cli import tiny

RECIPES = ["full", "h2o@60", "streaming_llm@40", "snapkv(decode=none)@50", "buzz@80"]
PROMPT = tuple(range(3, 153))
CONTINUATIONS = [
    Continuation((9, 8, 7, 6)),
    Continuation((40, 41, 42, 43, 44, 45, 46), start=3),
    Continuation((5,)),
    Continuation((100, 90), start=1),
]


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    """The model of `network`, never attached."""
    return tiny.model().double()


def sequences_of(
    network: LlamaForCausalLM, block: int | None = None, most: int = 2**30
) -> list[Sequence]:
    return ModelRunner(network, block, most).read(PROMPT, [Recipe.parse(text) for text in RECIPES])


@torch.no_grad()
def one_by_one(
    network: LlamaForCausalLM, recipe: str, continuation: Continuation, hold: bool = False
) -> TokenScores:
    """Feed prompt and continuation token by token after the prompt; the literal algorithm."""
    cache = HiveCache.for_model(network, recipe)
    logits = network(torch.tensor([PROMPT]), past_key_values=cache).logits[0, -1]
    if hold:
        cache.freeze()
    logprobs, hits = [], []
    for place, token in enumerate(continuation.ids):
        if place >= continuation.start:
            logprobs.append(float(logits.log_softmax(-1)[token]))
            hits.append(int(logits.argmax()) == token)
        step = network(torch.tensor([[token]]), past_key_values=cache)
        logits = step.logits[0, -1]
    return TokenScores(tuple(logprobs), tuple(hits))


def close(one: TokenScores, other: TokenScores) -> bool:
    return one.hits == other.hits and one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_scores_are_those_of_the_literal_algorithm(network):
    got = ModelRunner(network).force(sequences_of(network), CONTINUATIONS)
    for recipe, results in zip(RECIPES, got, strict=True):
        for continuation, forced in zip(CONTINUATIONS, results, strict=True):
            assert close(forced, one_by_one(network, recipe, continuation)), (recipe, continuation)


def test_held_caches_lose_nothing_after_the_prompt(network):
    recipes = [*RECIPES, "elastic@60", "cascading@64"]
    runner = ModelRunner(network, hold=True)
    sequences = runner.read(PROMPT, [Recipe.parse(text) for text in recipes])
    kept = [sequence.cache.positions_kept()[0][0, 0].tolist() for sequence in sequences]
    for recipe, results in zip(recipes, runner.force(sequences, CONTINUATIONS), strict=True):
        for continuation, forced in zip(CONTINUATIONS, results, strict=True):
            assert close(forced, one_by_one(network, recipe, continuation, hold=True)), (
                recipe,
                continuation,
            )
    runner.advance(sequences, (9, 8, 7, 6))
    for sequence, before in zip(sequences, kept, strict=True):
        after = sequence.cache.positions_kept()[0][0, 0].tolist()
        assert after == [*before, 150, 151, 152, 153], sequence.recipe


def test_the_full_cache_scores_as_the_plain_model(network, plain):
    (results, *_) = ModelRunner(network).force(sequences_of(network), CONTINUATIONS)
    for continuation, forced in zip(CONTINUATIONS, results, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([[*PROMPT, *continuation.ids]])).logits[0].log_softmax(-1)
        places = range(len(PROMPT) + continuation.start, len(PROMPT) + len(continuation.ids))
        ids = [*PROMPT, *continuation.ids]
        expected = [float(logits[place - 1, ids[place]]) for place in places]
        assert forced.logprobs == pytest.approx(expected, abs=1e-4)


def test_little_memory_changes_nothing(network):
    plenty = ModelRunner(network).force(sequences_of(network), CONTINUATIONS)
    little = ModelRunner(network, most_bytes=1).force(sequences_of(network), CONTINUATIONS)
    for one, other in zip(plenty, little, strict=True):
        assert all(close(a, b) for a, b in zip(one, other, strict=True))


def test_scoring_leaves_the_sequences_where_they_are(network):
    runner, sequences = ModelRunner(network), sequences_of(network)
    before = [sequence.cache.positions_kept() for sequence in sequences]
    first = runner.force(sequences, CONTINUATIONS)
    for sequence, kept in zip(sequences, before, strict=True):
        now = sequence.cache.positions_kept()
        assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))
    again = runner.force(sequences, CONTINUATIONS)
    assert all(
        close(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=False)
    )


def test_going_on_is_decoding(network):
    """A question after the prompt is fed as decoding would feed it, never compressed anew."""
    runner, sequences = ModelRunner(network), sequences_of(network)
    question = tuple(range(60, 75))
    runner.advance(sequences, question)
    for recipe, sequence in zip(RECIPES, sequences, strict=True):
        cache = HiveCache.for_model(network, recipe)
        with torch.no_grad():
            network(torch.tensor([PROMPT]), past_key_values=cache)
            for token in question:
                logits = network(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        assert torch.allclose(sequence.logits, logits, atol=1e-4)
        for ours, literal in zip(
            sequence.cache.positions_kept(), cache.positions_kept(), strict=True
        ):
            assert torch.equal(ours, literal), recipe


def test_who_evicts_while_decoding():
    got = {text: evicts_while_decoding(Recipe.parse(text)) for text in RECIPES}
    assert got == {
        "full": False,
        "h2o@60": True,
        "streaming_llm@40": True,
        "snapkv(decode=none)@50": False,
        "buzz@80": True,
    }


def test_answers_are_those_of_generate(network):
    runner, sequences = ModelRunner(network), sequences_of(network)
    written = runner.generate(sequences, 12, lambda answer: False)
    for recipe, answer in zip(RECIPES, written, strict=True):
        cache = HiveCache.for_model(network, recipe)
        ids = torch.tensor([PROMPT])
        output = network.generate(
            ids, past_key_values=cache, max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert answer == output[0, len(PROMPT) :].tolist(), recipe


def test_a_finished_answer_lets_the_others_go_on(network):
    runner, sequences = ModelRunner(network), sequences_of(network)
    whole = runner.generate([sequence.fork() for sequence in sequences], 12, lambda answer: False)
    stop = whole[0][2]
    cut = runner.generate(sequences, 12, lambda answer: answer[-1] == stop)
    for long, short in zip(whole, cut, strict=True):
        end = long.index(stop) + 1 if stop in long else 12
        assert short == long[:end]


def test_blocks_evict_after_each(network):
    """Strict reading: no head ever holds more than budget + block."""
    runner = ModelRunner(network, block=16)
    recipes = [Recipe.parse(text) for text in ("full", "h2o@60", "snapkv(decode=none)@50")]
    for recipe, sequence in zip(recipes, runner.read(PROMPT, recipes), strict=True):
        cache = HiveCache.for_model(network, recipe)
        with torch.no_grad():
            for start in range(0, len(PROMPT), 16):
                step = torch.tensor([PROMPT[start : start + 16]])
                logits = network(step, past_key_values=cache).logits[0, -1]
        assert torch.allclose(sequence.logits, logits, atol=1e-4)
        for ours, own in zip(sequence.cache.positions_kept(), cache.positions_kept(), strict=True):
            assert torch.equal(ours, own)


def test_what_is_held_is_measured(network):
    for recipe, sequence in zip(RECIPES, sequences_of(network), strict=True):
        report = sequence.cache.report()
        now = held(sequence.cache)
        assert now.seen == len(PROMPT)
        assert now.nbytes == report.nbytes == sequence.cache.nbytes
        assert now.nbytes >= sum(layer.nbytes for layer in sequence.cache.hive_layers()) > 0
        assert now.kept == pytest.approx(report.tokens_kept)
        assert (now.kept < len(PROMPT)) == (recipe != "full")


def test_nothing_read_yet(network):
    (sequence,) = ModelRunner(network).read((), [Recipe.parse("full")])
    with pytest.raises(ValueError, match="nothing was read"):
        ModelRunner(network).force([sequence], [Continuation((1, 2))])
    ((forced,),) = ModelRunner(network).force([sequence], [Continuation((7, 8, 9), start=1)])
    assert len(forced.logprobs) == 2
