"""The protocol: what is compressed together with what, and what stays."""

from __future__ import annotations

import dataclasses

import torch

from kvhive.evaluation.protocols import ModelUnderTest, ask, converse
from kvhive.evaluation.sequences import Sequence
from kvhive.evaluation.types import Item, Probe
from kvhive.recipe import Recipe
from tests.contract.recipes import SMALL

TEXT = "The bees were at home. " * 12
QUESTIONS = ("Where were the bees?", "Who was at home, and when, and why at all?")

KINDS = ({"target": " home"}, {"choices": (" home", " away")}, {"target": " home", "limit": 3})


def item(*queries: str, **probe: object) -> Item:
    probes = tuple(Probe(query, cue="They were", **probe) for query in queries)
    return Item("one", "Read this.\n" + TEXT, "Read this.\n", probes)


class Watch:
    """Notes what a runner is given to read and to go on with."""

    def __init__(self, tested: ModelUnderTest) -> None:
        self.read: list[str] = []
        self.kept: list[list[torch.Tensor]] = []
        self.sequences: list[Sequence] = []
        self.went_on: list[str] = []
        runner, decode = tested.runner, tested.tokenizer.decode
        read, advance = runner.read, runner.advance

        def noted_read(ids, recipes):
            sequences = read(ids, recipes)
            self.read.append(decode(list(ids)))
            self.kept.append(kept(sequences))
            self.sequences = sequences
            return sequences

        def noted_advance(sequences, ids):
            self.went_on.append(decode(list(ids)))
            advance(sequences, ids)

        runner.read, runner.advance = noted_read, noted_advance


def kept(sequences: list[Sequence]) -> list[torch.Tensor]:
    """Positions that the sequences hold, layer by layer."""
    return [held for sequence in sequences for held in sequence.cache.positions_kept()]


def test_an_agnostic_cache_never_saw_the_question(tested):
    watch = Watch(tested)
    for question in QUESTIONS:
        one = item(question, choices=(" home", " away"))
        ask(tested, one, one.prefix, "agnostic", most=9)
    assert watch.read[0] == watch.read[1] == "<|start|>user\nRead this.\n" + TEXT
    for one, other in zip(*watch.kept, strict=True):
        assert torch.equal(one, other)
    assert watch.went_on[0] == QUESTIONS[0] + "<|end|>\n<|start|>assistant\nThey were"


def test_agnostic_caches_are_the_same_for_all_probes(tested):
    """Every policy: what is kept depends on no probe, and asking changes nothing of it."""
    tested = tested.with_recipes([Recipe.parse(recipe) for recipe in SMALL])
    before = tested.runner.read(tested.prefix(item(), item().prefix), tested.recipes)
    watch = Watch(tested)
    for question in QUESTIONS:
        one = item()
        one = dataclasses.replace(one, probes=tuple(item(question, **k).probes[0] for k in KINDS))
        ask(tested, one, one.prefix, "agnostic", most=9)
        for ours, theirs, after in zip(
            watch.kept[-1], kept(before), kept(watch.sequences), strict=True
        ):
            assert torch.equal(ours, theirs)
            assert torch.equal(ours, after)


def test_an_aware_cache_saw_it(tested):
    watch = Watch(tested)
    one = item(QUESTIONS[0], choices=(" home", " away"))
    ask(tested, one, one.prefix, "aware", most=9)
    assert watch.read == [
        f"<|start|>user\nRead this.\n{TEXT}{QUESTIONS[0]}<|end|>\n<|start|>assistant\nThey were"
    ]
    assert watch.went_on == []


def test_modes_agree_for_the_full_cache(tested):
    one = item(QUESTIONS[0], target=" home", choices=(" home", " away"), limit=5)
    apart, together = (
        ask(tested, one, one.prefix, mode, most=9)[0] for mode in ("agnostic", "aware")
    )
    for left, right in zip(apart.outcomes, together.outcomes, strict=True):
        assert torch.allclose(torch.tensor(left.logprobs), torch.tensor(right.logprobs), atol=1e-4)
        assert torch.allclose(torch.tensor(left.choices), torch.tensor(right.choices), atol=1e-4)
        assert left.text == right.text


