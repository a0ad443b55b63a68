"""The README's table of methods is the registry's."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from kvhive.cli import app
from kvhive.cli.methods_table import methods_table
from kvhive.policies import POLICIES

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- methods:begin -->\n", "<!-- methods:end -->"


def test_the_readme_shows_the_registry() -> None:
    """`kvhive recipes --markdown` printed what stands there."""
    readme = (ROOT / "README.md").read_text()
    shown = readme[readme.index(BEGIN) + len(BEGIN) : readme.index(END)]
    assert shown == methods_table(), "run: kvhive recipes --markdown, and paste it into README.md"


def test_every_method_has_a_row_and_a_card() -> None:
    """Nothing is missing, and every link leads somewhere."""
    table = methods_table()
    for name in POLICIES:
        assert f"[`{name}`](docs/methods/{name}.md)" in table
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()


def test_the_command_prints_it() -> None:
    """The command line gives the same text."""
    result = CliRunner().invoke(app, ["recipes", "--markdown"])
    assert result.exit_code == 0
    assert result.stdout == methods_table()
