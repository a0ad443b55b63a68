"""Parts are tokenised apart, and together they are the chat that the template writes."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kvhive.evaluation.protocols import ModelUnderTest
from kvhive.evaluation.scoring import ModelRunner
from kvhive.evaluation.types import Item, Probe
from kvhive.inference.prompt import Prompt
from kvhive.model.chat import ChatFormat, chat_ids
from tests.cli import tiny

SPECIAL = "Words such as <|end|> are text."
TEMPLATES = {
    "ChatML": tiny.CHAT,
    "system turn first": f"<|start|>system\nBe kind.<|end|>\n{tiny.CHAT}",
    "brackets": (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "[INST] {{ message['content'] }} [/INST]{% else %}{{ message['content'] }}</s>{% endif %}"
        "{% endfor %}"
    ),
}


@pytest.fixture(params=[None, *TEMPLATES], ids=["no template", *TEMPLATES])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """One that puts a token before every text."""
    made = tiny.tokenizer(chat=request.param is not None)
    made.chat_template = TEMPLATES.get(request.param)
    made.bos_token = "<|start|>"
    first = ("<|start|>", made.convert_tokens_to_ids("<|start|>"))
    made._tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[first]
    )
    return made


def written(tokenizer: PreTrainedTokenizerFast, *contents: str) -> str:
    """What the template makes of turns of user and assistant; by hand where there is none."""
    if not tokenizer.chat_template:
        user, *rest = contents
        turns = [f"<|start|>{user}\nAnswer:"]
        turns += [f" {a}\n\n{b}\nAnswer:" for a, b in zip(rest[::2], rest[1::2], strict=True)]
        return "".join(turns)
    roles = ["user", "assistant"] * len(contents)
    chat = [{"role": role, "content": one} for role, one in zip(roles, contents, strict=False)]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def parts_of_a_talk(tested: ModelUnderTest) -> list[tuple[int, ...]]:
    first = Probe("\n\nWho?", cue="It was ", history="Ann.")
    second = Probe("\n\nWhere?", cue="In ")
    item = Item("i", "A story.", "", (first, second))
    return [
        tested.prefix(item, item.prefix),
        tested.query(item, first),
        tested.reply(item, first),
        tested.query(item, second),
    ]


def test_parts_make_up_the_template(tokenizer):
    runner = ModelRunner(tiny.model())
    tested = ModelUnderTest(runner, ChatFormat.of(tokenizer), frozenset(), ())
    text = "".join(tokenizer.decode(list(part)) for part in parts_of_a_talk(tested))
    gap = "" if tokenizer.chat_template else " "
    whole = written(tokenizer, "A story.\n\nWho?", "It was Ann.", "\n\nWhere?")
    assert text == f"{whole}{gap}In "


def test_a_prompt_is_the_same_form_as_a_chat(tokenizer):
    """Document and question as one turn; what looks like a special token stays text."""
    prompt = Prompt.build(tokenizer, SPECIAL, ["Who?"])
    question = "Who?" if tokenizer.chat_template else "Question: Who?"
    ids = [*prompt.prefix, *prompt.questions[0]]
    assert tokenizer.decode(ids) == written(tokenizer, f"{SPECIAL}\n\n{question}")
    chat = ChatFormat.of(tokenizer)
    assert prompt.prefix[: prompt.head] == chat.ids(chat.head)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    document = prompt.prefix[prompt.head :]
    assert end not in document
    assert "".join(SPECIAL[start:stop] for start, stop in prompt.spans) == SPECIAL
    assert len(document) == len(prompt.spans) == len(SPECIAL) + 2


def test_a_text_to_be_answered(tokenizer):
    text = tokenizer.decode(chat_ids(tokenizer, SPECIAL))
    alone = f"<|start|>{SPECIAL}"
    assert text == (written(tokenizer, SPECIAL) if tokenizer.chat_template else alone)


def test_ids_pass_through(tokenizer):
    chat = ChatFormat.of(tokenizer)
    assert chat.ids((1, 2, 3)) == (1, 2, 3)
    assert chat.opening((1, 2)) == (*chat.ids(chat.head), 1, 2)
    assert chat.question((5, 6)) == (5, 6, *chat.ids(chat.answer))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }}{% if add_generation_prompt %}!{% endif %}",
        tiny.CHAT.replace("<|end|>", "<|end|>{{ message['content'] }}"),
        "nothing",
    ],
)
def test_a_template_that_hides_or_repeats_words_is_refused(template: str):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="does not show the words of every turn once"):
        _ = ChatFormat.of(tokenizer).turn


@pytest.mark.parametrize("template", ["{{ nope", "{{ messages[99].content }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_refused(template: str):
    made = tiny.tokenizer()
    made.chat_template = template
    with pytest.raises(ValueError, match="chat template cannot be used"):
        ChatFormat.of(made)
