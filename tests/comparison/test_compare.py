"""The measuring behind `kvhive compare`."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from kvhive.cache.hive_cache import HiveCache
from kvhive.comparison.compare import compare
from kvhive.inference.generation import read
from kvhive.inference.prompt import Prompt
from tests.cli.tiny import HEADS, TRAINED_LENGTH, model, text, tokenizer

STREAM = "buzz(preset=paper)@200"  # which counts positions in the cache
QUESTIONS = ["What did the keeper keep?", "Where?"]


@pytest.fixture(scope="module")
def network() -> LlamaForCausalLM:
    return model()


@pytest.fixture(scope="module")
def coder() -> PreTrainedTokenizerFast:
    return tokenizer()


def greedy(ids: list[int], new: int) -> tuple[list[int], torch.Tensor]:
    """A stock model's greedy continuation, and log-probabilities [new, vocabulary] before each."""
    stock, cache, given = model(), DynamicCache(), torch.tensor([ids])
    tokens, rows = [], []
    for _ in range(new):
        with torch.no_grad():
            logits = stock(input_ids=given, past_key_values=cache).logits[0, -1]
        rows.append(logits.log_softmax(-1))
        tokens.append(int(logits.argmax()))
        if tokens[-1] == 256:
            break
        given = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(rows)


def test_the_full_cache_comes_first_and_agrees_with_itself(network, coder):
    results = compare(network, coder, text(60), QUESTIONS, ["buzz@0.4", "full"], max_new_tokens=6)
    assert [result.recipe for result in results] == ["full", "buzz@0.4"]
    full = results[0]
    assert full.reference
    assert not results[1].reference
    assert full.fidelity.kl == 0
    assert full.fidelity.top1 == 1
    assert full.fidelity.positions == sum(len(answer.tokens) for answer in full.answers)


@pytest.mark.parametrize("mode", ["agnostic", "aware"])
def test_the_full_cache_answers_as_the_stock_model_does(network, coder, mode):
    results = compare(network, coder, text(60), QUESTIONS, [], max_new_tokens=6, mode=mode)
    assert [result.recipe for result in results] == ["full"]
    prompt = Prompt.build(coder, text(60), QUESTIONS)
    for answer, question in zip(results[0].answers, prompt.questions, strict=True):
        expected, _ = greedy([*prompt.prefix, *question], 6)
        assert list(answer.tokens) == expected
        assert answer.text == coder.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("recipe", ["full(positions=original)", "h2o@4096", "window@4096"])
def test_a_recipe_that_keeps_everything_has_no_distance(network, coder, recipe):
    other = compare(network, coder, text(60), QUESTIONS, [recipe], max_new_tokens=6)[1]
    assert other.fidelity.kl == pytest.approx(0, abs=1e-5)
    assert other.fidelity.top1 == 1


def test_numbers_are_those_of_the_cache(network, coder):
    result = compare(network, coder, text(80), QUESTIONS, ["h2o@0.3"], max_new_tokens=3)[1]
    prompt = Prompt.build(coder, text(80), QUESTIONS)
    cache = HiveCache.for_model(network, "h2o@0.3")
    read(network, cache, prompt.prefix)
    expected = cache.report()
    assert result.report.nbytes == expected.nbytes
    assert result.report.full_nbytes == expected.full_nbytes
    assert torch.equal(result.report.kept, expected.kept)
    assert result.report.tokens_seen == len(prompt.prefix)
    survivors = result.survivors
    assert survivors.kept.shape == (HEADS, len(prompt.prefix))
    assert survivors.rows == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert torch.equal(survivors.kept.sum(1), expected.kept.flatten())


