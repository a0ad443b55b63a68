"""Every data set of the catalogue from small copies in the layout that its public source has."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from kvhive.evaluation.data import CATALOGUE
from kvhive.evaluation.data.hub import HubSource
from kvhive.evaluation.data.public import Hub
from kvhive.evaluation.schema import check

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` writes what it prepares to a folder of the test."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)


def passage(number: int, gold: bool) -> Row:
    more = {"id": str(number), "score": "1.05", "hasanswer": gold, "original_retrieval_index": 0}
    return {**more, "title": f"T{number}", "text": f"Passage {number}.", "isgold": gold}


def question(number: int, gold_at: int, passages: int = 10) -> Row:
    """A line of a file of lost-in-the-middle."""
    ctxs = [passage(10 * number + place, place == gold_at) for place in range(passages)]
    gold = {"title": "T", "long_answer": "L", "chunked_long_answer": "C", "short_answers": ["s"]}
    asked = {"question": f"who is {number}", "answers": [f"Ann {number}", "Ann"]}
    return {**asked, "ctxs": ctxs, "nq_annotated_gold": gold}


def hotpot(name: str, paragraphs: int) -> Row:
    return {
        "id": name,
        "question": "Who?",
        "answer": "Ann",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": {"title": ["T0"], "sent_id": [0]},
        "context": {
            "title": [f"T{place}" for place in range(paragraphs)],
            "sentences": [["A b.", " C."]] * paragraphs,
        },
    }


def long_bench(name: str) -> Row:
    return {
        "input": "Question: Where is it?",
        "context": "Question: Who is it?\nType: Individual\n",
        "answers": ["Location"],
        "length": 9,
        "dataset": name,
        "language": "en",
        "all_classes": ["Location", "Individual"],
        "_id": "f00",
    }


BOOK = {
    "short_book_title": "A Book by Ann",
    "publication_date": 1850,
    "url": "http://example.org/1",
    "text": "A BOOK\n\n\nOne line\nof two.\n\nAnother.\n",
}
LINES = ("", " = First = \n", " one \n", " = = Part = = \n", " two \n", " = Second = \n", " x \n")
ROWS: dict[str, list[Row]] = {
    "books": [BOOK],
    "cnn_dailymail": [{"article": " Bees sleep. ", "highlights": "Bees.", "id": "7"}],
    "hotpotqa_10": [hotpot("q", 10), hotpot("short", 2)],
    "longbench_mini": [long_bench("trec")],
    "multi_news": [{**long_bench("multi_news"), "answers": [" All slept. "], "all_classes": None}],
    "qa10_nq/gold_at_0": [question(0, 0)],
    "qa10_nq/gold_at_4": [question(0, 4)],
    "qa10_nq/gold_at_9": [question(0, 9)],
    "shared_context_nq": [question(n, 0, 1) for n in (0, 1, 1, *range(2, 24))],
    "wikitext2": [{"text": line} for line in LINES],
    "xsum": [{"document": "Bees sleep at night. ", "summary": "Bees sleep.", "id": "35232142"}],
}
TEN = {
    "id": "nq0",
    "question": "who is 0",
    "answers": ["Ann 0", "Ann"],
    "ctxs": [{"title": f"T{n}", "text": f"Passage {n}.", "isgold": n == 4} for n in range(10)],
    "gold_index": 4,
}
RECORDS: dict[str, Row] = {
    "books": {
        "id": "pg19-0",
        "title": "A Book by Ann",
        "text": "A BOOK\n\nOne line of two.\n\nAnother.",
    },
    "cnn_dailymail": {"id": "7", "article": "Bees sleep.", "summary": "Bees."},
    "longbench_mini": {
        "id": "trec_0",
        "dataset": "trec",
        "context": "Question: Who is it?\nType: Individual\n",
        "answers": ["Location"],
    },
    "multi_news": {
        "id": "multi_news_0",
        "article": "Question: Who is it?\nType: Individual",
        "summary": "All slept.",
    },
    "qa10_nq/gold_at_4": TEN,
    "wikitext2": {
        "id": "wiki0",
        "order": 0,
        "title": "First",
        "text": " = First = \n one \n = = Part = = \n two ",
    },
    "xsum": {"id": "35232142", "article": "Bees sleep at night.", "summary": "Bees sleep."},
}


def mirror(folder: Path, name: str, rows: list[Row]) -> HubSource:
    """A local copy in the source's layout, and the loader that reads it."""
    hub = CATALOGUE[name].hub
    if hub.path == "json":
        path = folder / str(hub.files).partition("://")[2]
        path.parent.mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        write_parquet(folder / hub.path, hub, rows)
    return HubSource(folder)


