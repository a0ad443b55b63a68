"""Parts are tokenised apart, and together they are the chat that the template writes."""

from __future__ import annotations

import pytest

from kvhive.evaluation.framing import ChatFormat
from kvhive.evaluation.types import Item, Probe
from tests.cli import tiny


def test_parts_make_up_the_template(tokenizer):
    frame = ChatFormat.of(tokenizer)
    first, second = (
        Probe("\n\nWho?", cue="It was ", history="Ann."),
        Probe("\n\nWhere?", cue="In "),
    )
    item = Item("i", "A story.", "", (first, second))
    parts = [
        frame.prefix(item, item.prefix),
        frame.query(item, first),
        frame.reply(item, first),
        frame.query(item, second),
    ]
    chat = [
        {"role": "user", "content": "A story.\n\nWho?"},
        {"role": "assistant", "content": "It was Ann."},
        {"role": "user", "content": "\n\nWhere?"},
    ]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "".join(tokenizer.decode(list(part)) for part in parts) == whole + "In "


def test_without_a_template_there_are_plain_lines():
    frame = ChatFormat.of(tiny.tokenizer(chat=False))
    probe = Probe("\n\nWho?", cue="It was ")
    item = Item("i", "A story.", "", (probe,))
    ids = [*frame.prefix(item, item.prefix), *frame.query(item, probe)]
    assert frame.tokenizer.decode(ids) == "A story.\n\nWho?\nAnswer: It was "


def test_items_outside_a_chat_are_taken_as_they_are(tokenizer):
    frame = ChatFormat.of(tokenizer)
    probe = Probe((5, 6), target=(7,))
    item = Item("i", (1, 2, 3), (), (probe,), chat=False)
    assert frame.prefix(item, item.prefix) == (1, 2, 3)
    assert frame.query(item, probe) == (5, 6)
    assert frame.target(probe) == (7,)


def test_a_template_that_hides_words_is_refused():
    mute = tiny.tokenizer()
    mute.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}!{% endif %}"
    with pytest.raises(ValueError, match="does not show the words of every turn"):
        ChatFormat.of(mute)
