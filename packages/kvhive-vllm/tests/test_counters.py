"""Numbers get from the scheduler's process to the server's."""

from __future__ import annotations

from pathlib import Path

from kvhive_vllm.counters import Counters, read


def test_what_is_written_is_read(tmp_path: Path) -> None:
    place = tmp_path / "counters"
    assert read(place) is None
    counters = Counters(place)
    assert read(place) == (0, 0, 0, 0)
    counters.write(2**40, 7, 30, 4)
    assert read(place) == (2**40, 7, 30, 4)
    counters.close()
    assert read(place) is None


def test_what_was_left_over_is_replaced_and_nothing_stays(tmp_path: Path) -> None:
    place = tmp_path / "counters"
    place.write_bytes(b"left over")
    counters = Counters(place)
    assert read(place) == (0, 0, 0, 0)
    del counters
    assert not place.exists()


def test_a_file_of_another_form_says_nothing(tmp_path: Path) -> None:
    place = tmp_path / "counters"
    place.write_bytes(b"short")
    assert read(place) is None
