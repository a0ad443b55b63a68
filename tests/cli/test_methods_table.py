"""The page of methods is the registries', and every policy and allocation has its card."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvhive.allocations import ALLOCATIONS
from kvhive.cli import app
from kvhive.cli.methods_table import methods_page
from kvhive.policies import POLICIES
from kvhive.stores import STORES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", [*POLICIES, *ALLOCATIONS])
def test_every_policy_and_allocation_has_its_card(name: str) -> None:
    """A card begins with a heading and names a recipe of the method."""
    card = DOCS / "methods" / f"{name}.md"
    assert card.is_file(), f"{name!r} has no card: write docs/methods/{name}.md"
    text = card.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"`{name}" in text or f"/{name}" in text


def test_the_page_is_current() -> None:
    """What stands in docs/ is what the registries say today."""
    shown = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert shown == methods_page(), "docs/methods.md is not current: run `make docs`"


def test_every_method_has_a_row() -> None:
    """Nothing is missing, and links are relative to the page."""
    page = methods_page()
    for name in [*POLICIES, *ALLOCATIONS, *STORES]:
        assert f"\n| [`{name}`](methods/{name}.md) | " in page


def test_the_command_prints_it() -> None:
    """The command line gives the same text."""
    result = CliRunner().invoke(app, ["recipes", "--markdown"])
    assert result.exit_code == 0
    assert result.stdout == methods_page()