def test_each_question_starts_from_the_same_state(tested):
    """Multi-request: the second question gets what it gets alone."""
    settings = {"target": " home", "choices": (" home", " away"), "limit": 5}
    both, second = item(*QUESTIONS, **settings), item(QUESTIONS[1], **settings)
    together = ask(tested, both, both.prefix, "agnostic", most=9)
    alone = ask(tested, second, second.prefix, "agnostic", most=9)
    for one, other in zip(together, alone, strict=True):
        ours, theirs = one.outcomes[1], other.outcomes[0]
        assert torch.allclose(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-4)
        assert torch.allclose(torch.tensor(ours.choices), torch.tensor(theirs.choices), atol=1e-4)
        assert ours.text == theirs.text


def test_targets_in_one_batch_give_what_they_give_in_turn(tested):
    targets = item(*QUESTIONS, target=" home")
    mixed = dataclasses.replace(
        targets,
        probes=tuple(dataclasses.replace(one, choices=(" a", " b")) for one in targets.probes),
    )
    batch = ask(tested, targets, targets.prefix, "agnostic", most=9)
    turns = ask(tested, mixed, mixed.prefix, "agnostic", most=9)
    for one, other in zip(batch, turns, strict=True):
        for ours, theirs in zip(one.outcomes, other.outcomes, strict=True):
            left, right = torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs)
            assert torch.allclose(left, right, atol=1e-4)


def test_a_conversation_goes_on_with_the_right_answers(tested):
    watch = Watch(tested)
    probes = tuple(
        Probe(question, cue="They were", target=" home", history=" at home.")
        for question in QUESTIONS
    )
    one = Item("talk", "Read this.\n" + TEXT, "", probes)
    converse(tested, one, one.prefix, "aware", most=1)
    assert watch.read == [
        f"<|start|>user\nRead this.\n{TEXT}{QUESTIONS[0]}<|end|>\n<|start|>assistant\nThey were"
    ]
    assert watch.went_on == [
        f" at home.<|end|>\n<|start|>user\n{QUESTIONS[1]}<|end|>\n<|start|>assistant\nThey were"
    ]


def test_an_agnostic_conversation_compresses_the_context_alone(tested):
    watch = Watch(tested)
    one = item(*QUESTIONS, target=" home", history=" at home.")
    converse(tested, one, one.prefix, "agnostic", most=1)
    assert watch.read == ["<|start|>user\nRead this.\n" + TEXT]
    assert [text[: text.index("<|end|>")] for text in watch.went_on] == [
        QUESTIONS[0],
        " at home.",
    ]


def test_later_turns_hear_the_answers_before(tested):
    """The second turn differs from the same question asked alone, because of its history."""
    settings = {"target": " home", "history": " at home."}
    both = item(*QUESTIONS, **settings)
    talk = converse(tested, both, both.prefix, "agnostic", most=1)
    apart = ask(tested, both, both.prefix, "agnostic", most=1)
    for one, other in zip(talk, apart, strict=True):
        first, second = zip(one.outcomes, other.outcomes, strict=True)
        assert torch.allclose(
            torch.tensor(first[0].logprobs), torch.tensor(first[1].logprobs), atol=1e-4
        )
        assert second[0].logprobs != second[1].logprobs


def test_answers_are_cut_before_a_stop_string(tested):
    one = item(QUESTIONS[0], limit=30)
    (whole, *_) = ask(tested, one, one.prefix, "agnostic", most=1)
    text = whole.outcomes[0].text
    assert len(text) > 3
    stop = text[2]
    (cut, *_) = ask(
        tested, item(QUESTIONS[0], limit=30, stop=(stop,)), one.prefix, "agnostic", most=1
    )
    assert cut.outcomes[0].text == text[: text.index(stop)]


def test_held_is_measured_when_decoding_begins(tested):
    one = item(QUESTIONS[0], target=" home")
    shown = ask(tested, one, one.prefix, "agnostic", most=1)
    full, h2o, streaming = shown
    seen = len(tested.prefix(one, one.prefix))
    assert full.start.seen == full.start.kept == seen
    assert h2o.start.kept == 70
    assert streaming.start.kept == 80
    assert h2o.start.nbytes < full.start.nbytes
    assert h2o.end.kept <= 70
    assert full.end.seen == seen + len(tested.query(one, one.probes[0])) + len(" home") - 1
