"""A run's folder survives kills, full disks and second runs."""

from __future__ import annotations

import errno
import json

import pytest

from kvhive.evaluation import results as module
from kvhive.evaluation.results import ROWS, RUN, ResultsFolder, read_rows, read_run

FACTS = {"model_sha256": "abc", "data": {"books": "sha256:1"}, "torch": "1"}
SETTINGS = {"recipes": ["full", "h2o@0.4"], "limit": 3}


def unit(item: str) -> list[dict[str, object]]:
    got = {"task": "kv", "mode": "aware", "item": item, "cluster": item}
    more: dict[str, object] = {"scores": {"nll": 1.5}, "probes": [], "facts": {}}
    return [{**got, "recipe": recipe, **more} for recipe in ("full", "none")]


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


@pytest.mark.parametrize("damage", [b"rubbish", b"\xff\xfe\x00", b"[1, 2]", b"3", b'{"item": "b"}'])
def test_other_damage_is_told(tmp_path, damage):
    one = json.dumps(unit("a")[0]).encode()
    (tmp_path / ROWS).write_bytes(b"\n".join([one, damage, one, b""]))
    with pytest.raises(ValueError, match=r"rows\.jsonl' is damaged in line 2: expected .* delete"):
        read_rows(tmp_path)


@pytest.mark.parametrize("damage", [b"{", b"\xff", b"[]", b"{}", b'{"settings": {}, "facts": 3}'])
def test_a_damaged_run_is_told(tmp_path, damage):
    (tmp_path / RUN).write_bytes(damage)
    with pytest.raises(ValueError, match=r"run\.json' is damaged"):
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

    def full(file, data):
        raise OSError(number, "no room")

    with ResultsFolder(tmp_path) as results:
        results.begin(SETTINGS, FACTS)
        results.append(unit("b"))
        results.append(unit("a"))
        with monkeypatch.context() as patch:
            patch.setattr(module, "_write", full)
            with pytest.raises(OSError, match="nothing is lost: make room and run the same"):
                results.finish(lambda row: row["item"])
    assert read_rows(tmp_path) == [*unit("b"), *unit("a")]
    assert not list(tmp_path.glob("*.part"))


def test_finished_rows_are_in_order(tmp_path):
    with ResultsFolder(tmp_path) as results:
        results.begin(SETTINGS, FACTS)
        for item in ("c", "a", "b"):
            results.append(unit(item))
        results.finish(lambda row: (row["item"], row["recipe"]))
    lines = (tmp_path / ROWS).read_text().splitlines()
    assert [json.loads(line)["item"] for line in lines] == list("aabbcc")
    assert not list(tmp_path.glob("*.part"))
