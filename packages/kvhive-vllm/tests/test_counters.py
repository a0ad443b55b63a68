"""Numbers get from the scheduler's process to the server's."""

from __future__ import annotations

from pathlib import Path

from kvhive_vllm.counters import Counters, Reader


def test_what_is_written_is_read(tmp_path: Path) -> None:
    place = tmp_path / "counters"
    reader = Reader(place)
    assert reader.read() is None
    counters = Counters(place)
    assert reader.read() == (0, 0, 0, 0)
    counters.write(2**40, 7, 30, 4)
    assert reader.read() == (2**40, 7, 30, 4)
    counters.close()
    assert reader.read() == (2**40, 7, 30, 4)


def test_what_was_left_over_is_replaced_and_nothing_stays(tmp_path: Path) -> None:
    place = tmp_path / "counters"
    place.write_bytes(b"left over")
    counters = Counters(place)
    assert place.stat().st_size == 32
    del counters
    assert not list(tmp_path.iterdir())


def test_who_reads_takes_the_name_away(tmp_path: Path) -> None:
    """An engine that is killed closes nothing; and of two servers one alone counts."""
    place = tmp_path / "counters"
    counters, first, second = Counters(place), Reader(place), Reader(place)
    assert first.read() == (0, 0, 0, 0)
    assert not list(tmp_path.iterdir())
    counters.write(1, 2, 3, 4)
    assert second.read() is None
    assert first.read() == (1, 2, 3, 4)
