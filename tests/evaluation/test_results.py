"""A run's folder survives kills, full disks and second runs."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path

import pytest

from kvhive.evaluation import results as module
from kvhive.evaluation.results import LOCK, ROWS, RUN, ResultsFolder, read_rows, read_run

VERSIONS = ("kvhive", "torch", "transformers", "python", "machine", "model_type")
FACTS = {
    **dict.fromkeys(VERSIONS, "1"),
    "threads": 1,
    "model_sha256": "abc",
    "data": {"books": "sha256:1"},
}
SETTINGS = {
    **{"model": "m", "dtype": "float32", "device": "cpu", "recipes": ["full", "h2o@0.4"]},
    **{"tasks": ["kv"], "modes": ["aware"], "limit": 3, "seed": 0, "block": None, "hold": False},
    "engine": "transformers",
}


def unit(item: str) -> list[dict[str, object]]:
    got = {"task": "kv", "mode": "aware", "item": item, "cluster": item}
    held: dict[str, object] = {"seen": 9, "kept": 4.5, "bytes": 90, "full_bytes": 180}
    probe = {"scores": {"nll": 1.5}, "facts": {"turn": 1}, "text": "a"}
    more = {"scores": {"nll": 1.5}, "probes": [probe], "facts": {"length": 9}}
    return [{**got, "recipe": recipe, **held, **more} for recipe in ("full", "none")]


def test_rows_come_back(tmp_path):
    with ResultsFolder(tmp_path / "deep" / "run") as results:
        assert results.begin(SETTINGS, FACTS) == []
        results.append(unit("ä"))
        results.append(unit("b"))
    folder = tmp_path / "deep" / "run"
    assert read_rows(folder) == [*unit("ä"), *unit("b")]
    assert read_run(folder) == {"settings": SETTINGS, "facts": FACTS}
    with ResultsFolder(folder) as results:
        assert results.begin(SETTINGS, FACTS) == [*unit("ä"), *unit("b")]


def test_a_torn_last_line_is_left_out(tmp_path):
    with ResultsFolder(tmp_path) as results:
        results.begin(SETTINGS, FACTS)
        results.append(unit("a"))
    with (tmp_path / ROWS).open("ab") as file:
        file.write(b'{"item": "b", "rec')
    assert read_rows(tmp_path) == unit("a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"rubbish", "expected a result as a JSON object"),
        (b"\xff\xfe\x00", "expected a result as a JSON object"),
        (b"[" * 100_000, "expected a result as a JSON object"),
        (b"[1, 2]", "the record must be a JSON object, got a list of 2"),
        (b"3", "the record must be a JSON object, got 3"),
        (b'{"task": "b"}', "the record has no field 'item'; expected task, item,"),
    ],
)
def test_other_damage_is_told(tmp_path, damage, message):
    one, two = (json.dumps(row).encode() for row in unit("a"))
    (tmp_path / ROWS).write_bytes(b"\n".join([one, damage, two, b""]))
    with pytest.raises(
        ValueError, match=r"rows\.jsonl' is damaged in line 2: .*; delete that"
    ) as got:
        read_rows(tmp_path)
    assert message in str(got.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("task", 3, "field 'task' must be text, got 3"),
        ("item", None, "field 'item' must be text, got None"),
        ("recipe", ["full"], "field 'recipe' must be text, got a list of 1"),
        ("mode", "awake", "field 'mode' must be one of agnostic, aware, stream, got 'awake'"),
        ("seen", "9", "field 'seen' must be a whole number, 0 or more, got '9'"),
        ("seen", True, "field 'seen' must be a whole number, 0 or more, got True"),
        ("bytes", -1, "field 'bytes' must be a whole number, 0 or more, got -1"),
        ("kept", float("nan"), "field 'kept' must be a finite number, 0 or more, got nan"),
        ("scores", [], "field 'scores' must be a JSON object, got a list of 0"),
        ("scores.nll", "low", "field 'scores.nll' must be a finite number, got 'low'"),
        ("scores.nll", float("inf"), "field 'scores.nll' must be a finite number, got inf"),
        ("scores.nll", None, "field 'scores.nll' must be a finite number, got None"),
        ("probes", {}, "field 'probes' must be a list of probes, got an object of 0"),
        ("probes", [3], "field 'probes[0]' must be a JSON object, got 3"),
        ("probes", [{"scores": {}}], "field 'probes[0]' has no field 'facts'"),
        ("facts.length", "long", "field 'facts.length' must be a finite number, got 'long'"),
        ("facts.x", [1], "field 'facts.x' must be text, a finite number, true, false or null"),
        ("cluster", "\ud800", r"field 'cluster' must be text, got '\ud800'"),
    ],
)
def test_fields_of_other_types_are_told(tmp_path, path, value, message):
    good, bad = (copy.deepcopy(row) for row in unit("a"))
    place, (*above, name) = bad, path.split(".")
    for part in above:
        place = place[part]
    place[name] = value
    lines = [json.dumps(row) for row in (good, bad, unit("b")[0])]
    (tmp_path / ROWS).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl' is damaged in line 2: ") as got:
        read_rows(tmp_path)
    assert message in str(got.value)
    assert "; delete that line, and kvhive evaluate computes it anew" in str(got.value)


def test_a_result_that_is_there_twice_is_told(tmp_path):
    rows = [*unit("a"), unit("a")[0]]
    (tmp_path / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="in line 3: the same result as in line 1; delete"):
        read_rows(tmp_path)


@pytest.mark.parametrize("name", [RUN, ROWS, "rows.jsonl.gz"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_told(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}' is no file but a folder, pipe or device"):
        (read_run if name == RUN else read_rows)(tmp_path)


def test_nothing_is_written_where_a_pipe_lies(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(ValueError, match="is no file"), ResultsFolder(tmp_path):
        pass


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"{}", b'{"settings": {}, "facts": 3}']
)
def test_a_damaged_run_is_told(tmp_path, damage):
    (tmp_path / RUN).write_bytes(damage)
    with pytest.raises(ValueError, match=r"run\.json' is damaged.*; restore it, or choose another"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("settings", "limit", "many", "'settings.limit' must be a whole number, 0 or more"),
        ("settings", "recipes", [], "'settings.recipes' must be a list of texts, at least one"),
        ("settings", "modes", ["awake"], r"'settings.modes\[0\]' must be one of agnostic, aware"),
        ("settings", "hold", 1, "'settings.hold' must be true or false, got 1"),
        ("facts", "torch", None, "'facts.torch' must be text, got None"),
        ("facts", "items", {"kv": -1}, "'facts.items.kv' must be a whole number, 0 or more"),
    ],
)
def test_a_runs_fields_of_other_types_are_told(tmp_path, part, name, value, message):
    run = {"settings": dict(SETTINGS), "facts": dict(FACTS)}
    run[part][name] = value
    (tmp_path / RUN).write_text(json.dumps(run))
    with pytest.raises(ValueError, match=rf"run\.json' is damaged: field {message}"):
        read_run(tmp_path)


def test_no_run_at_all_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no run\.json"):
        read_run(tmp_path)


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    with (
        ResultsFolder(tmp_path),
        pytest.raises(ValueError, match="another run is writing to"),
        ResultsFolder(tmp_path),
    ):
        pass
    with ResultsFolder(tmp_path):  # free again
        pass


def test_a_folder_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(OSError, match=r"cannot write to the folder .*; choose another"),
            ResultsFolder(place),
        ):
            pass


@pytest.mark.parametrize(
    ("settings", "facts", "message"),
    [
        ({**SETTINGS, "limit": 4}, FACTS, "a run with limit 3, not 4;"),
        (SETTINGS, {**FACTS, "model_sha256": "x"}, "another model_sha256"),
        (SETTINGS, {**FACTS, "data": {"books": "sha256:2"}}, "another data"),
    ],
)
def test_a_folder_holds_one_run(tmp_path, settings, facts, message):
    with ResultsFolder(tmp_path) as results:
        results.begin(SETTINGS, FACTS)
    with ResultsFolder(tmp_path) as results, pytest.raises(ValueError, match=message):
        results.begin(settings, facts)


def test_versions_may_change_in_between(tmp_path):
    with ResultsFolder(tmp_path) as results:
        results.begin(SETTINGS, FACTS)
    with ResultsFolder(tmp_path) as results:
        assert results.begin(SETTINGS, {**FACTS, "torch": "2"}) == []


def test_rows_of_unknown_origin_are_not_touched(tmp_path):
    (tmp_path / ROWS).write_bytes(b'{"item": 1}\n')
    with (
        ResultsFolder(tmp_path) as results,
        pytest.raises(ValueError, match=r"has rows but no run\.json"),
    ):
        results.begin(SETTINGS, FACTS)
    assert (tmp_path / ROWS).read_bytes() == b'{"item": 1}\n'


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """Half a unit reaches the disk before it is full; none of it stays."""

    def full(file, data):
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with ResultsFolder(tmp_path) as results:
        results.begin(SETTINGS, FACTS)
        results.append(unit("a"))
        with monkeypatch.context() as patch:
            patch.setattr(module, "_write", full)
            with pytest.raises(OSError, match="nothing is lost: make room and run the same"):
                results.append(unit("b"))
        assert read_rows(tmp_path) == unit("a")
        results.append(unit("c"))
    assert read_rows(tmp_path) == [*unit("a"), *unit("c")]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_full_at_the_very_end_loses_nothing(tmp_path, monkeypatch, number):
    """There is no room for the rows in order beside those that are there."""

    def full(descriptor):
        raise OSError(number, "no room")

    with ResultsFolder(tmp_path) as results:
        results.begin(SETTINGS, FACTS)
        results.append(unit("b"))
        results.append(unit("a"))
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(OSError, match="nothing is lost: make room and run the same"):
                results.finish(lambda row: row["item"])
    assert read_rows(tmp_path) == [*unit("b"), *unit("a")]
    assert not list(tmp_path.glob(".*.part"))


def test_finished_rows_are_in_order(tmp_path):
    with ResultsFolder(tmp_path) as results:
        results.begin(SETTINGS, FACTS)
        for item in ("c", "a", "b"):
            results.append(unit(item))
        results.finish(lambda row: (row["item"], row["recipe"]))
    lines = (tmp_path / ROWS).read_text().splitlines()
    assert [json.loads(line)["item"] for line in lines] == list("aabbcc")
    assert not list(tmp_path.glob(".*.part"))
