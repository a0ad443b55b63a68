"""Runs of the command line on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvhive.cli import app
from tests.cli.tiny import save, text

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A text of about 500 tokens."""
    path = tmp_path / "lock <keeper>.md"
    path.write_text(text(110), encoding="utf-8")
    return path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("compare", path, ...)` with the tiny model in float32, on a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")

    def call(*words: str | Path, model: str | Path = folder, stdin: bytes | None = None) -> Result:
        options = ["--model", str(model), "--dtype", "float32"]
        command, *rest = map(str, words)
        return CliRunner().invoke(app, [command, *options, *rest], input=stdin)

    return call


@pytest.fixture
def plain() -> Run:
    """`plain("recipes")`: the command as it is."""
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])