def write_parquet(place: Path, hub: Hub, rows: list[Row]) -> None:
    """Where a card says which files are a split's, or as the hub's own conversion lays them out."""
    if hub.files is not None:
        path = place / hub.files.replace("*", "0000")
    else:
        path = place / (hub.config or "data") / f"{hub.split}-00000-of-00001.parquet"
        card = (
            f"---\nconfigs:\n- config_name: {hub.config or 'default'}\n  data_files:\n"
            f"  - split: {hub.split}\n    path: {hub.config or 'data'}/{hub.split}-*\n---\n"
        )
        place.mkdir(parents=True)
        (place / "README.md").write_text(card, encoding="utf-8")
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_data_set_loads(tmp_path, name):
    source = mirror(tmp_path, name, ROWS[name])
    records = source.records(name)
    for record in records:
        check(record, CATALOGUE[name].record, name)
    if name in RECORDS:
        assert records[0] == RECORDS[name]
    hub = CATALOGUE[name].hub
    assert source.identity(name).startswith(f"hub:{hub.address} sha256:")
    assert source.notes(name)


def test_other_rows_have_another_identity(tmp_path, monkeypatch):
    names = []
    for text in ("a", "b"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache_{text}")
        books = mirror(tmp_path / text, "books", [{**BOOK, "text": text}])
        names.append(books.identity("books"))
    assert names[0] != names[1]


def test_wikitext_is_cut_at_its_headings(tmp_path):
    records = mirror(tmp_path, "wikitext2", ROWS["wikitext2"]).records("wikitext2")
    assert [(record["title"], record["order"]) for record in records] == [
        ("First", 0),
        ("Second", 1),
    ]


def test_hotpot_has_ten_paragraphs_of_joined_sentences(tmp_path):
    (record,) = mirror(tmp_path, "hotpotqa_10", ROWS["hotpotqa_10"]).records("hotpotqa_10")
    assert record["answers"] == ["Ann"]
    assert record["ctxs"][3] == {"title": "T3", "text": "A b. C.", "isgold": False}
    assert record["ctxs"][0]["isgold"]


def test_shared_contexts_hold_the_passage_of_every_question_once(tmp_path):
    name = "shared_context_nq"
    records = mirror(tmp_path, name, ROWS[name]).records(name)
    assert [record["id"] for record in records] == ["shared0", "shared1"]
    for record in records:
        assert len({one["title"] for one in record["ctxs"]}) == 10
        assert sorted(turn["gold_index"] for turn in record["turns"]) == list(range(10))
        for turn in record["turns"]:
            number = int(turn["answers"][0].split()[1])
            assert record["ctxs"][turn["gold_index"]]["title"] == f"T{10 * number}"
    asked = [turn["id"] for record in records for turn in record["turns"]]
    assert len(set(asked)) == 20
    assert "nq0" not in asked  # from the end, where qa10 begins at the beginning


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(OSError, match=r"cannot load abisee/cnn_dailymail@.*: .*--data FOLDER"):
        HubSource(tmp_path).records("cnn_dailymail")
    empty = mirror(tmp_path / "empty", "hotpotqa_10", [hotpot("short", 2)])
    with pytest.raises(ValueError, match="gave no usable rows"):
        empty.records("hotpotqa_10")
    other = mirror(tmp_path / "other", "xsum", [{"text": "Bees."}])
    with pytest.raises(ValueError, match=r"has other columns than expected for 'xsum' \(KeyError"):
        other.records("xsum")
