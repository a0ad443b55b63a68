"""Policies of a user's own, in files that every process of an engine loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import dedent

import pytest
from kvhive.plugins import load_plugins

import kvhive_vllm
from kvhive_vllm.recipes import configured
from tests.models import Tiny, prompts
from tests.test_cli import run
from tests.test_processes import in_a_process

PAGE = Path(__file__).parents[3] / "CONTRIBUTING.md"
RECIPE = "value_norm@80"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the page shows."""
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    (source,) = (dedent(block) for block in blocks if "class ValueNorm" in block)
    path = tmp_path_factory.mktemp("plugins") / "value_norm.py"
    path.write_text(source, encoding="utf-8")
    return path


def test_tokens_are_those_of_a_hive_cache(tiny: Tiny, plugin: Path) -> None:
    texts, new = prompts(150, 97), 40
    given = in_a_process(tiny, RECIPE, texts, new, plugins=[str(plugin)])
    load_plugins([str(plugin)])
    assert given == [tiny.expected(RECIPE, text, new) for text in texts]


def test_options_name_the_file_by_its_whole_path(
    plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plugin.parent)
    code, text = run("options", RECIPE, "--plugin", "value_norm.py", "--json")
    assert code == 0
    config = json.loads(text)["additional_config"]
    assert config == {"kvhive": {"recipe": RECIPE, "plugins": [str(plugin.resolve())]}}
    assert json.loads(text) == kvhive_vllm.engine_args(RECIPE, ["value_norm.py"])
    assert str(configured(config)) == RECIPE


def test_a_file_that_is_not_there_ends_the_command() -> None:
    code, text = run("options", "h2o@80", "--plugin", "nowhere.py")
    assert code == 2
    assert "no plugin at 'nowhere.py'" in text


@pytest.mark.parametrize("plugins", ["one.py", [3]])
def test_plugins_are_a_list_of_names(plugins: object) -> None:
    with pytest.raises(ValueError, match="plugins of additional_config"):
        configured({"kvhive": {"recipe": "h2o@80", "plugins": plugins}})
