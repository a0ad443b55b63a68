"""Data from a folder, from the hub's loader and made up; and what goes wrong with it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kvhive.evaluation.data import CATALOGUE, open_source
from kvhive.evaluation.data.source import Builtin, Folder
from kvhive.evaluation.schema import check

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
        check(record, CATALOGUE[name].record, name)
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
    source = open_source(None)
    for ask in (source.records, source.identity):
        with pytest.raises(ValueError, match=r"for 'xsum': .* --data hub .* --data builtin .* gen"):
            ask("xsum")


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
        (packed(b"[1]\n"), "line 1: the record must be a JSON object, got a list of 1"),
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
    ("name", "field", "value", "message"),
    [
        ("books", "text", 3, "'text' must be text, got 3"),
        ("qa10_nq/gold_at_0", "answers", [], "'answers' must be a list of texts, at least one"),
        ("qa10_nq/gold_at_0", "answers", ["a", None], r"'answers\[1\]' must be text, got None"),
        ("qa10_nq/gold_at_0", "ctxs", [{"title": "t"}], r"'ctxs\[0\]' has no field 'text'"),
        ("shared_context_nq", "turns", [{"question": "q"}], r"'turns\[0\]' has no field 'answers'"),
        ("wikitext2", "order", "first", "'order' must be a whole number, got 'first'"),
    ],
)
def test_wrong_shapes_are_told(name, field, value, message):
    record = {**Builtin().records(name)[0], field: value}
    with pytest.raises(ValueError, match=f"here: field {message}"):
        check(record, CATALOGUE[name].record, "here")


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="unknown data set 'xsun'; did you mean: xsum"):
        Builtin().records("xsun")
