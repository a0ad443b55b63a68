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
    path = tmp_path / "my_values.py"
    source = shown_policy()
    assert len(source.splitlines()) < 45
    path.write_text(source.replace('"value_norm"', '"my_values"'), encoding="utf-8")
    yield path
    _forget("my_values")


def _forget(policy: str) -> None:
    POLICIES._classes.pop(policy, None)
    for name in [name for name in sys.modules if name.startswith("kvhive_plugin_")]:
        del sys.modules[name]


def test_it_is_compared(run, document, policy):
    recipes = ("my_values@70", "my_values(window=64)@100")
    words = [word for recipe in recipes for word in ("-r", recipe)]
    options = ("--plugin", policy, "--json", "--max-new-tokens", 3)
    result = run("compare", document, *words, *options)
    assert result.exit_code == 0, result.output
    for recipe in recipes:
        assert recipe in result.stdout
    assert json.loads(result.stdout)


@pytest.mark.parametrize("command", ["show", "generate"])
def test_it_is_shown_and_generates(run, document, policy, command):
    result = run(command, document, "-r", "my_values@70", "--plugin", policy)
    assert result.exit_code == 0, result.output
    assert "my_values@70" in result.output


def test_it_is_listed(plain, policy):
    result = plain("recipes", "my_values", "--plugin", policy)
    assert result.exit_code == 0, result.output
    for words in ("Keep the longest values", "window", "newest tokens", "values"):
        assert words in result.stdout


def test_without_the_option_it_is_unknown(run, document, policy):
    result = run("show", document, "-r", "my_values@70")
    assert result.exit_code == 2
    assert "unknown policy 'my_values'" in result.stderr


def test_a_name_that_is_taken_is_told(plain, policy):
    """As when the file was moved into the package and is still given."""
    policy.write_text(shown_policy().replace('"value_norm"', '"h2o"'), encoding="utf-8")
    result = plain("recipes", "--plugin", policy)
    assert result.exit_code == 2
    assert "policy 'h2o' is registered twice" in result.stderr


UNFINISHED = """
from dataclasses import dataclass
from kvhive.policies import POLICIES, Policy
@POLICIES.register("unfinished_{name}")
@dataclass(frozen=True)
class Unfinished(Policy):
    "Nothing yet."
{body}
"""


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("empty", "", "says nothing of what stays"),
        (
            "shape",
            "    def score(self, slots, held):\n        return slots.valid[..., :1].float()\n",
            "score must be [b, K, n]",
        ),
        (
            "choice",
            "    def select(self, slots, budget, score):\n        return slots.valid[..., :1]\n",
            "what stays must be [b, K, n]",
        ),
    ],
)
def test_a_policy_that_is_not_finished_is_told_what_is_missing(
    run, document, tmp_path, name, body, words
):
    path = tmp_path / f"{name}.py"
    path.write_text(UNFINISHED.format(name=name, body=body))
    result = run("show", document, "-r", f"unfinished_{name}@70", "--plugin", path)
    _forget(f"unfinished_{name}")
    assert result.exit_code == 2
    assert words in result.stderr
