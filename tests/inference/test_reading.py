"""Read once, ask often: the answers are those of the ways by hand."""

from __future__ import annotations

import pytest

import kvhive
from kvhive.cache.hive_cache import HiveCache
from kvhive.inference.generation import decode, end_tokens, read
from kvhive.inference.prompt import Prompt, question_ids
from kvhive.inference.text_pieces import pieces
from kvhive.model.chat import ChatFormat
from tests.cli.tiny import TRAINED_LENGTH, model, text, tokenizer

ASKED = ["Who?", "Where was it?"]
NEW = 6


@pytest.mark.parametrize("chat", [True, False])
def test_fresh_questions_and_turns_are_what_they_are_by_hand(chat: bool) -> None:
    network, coder = model(), tokenizer(chat)
    reading = kvhive.read(network, coder, text(60), "h2o@0.4", prefill_chunk=64)
    form, ends = ChatFormat.of(coder), end_tokens(network, coder)
    cache = HiveCache.for_model(network, "h2o@0.4")
    read(network, cache, Prompt.build(coder, text(60), []).prefix, 64)
    talk, lead, document = reading.conversation(), (), cache.fork()
    for question in ASKED:
        for asked, own, before in ((reading, document.fork(), ()), (talk, cache, lead)):
            logits = read(network, own, [*before, *question_ids(form, question)], 64)
            ids = [token for token, _ in decode(network, own, logits, NEW, ends)]
            expected = coder.decode(ids, skip_special_tokens=True)
            assert asked.ask(question, max_new_tokens=NEW) == expected.strip()
        lead = (*(ids[-1:] if ids[-1] not in ends else ()), *form.ids(form.turn))
    assert str(talk.report()) == str(cache.report())


def test_an_answer_may_be_left_before_its_end() -> None:
    reading = kvhive.read(model(), tokenizer(), text(60), "h2o@0.4")
    talk = reading.conversation()
    left = talk.stream("Who?", max_new_tokens=50)
    next(left)
    assert talk.ask("Where?", max_new_tokens=3) is not None
    assert next(left, None) is None


def test_pieces_are_whole_letters_and_lose_nothing() -> None:
    coder, words = tokenizer(), "Bees: 蜂, café, 🐝!"
    parts = list(pieces(coder, coder(words).input_ids))
    assert "".join(parts) == words
    assert not any("\ufffd" in part for part in parts)


def test_paths_are_read_and_names_of_files_refused(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text(30), encoding="utf-8")
    reading = kvhive.read(model(), tokenizer(), path, "full")
    assert repr(reading).startswith("Reading('a.txt', HiveCache(full: ")
    with pytest.raises(ValueError, match="is the name of a file"):
        kvhive.read(model(), tokenizer(), str(path), "full")


def test_what_cannot_be_read_or_asked() -> None:
    network, coder = model(), tokenizer()
    with pytest.raises(ValueError, match="document is empty"):
        kvhive.read(network, coder, " ")
    with pytest.raises(ValueError, match=f"{TRAINED_LENGTH:,} positions.*in chunks"):
        kvhive.read(network, coder, text(TRAINED_LENGTH // 4), "h2o@100")
    reading = kvhive.read(network, coder, text(30), "full")
    for question, options, words in (
        (" ", {}, "question is empty"),
        ("Who?", {"max_new_tokens": 0}, "at least 1"),
        ("Who?", {"temperature": -1}, "temperature must be"),
        ("Who?", {"top_p": 0.9}, "give a temperature"),
        ("Who?", {"temperature": 1.0, "top_p": 1.5}, "top_p must be"),
        ("Who?", {"temperature": 1.0, "top_k": 0}, "top_k must be"),
        ("Who?", {"max_new_tokens": 2000}, "positions the model was trained on"),
    ):
        with pytest.raises(ValueError, match=words):
            reading.stream(question, **options)
