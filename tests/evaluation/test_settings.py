"""Which tasks run in which modes, and what is refused before anything runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvhive.evaluation.settings import Settings, modes_of
from kvhive.evaluation.tasks import GROUPS, parse_task, parse_tasks


def test_a_task_runs_in_those_of_its_modes_that_are_wanted():
    assert modes_of(parse_task("passkey"), ("aware", "stream")) == ["aware"]
    assert modes_of(parse_task("wikitext"), Settings().modes) == ["stream"]


def test_a_task_without_the_mode_is_refused_by_name():
    settings = Settings(tasks=("wikitext", "passkey"), modes=("stream",))
    with pytest.raises(ValueError, match="task passkey has no mode stream; it has agnostic and"):
        settings.checked()


def test_tasks_of_a_group_without_the_mode_are_left_out_with_a_note():
    settings = Settings(tasks=("suite",), modes=("stream",))
    assert settings.checked().tasks == ("wikitext",)
    notes = settings.notes()
    assert len(notes) == len(GROUPS["suite"]) - 1
    assert "task fidelity has no mode stream; it has agnostic; it is left out" in notes
    assert settings.checked().notes() == []


def test_a_group_of_which_nothing_is_left_is_refused():
    with pytest.raises(ValueError, match="no task of ruler has the mode stream"):
        Settings(tasks=("ruler",), modes=("stream",)).checked()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 10**6 + 1}, "limit must be between 1 and 1000000, got 1000001"),
        ({"limit": 2**63}, "limit must be between 1 and"),
        ({"seed": -1}, "seed must be between 0 and 9223372036854775807, got -1"),
        ({"seed": 10**23}, "seed must be between 0 and"),
        ({"threads": 100_000}, "threads must be between 1 and 1024"),
        ({"block": 2**40}, "block must be between 1 and 2147483647"),
    ],
)
def test_numbers_have_bounds(change, message):
    with pytest.raises(ValueError, match=message):
        replace(Settings(tasks=("kv",)), **change).checked()


@pytest.mark.parametrize("group", ["generated", "long"])
def test_generated_groups_need_no_data(group):
    tasks = parse_tasks([group])
    assert len(tasks) == len(GROUPS[group])
    assert all(task.data == () for task in tasks)
