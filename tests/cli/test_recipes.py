"""`kvhive recipes`: what the registries know, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import Tensor

from kvhive import __version__
from kvhive.allocations import ALLOCATIONS
from kvhive.cli.recipes import needs_text
from kvhive.kernels import NOTHING, Needs
from kvhive.policies import POLICIES, Policy
from kvhive.slots import Slots
from kvhive.spec import knob
from kvhive.stores import STORES


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_every_method_is_listed(plain):
    result = plain("recipes")
    assert result.exit_code == 0
    for name in [*POLICIES, *ALLOCATIONS, *STORES]:
        assert name in result.stdout


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_policy_shows_its_knobs_source_and_cost(plain, name):
    result = plain("recipes", name)
    assert result.exit_code == 0
    policy = POLICIES[name]
    for words in (policy.source, policy.cost, needs_text(policy().needs)):
        assert words in result.stdout
    for one in policy.knobs():
        assert one.name in result.stdout
        assert " ".join(one.meaning.split()[:3]) in result.stdout


def test_allocations_and_stores_are_shown_too(plain):
    for name in [*ALLOCATIONS, *STORES]:
        result = plain("recipes", name)
        assert result.exit_code == 0
        assert name in result.stdout


def test_a_new_policy_appears_without_touching_the_command_line(plain, monkeypatch):
    @dataclass(frozen=True)
    class Newest(Policy):
        """Keep what was never thought of before."""

        name: ClassVar[str] = "newest"
        source: ClassVar[str] = "arXiv:0000.00000"
        cost: ClassVar[str] = "a lot of thinking"

        depth: int = knob(7, "how deep to think")

        def select(self, slots: Slots, budget: Tensor) -> Tensor:
            """Everything."""
            return slots.valid

    monkeypatch.setitem(POLICIES._classes, "newest", Newest)
    assert "Keep what was never thought of before." in plain("recipes").stdout
    shown = plain("recipes", "newest").stdout
    for words in ("depth", "7", "how deep to think", "a lot of thinking"):
        assert words in shown


@pytest.mark.parametrize("columns", [80, 160])
def test_no_sentence_is_cut_and_no_word_broken(plain, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    printed = plain("recipes").stdout
    assert max(map(len, printed.splitlines())) <= columns
    printed_words = set(printed.split())
    for policy in POLICIES.values():
        sentence = " ".join((policy.__doc__ or "").replace("`", "").split()).partition(". ")[0]
        words = {*sentence.removesuffix(".").split()[:-1], policy.source.split(",")[0].split()[0]}
        assert words <= printed_words
        if columns == 80:
            assert sentence.removesuffix(".") in " ".join(printed.split())


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("name", list(POLICIES))
def test_knobs_fit_a_terminal(plain, monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    printed = plain("recipes", name).stdout
    assert max(map(len, printed.splitlines())) <= columns
    for one in POLICIES[name].knobs():
        assert {one.name, *one.meaning.split()} <= set(printed.split())


def test_an_unknown_name_is_answered_with_near_ones(plain):
    result = plain("recipes", "buz")
    assert result.exit_code == 2
    assert "did you mean: buzz" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (NOTHING, "nothing"),
        (Needs(columns="sum"), "column sums"),
        (Needs(columns="square", last_rows=32), "column sums of squares, last 32 rows"),
        (Needs(keys=True, queries=True), "keys, queries"),
    ],
)
def test_needs_are_put_in_words(needs, words):
    assert needs_text(needs) == words


def test_the_version_is_printed(plain):
    result = plain("--version")
    assert result.exit_code == 0
    assert result.stdout == f"kvhive {__version__}\n"


def test_help_shows_examples(plain):
    assert "compare" in plain("--help").stdout
    for command in ("compare", "show", "generate", "recipes"):
        result = plain(command, "--help")
        assert result.exit_code == 0
        assert f"$ kvhive {command}" in result.stdout or f"| kvhive {command}" in result.stdout
