"""A policy of one's own, in a file anywhere: the walk-through of CONTRIBUTING.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvhive.policies import POLICIES
from tests.support import shown_policy


@pytest.fixture
def policy(tmp_path: Path) -> Iterator[Path]:
    """The file, which nothing knows before and after the test."""
    path = tmp_path / "value_norm.py"
    path.write_text(shown_policy(), encoding="utf-8")
    assert len(path.read_text(encoding="utf-8").splitlines()) < 45
    yield path
    POLICIES._classes.pop("value_norm", None)
    for name in [name for name in sys.modules if name.startswith("kvhive_plugin_")]:
        del sys.modules[name]


def test_it_is_compared(run, document, policy):
    recipes = ("value_norm@70", "value_norm(window=64)@100")
    words = [word for recipe in recipes for word in ("-r", recipe)]
    options = ("--plugin", policy, "--json", "--max-new-tokens", 3)
    result = run("compare", document, *words, *options)
    assert result.exit_code == 0, result.output
    for recipe in recipes:
        assert recipe in result.stdout
    assert json.loads(result.stdout)


@pytest.mark.parametrize("command", ["show", "generate"])
def test_it_is_shown_and_generates(run, document, policy, command):
    result = run(command, document, "-r", "value_norm@70", "--plugin", policy)
    assert result.exit_code == 0, result.output
    assert "value_norm@70" in result.output


def test_it_is_listed(plain, policy):
    result = plain("recipes", "value_norm", "--plugin", policy)
    assert result.exit_code == 0, result.output
    for words in ("Keep the longest values", "window", "newest tokens", "values"):
        assert words in result.stdout


def test_without_the_option_it_is_unknown(run, document, policy):
    result = run("show", document, "-r", "value_norm@70")
    assert result.exit_code == 2
    assert "unknown policy 'value_norm'" in result.stderr


def test_a_name_that_is_taken_is_told(plain, policy):
    """As when the file was moved into the package and is still given."""
    policy.write_text(shown_policy().replace('"value_norm"', '"h2o"'), encoding="utf-8")
    result = plain("recipes", "--plugin", policy)
    assert result.exit_code == 2
    assert "policy 'h2o' is registered twice" in result.stderr
