"""Items of every task: what must be in them, and that the same seed gives the same."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from kvhive.evaluation.data.source import Builtin
from kvhive.evaluation.nouns import NOUNS
from kvhive.evaluation.tasks import GROUPS, TASKS, Task, parse_task, parse_tasks
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item

# A byte is a token here, so lists of words and of examples are long.
SMALL = {
    "kv": "kv(pairs=4)",
    "trec": "trec(shots=5)",
    "verbatim": "verbatim(tokens=400)",
    "wikitext": "wikitext(tokens=400, skip=100)",
    "books": "books(tokens=400, skip=100)",
    "wikitext_tail": "wikitext_tail(tokens=300, scored=50)",
    "fidelity": "fidelity(tokens=300, scored=50)",
    "word_codes": "word_codes(pairs=6, asked=3)",
}
NAMES = sorted(TASKS)


def small(name: str) -> Task:
    return parse_task(SMALL.get(name, name))


def first(task: Task, context: TaskContext, count: int = 3) -> list[Item]:
    return list(islice(task.items(context), count))


def text_of(item: Item, part: object, tokenizer) -> str:
    return part if isinstance(part, str) else tokenizer.decode(list(part))


@pytest.mark.parametrize("name", NAMES)
def test_items_are_well_formed(name, context, tested):
    task = small(name)
    items = first(task, context)
    assert len(items) == 3
    assert len({item.id for item in items}) == 3
    for item in items:
        json.dumps([dict(item.facts), [dict(probe.facts) for probe in item.probes]])
        assert len(tested.prefix(item, item.prefix)) > len(tested.prefix(item, item.bare))
        for probe in item.probes:
            if probe.choices:
                assert 0 <= probe.gold < len(probe.choices)
                assert len(set(probe.choices)) == len(probe.choices)
                assert all(tested.chat.ids(choice) for choice in probe.choices)
            assert bool(probe.limit) == bool(probe.references) or probe.choices
            if isinstance(probe.target, str):
                assert tested.query(item, probe)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_items(name, context, tokenizer):
    task = small(name)
    again = TaskContext(Builtin(), tokenizer, context.seed)
    assert first(task, context) == first(task, again)


@pytest.mark.parametrize(
    "name", ["passkey", "niah_multikey", "word_codes", "vt", "fwe", "verbatim"]
)
def test_another_seed_gives_others(name, context, tokenizer):
    other = TaskContext(Builtin(), tokenizer, context.seed + 1)
    assert first(small(name), context, 1) != first(small(name), other, 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_measure_has_a_name_of_its_own(name):
    names = [measure.name for measure in TASKS[name].measures]
    assert names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_where_it_comes_from(name):
    assert TASKS[name].__doc__
    for one in TASKS[name].knobs():
        assert one.meaning, one.name


NEEDLES = ["passkey", "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery"]


@pytest.mark.parametrize("name", NEEDLES)
def test_answers_lie_in_the_context_and_nowhere_else(name, context):
    for item in first(small(name), context, 5):
        for probe in item.probes:
            answers = probe.references or (str(probe.target),)
            for answer in answers:
                assert answer in item.prefix
                assert answer not in item.bare
                assert answer not in probe.query + probe.cue
            if probe.choices:
                assert probe.choices[probe.gold] == probe.target


@pytest.mark.parametrize("length", [512, 2000])
def test_haystacks_have_the_length_asked_for(length, context, tokenizer):
    for item in first(parse_task(f"passkey(lengths=({length},))"), context, 5):
        assert 0.7 * length <= context.count(item.prefix) <= 1.1 * length


def test_passkeys_lie_at_their_depth(context):
    for item in first(parse_task("passkey(lengths=(3000,))"), context, 5):
        place = item.prefix.index("The pass key is") / len(item.prefix)
        assert abs(place - item.facts["depth"]) < 0.12


def test_passkeys_go_through_the_grid(context):
    items = first(parse_task("passkey(lengths=(300, 600), depths=(0.0, 1.0))"), context, 5)
    cells = [(item.facts["length"], item.facts["depth"]) for item in items]
    assert cells == [(300, 0.0), (300, 1.0), (600, 0.0), (600, 1.0), (300, 0.0)]


def test_decoys_are_other_keys(context):
    (item,) = first(parse_task("passkey(decoys=3)"), context, 1)
    assert (
        sum(item.prefix.count(f"The {colour} key is") for colour in ("red", "blue", "green")) == 3
    )


def test_kv_asks_for_pairs_of_the_object(context):
    for item in first(parse_task("kv(pairs=6, asked=3)"), context, 4):
        pairs = dict(
            zip(*[iter(part.strip('"{}, \n') for part in _quoted(item.prefix))] * 2, strict=False)
        )
        assert len(pairs) == 6
        for probe in item.probes:
            key = _quoted(probe.query)[0]
            assert pairs[key] == probe.target == probe.choices[probe.gold]


def _quoted(text: str) -> list[str]:
    return text.split('"')[1::2]


def test_qa10_asks_each_question_at_every_place(context):
    items = first(parse_task("qa10"), context, 6)
    assert [item.facts["gold_index"] for item in items] == [0, 4, 9, 0, 4, 9]
    assert [item.cluster for item in items] == [items[0].cluster] * 3 + [items[3].cluster] * 3
    for item in items:
        (probe,) = item.probes
        right = probe.choices[probe.gold].strip()
        document = item.prefix.split("\nDocument [")[item.facts["gold_index"] - 10]
        assert right in document
        assert [probe.choices for probe in items[0].probes] == [items[1].probes[0].choices]


def test_shared_context_asks_for_passages_of_one_context(context):
    (item,) = first(parse_task("shared_context"), context, 1)
    assert len(item.probes) == 10
    for place, probe in enumerate(item.probes):
        assert probe.gold == place
        assert probe.choices == item.probes[0].choices
        assert all(choice.strip() in item.prefix for choice in probe.choices)
        assert probe.facts["turn"] == place + 1


def test_verbatim_answers_follow_the_cue_in_the_text(context):
    for item in first(parse_task("verbatim(tokens=500)"), context, 3):
        passage = bytes(item.prefix)
        break_size = len(context.ids("\n\n"))
        for probe in item.probes:
            start = round(probe.facts["depth"] * (500 - 16 - 32))
            assert bytes(probe.query[break_size:]) == passage[start : start + 16]
            assert bytes(probe.target) == passage[start + 16 : start + 48]


def test_chains_of_variables_end_at_their_value(context):
    for item in first(parse_task("vt(hops=2, chains=3, asked=3, tokens=2000)"), context, 3):
        lines = [line for line in item.prefix.splitlines() if line.startswith("VAR ")]
        holds = {}
        for line in lines:  # a chain's lines come in order
            name, value = line.removeprefix("VAR ").rstrip(".").split(" = ")
            holds[name] = holds.get(value.removeprefix("VAR "), value)
        assert len(lines) == 9
        for probe in item.probes:
            value = next(word for word in probe.query.rstrip(".").split() if word.isdigit())
            assert {name for name, held in holds.items() if held == value} == set(probe.references)


def test_frequent_words_are_the_frequent_ones(context):
    for name in ("cwe", "fwe"):
        for item in first(parse_task(f"{name}(tokens=3000)"), context, 3):
            words = [word for word in item.prefix.split("\n\n", 1)[1].split() if word.isalpha()]
            counts = sorted(
                {word: words.count(word) for word in words}.items(), key=lambda w: -w[1]
            )
            wanted = item.probes[0].references
            assert {word for word, _ in counts[: len(wanted)]} == set(wanted)
            assert counts[len(wanted) - 1][1] > counts[len(wanted)][1]


def test_many_shots_hide_what_they_ask(context):
    for item in first(small("trec"), context, 3):
        assert item.prefix.count("Question:") == 5
        for probe in item.probes:
            assert probe.query not in item.prefix
            assert probe.target.strip() in ("Place", "Person")


def test_wikitext_segments_are_the_text_in_order(context, tokenizer):
    task = small("wikitext")
    items = first(task, context, 3)
    joined = "".join(tokenizer.decode(list(item.prefix)) for item in items)
    assert task.text(context).startswith(joined[:1100])


def test_summaries_are_cut_between_sentences(context):
    (item,) = first(parse_task("xsum(tokens=300)"), context, 1)
    assert context.count(item.prefix) <= 310
    assert item.prefix.endswith(".")


def test_nouns_are_many_and_different():
    assert len(NOUNS) == len(set(NOUNS)) > 250


def test_tasks_print_as_they_are_read():
    for text in ("passkey", "passkey(lengths=(512, 1024), decoys=2)", "shared_context(turns=True)"):
        assert str(parse_task(text)) == text


def test_groups_are_known_tasks():
    for name in GROUPS:
        assert parse_tasks([name])
    assert {str(task) for task in parse_tasks(["all"])} == set(TASKS)
    assert [str(task) for task in parse_tasks(["kv", "ruler", "kv"])][:2] == ["kv", "niah_single"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paskey", "unknown task 'paskey'; did you mean: passkey"),
        ("passkey(length=5)", "passkey has no knob 'length'; did you mean: lengths"),
        ("kv(pairs='x')", "kv: pairs must be a whole number, got 'x'"),
        ("kv(pairs=True)", "kv: pairs must be a whole number, got True"),
        ("passkey(lengths=512)", r"lengths must be a list of whole numbers, .* got 512"),
        ("kv(pairs=4, asked=5)", "kv: asked must be at most pairs, got asked=5, pairs=4"),
        ("wikitext(skip=9000)", "skip must be less than tokens, got skip=9000, tokens=1024"),
        ("verbatim(tokens=60)", "tokens must be at least twice cue"),
        ("vt(asked=3)", "asked must be at most chains, got asked=3, chains=2"),
        ("vt(hops=-1)", "vt: hops must be between 0 and 50, got -1"),
        ("passkey(lengths=())", r"lengths must be a list of whole numbers, .* got \(\)"),
        ("passkey(lengths=(512, -5))", "passkey: lengths must be at least 1, got -5"),
        ("passkey(lengths=('a',))", r"lengths must be a list of whole numbers, .* got \('a',\)"),
        ("passkey(depths=(7.0,))", "passkey: depths must be between 0 and 1, got 7"),
        (
            "niah_single(hay='straw')",
            "hay must be one of book, prose, repeat, needles, got 's",
        ),
        ("cwe(tokens=0)", "cwe: tokens must be at least 1, got 0"),
        ("passkey(300)", "write knobs as name=value, got '300'"),
        ("shared_context(asked=1)", "asked must be between 2 and 10, got 1"),
        ("word_codes(pairs=400)", "pairs must be between 1 and 200, got 400"),
        ("kv(pairs=4)(5)", r"cannot read '\(5\)'; the form is name"),
        ("kv(pairs=", "the form is name"),
        ("", "the form is name"),
    ],
)
def test_bad_spellings_are_told(text, message):
    with pytest.raises(ValueError, match=message):
        parse_task(text)


def test_the_documentation_names_every_task():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    assert {name for line in lines for name in re.findall(r"`(\w+)`", line)} >= set(TASKS)
