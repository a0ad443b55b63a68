"""Data from a folder, from the hub's loader and made up; and what goes wrong with it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kvhive.evaluation.data import CATALOGUE, open_source
from kvhive.evaluation.data.hub import HubSource
from kvhive.evaluation.data.schema import check
from kvhive.evaluation.data.source import Builtin, Folder

ARTICLE = {"id": "a1", "article": "Bees sleep at night. So do boats.", "summary": "Bees sleep."}


def write(folder: Path, name: str, records: list[object]) -> Path:
    """A data set's file with these records."""
    path = folder / CATALOGUE[name].file
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


@pytest.mark.parametrize("name", CATALOGUE)
def test_made_up_records_have_the_right_shape(name):
    records = Builtin().records(name)
    assert len(records) >= 2
    for record in records:
        check(record, CATALOGUE[name].fields, name)
    assert records == Builtin().records(name)


def test_a_folder_is_read_by_name(tmp_path):
    write(tmp_path, "xsum", [ARTICLE])
    source = open_source(str(tmp_path))
    assert source.records("xsum") == [ARTICLE]
    assert source.identity("xsum").startswith("sha256:")


def test_other_contents_are_noted(tmp_path):
    path = write(tmp_path, "xsum", [ARTICLE])
    source = Folder(tmp_path)
    (note,) = source.notes("xsum")
    assert "xsum/test_subset.jsonl.gz is not the published file" in note
    before = source.identity("xsum")
    path.unlink()
    write(tmp_path, "xsum", [{**ARTICLE, "summary": "Boats sleep."}])
    assert Folder(tmp_path).identity("xsum") != before


def test_missing_data_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"'xsum' .* is missing: .* give --data FOLDER"):
        Folder(tmp_path).records("xsum")
    with pytest.raises(FileNotFoundError, match="there is no data folder"):
        open_source(str(tmp_path / "nowhere"))
    monkeypatch.delenv("KVHIVE_DATA", raising=False)
    with pytest.raises(ValueError, match=r"no evaluation data: .* --data hub .* --data builtin"):
        open_source(None)


def test_the_environment_names_a_folder(tmp_path, monkeypatch):
    write(tmp_path, "xsum", [ARTICLE])
    monkeypatch.setenv("KVHIVE_DATA", str(tmp_path))
    assert open_source(None).records("xsum") == [ARTICLE]
    assert isinstance(open_source("builtin"), Builtin)


def packed(text: bytes) -> bytes:
    """The same bytes at any time: they are in the names of tests, which workers compare."""
    return gzip.compress(text, mtime=0)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"no gzip", "is damaged"),
        (packed(b"{}\n" * 400)[:30], "is damaged"),
        (packed(b"\xff\xfe{}"), "is damaged"),
        (packed(b'{"id": "a"\n'), "line 1: not JSON"),
        (packed(b"[1]\n"), "line 1: expected a JSON object, got list"),
        (packed(b'\n{"id": "a", "article": "b"}\n'), "line 2: the record has no field"),
        (packed(b'{"id": 3, "article": "b", "summary": "c"}'), "field 'id' must be text"),
        (packed(b"\n \n"), "is empty: it holds no records"),
    ],
)
def test_bad_files_are_told(tmp_path, contents, message):
    path = write(tmp_path, "xsum", [])
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path).records("xsum")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("kv_retrieval", "records", [["a"]]),
        ("qa10_nq/gold_at_0", "answers", []),
        ("qa10_nq/gold_at_0", "ctxs", [{"title": "t"}]),
        ("shared_context_nq", "turns", [{"question": "q"}]),
        ("wikitext2", "order", "first"),
    ],
)
def test_wrong_shapes_are_told(name, field, value):
    record = {**Builtin().records(name)[0], field: value}
    with pytest.raises(ValueError, match=f"here: field '{field}' must be"):
        check(record, CATALOGUE[name].fields, "here")


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="unknown data set 'xsun'; did you mean: xsum"):
        Builtin().records("xsun")


def mirror(folder: Path, name: str, rows: list[object]) -> HubSource:
    """A local copy of a data set in the hub's layout, and the loader that reads it."""
    hub = CATALOGUE[name].hub
    place = folder / hub.path
    place.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "rows.jsonl").write_text(lines, encoding="utf-8")
    (place / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {hub.config}\n  data_files:\n"
        f"  - split: {hub.split}\n    path: rows.jsonl\n---\n",
        encoding="utf-8",
    )
    return HubSource(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` writes what it prepares to a folder of the test."""
    import datasets

    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)


def test_the_hub_loader_converts_rows(tmp_path):
    rows = [{"id": "7", "article": " Bees sleep. ", "highlights": "Bees."}]
    source = mirror(tmp_path, "cnn_dailymail", rows)
    assert source.records("cnn_dailymail") == [
        {"id": "7", "article": "Bees sleep.", "summary": "Bees."}
    ]
    assert source.identity("cnn_dailymail") == (
        "hub:abisee/cnn_dailymail@96df5e686bee6baa90b8bee7c28b81fa3fa6223d"
    )


def test_the_hub_loader_cuts_wikitext_at_its_headings(tmp_path):
    lines = [
        "",
        " = First = \n",
        " one \n",
        " = = Part = = \n",
        " two \n",
        " = Second = \n",
        " x \n",
    ]
    rows = [{"text": line} for line in lines]
    source = mirror(tmp_path, "wikitext2", rows)
    records = source.records("wikitext2")
    assert [record["title"] for record in records] == ["First", "Second"]
    assert records[0]["text"] == " = First = \n one \n = = Part = = \n two "
    assert [record["order"] for record in records] == [0, 1]


def test_the_hub_loader_joins_hotpot_sentences(tmp_path):
    titles = [f"T{place}" for place in range(10)]
    rows = [
        {
            "id": "q",
            "question": "Who?",
            "answer": "Ann",
            "supporting_facts": {"title": ["T3"], "sent_id": [0]},
            "context": {"title": titles, "sentences": [["A b.", " C."]] * 10},
        },
        {
            "id": "short",
            "question": "Who?",
            "answer": "Ann",
            "supporting_facts": {"title": ["T0"], "sent_id": [0]},
            "context": {"title": ["T0"], "sentences": [["A"]]},
        },
    ]
    source = mirror(tmp_path, "hotpotqa_10", rows)
    (record,) = source.records("hotpotqa_10")
    assert record["answers"] == ["Ann"]
    assert record["ctxs"][3] == {"title": "T3", "text": "A b. C.", "isgold": True}
    assert not record["ctxs"][0]["isgold"]


def test_the_hub_loader_tells_what_is_wrong(tmp_path):
    with pytest.raises(OSError, match=r"cannot load .*cnn_dailymail from the hub: .*--data FOLDER"):
        HubSource(tmp_path).records("cnn_dailymail")
    with pytest.raises(ValueError, match="'kv_retrieval' is not on the hub in this form"):
        HubSource(tmp_path).records("kv_retrieval")
    empty = mirror(tmp_path, "hotpotqa_10", [_short()])
    with pytest.raises(ValueError, match="gave no usable rows"):
        empty.records("hotpotqa_10")


def _short() -> dict[str, object]:
    context = {"title": ["T0"], "sentences": [["A"]]}
    facts = {"title": ["T0"], "sent_id": [0]}
    got = {"id": "s", "question": "Who?", "answer": "Ann"}
    return {**got, "supporting_facts": facts, "context": context}