def test_fidelity_is_measured_on_the_full_caches_answers(network, coder):
    """The distance of a window, computed again by hand for the first question."""
    recipe, new = "window@70", 5
    result = compare(network, coder, text(60), QUESTIONS[:1], [recipe], max_new_tokens=new)[1]
    prompt = Prompt.build(coder, text(60), QUESTIONS[:1])
    tokens, full = greedy([*prompt.prefix, *prompt.questions[0]], new)
    cache = HiveCache.for_model(network, recipe)
    read(network, cache, prompt.prefix)
    rows = [read(network, cache, prompt.questions[0])]
    rows += [read(network, cache, [token]) for token in tokens[:-1]]
    given = torch.stack(rows).log_softmax(-1)
    kl = (full.exp() * (full - given)).sum(-1).mean()
    assert kl > 0.01
    assert result.fidelity.kl == pytest.approx(float(kl), rel=1e-3)
    agree = (full.argmax(-1) == given.argmax(-1)).float().mean()
    assert result.fidelity.top1 == pytest.approx(float(agree))


def test_questions_do_not_see_each_other(network, coder):
    """Each is asked on its own copy: in another order every answer stays what it was."""
    forth = compare(network, coder, text(60), QUESTIONS, ["buzz@70"], max_new_tokens=5)[1]
    back = compare(network, coder, text(60), QUESTIONS[::-1], ["buzz@70"], max_new_tokens=5)[1]
    assert [a.tokens for a in forth.answers] == [a.tokens for a in back.answers][::-1]


def test_agnostic_compresses_the_document_alone_and_aware_with_the_question(network, coder):
    prompt = Prompt.build(coder, text(60), QUESTIONS)
    seen = {}
    for mode in ("agnostic", "aware"):
        result = compare(network, coder, text(60), QUESTIONS, [], max_new_tokens=2, mode=mode)[0]
        seen[mode] = result.report.tokens_seen
    assert seen["agnostic"] == len(prompt.prefix)
    assert seen["aware"] == len(prompt.prefix) + len(prompt.questions[0])


def test_reading_in_chunks_without_eviction_changes_nothing(network, coder):
    whole = compare(network, coder, text(60), QUESTIONS, [], max_new_tokens=6)[0]
    parts = compare(network, coder, text(60), QUESTIONS, [], max_new_tokens=6, prefill_chunk=37)[0]
    assert [a.tokens for a in whole.answers] == [a.tokens for a in parts.answers]


def test_progress_ends_at_one_for_every_recipe(network, coder):
    got: dict[str, list[float]] = {}
    compare(
        network,
        coder,
        text(40),
        QUESTIONS,
        ["window@70"],
        max_new_tokens=2,
        prefill_chunk=50,
        progress=lambda recipe, doing, share: got.setdefault(recipe, []).append(share),
    )
    assert list(got) == ["full", "window@70"]
    for shares in got.values():
        assert shares == sorted(shares)
        assert shares[0] == 0
        assert shares[-1] == 1


def test_beyond_the_trained_length_only_recipes_that_count_positions_in_the_cache(network, coder):
    long = text(TRAINED_LENGTH // 4)
    result = compare(
        network,
        coder,
        long,
        QUESTIONS,
        [STREAM],
        max_new_tokens=3,
        prefill_chunk=64,
    )
    assert [one.recipe for one in result] == [STREAM]
    assert result[0].fidelity is None
    assert result[0].report.tokens_seen > TRAINED_LENGTH
    assert int(result[0].report.kept.max()) <= 200
    for recipe, chunk, way in (
        ("full", 64, "leave that recipe out"),
        ("h2o@200", 64, r"h2o\(positions=cache\)"),
        (STREAM, None, "in chunks"),
        ("buzz(preset=paper)@0.99", 64, "smaller budget"),
    ):
        with pytest.raises(ValueError, match=f"{TRAINED_LENGTH:,} positions.*{way}"):
            compare(network, coder, long, QUESTIONS, [recipe], prefill_chunk=chunk)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"questions": []}, "at least one question"),
        ({"questions": [" "]}, "question is empty"),
        ({"document": "\n"}, "document is empty"),
        ({"recipes": ["buz@0.4"]}, "did you mean: buzz"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_input_that_cannot_work_is_refused_before_anything_runs(network, coder, change, words):
    given = {"document": text(30), "questions": QUESTIONS, "recipes": ["window@70"]} | change
    got: list[str] = []
    with pytest.raises(ValueError, match=words):
        compare(network, coder, **given, progress=lambda recipe, doing, share: got.append(doing))
    assert got == []
