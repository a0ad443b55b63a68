"""A method is found because its file lies in the folder: no list names it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhive
from kvhive import allocations, policies, stores
from kvhive.allocations import ALLOCATIONS
from kvhive.evaluation import tasks
from kvhive.policies import POLICIES, Policy, knob
from kvhive.registry import Registry, import_all, modules_in
from kvhive.stores import STORES
from tests.support import shown_policy

FOUND = """\
from kvhive.registry import Registry, import_all

THINGS = Registry("thing")
import_all(__name__, __path__)
"""
MEMBER = "from {package} import THINGS\n\n@THINGS.register({name!r})\nclass Thing:\n    pass\n"


def in_folder(root: Path, files: dict[str, str]) -> Path:
    """Files in a plain folder."""
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def in_zip(root: Path, files: dict[str, str]) -> Path:
    """Files in a zip file, as a package may be imported from."""
    with zipfile.ZipFile(root / "package.zip", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return root / "package.zip"


@pytest.fixture(params=[in_folder, in_zip])
def package(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """An imported package with three members, a shared part, and one that is private."""
    name = f"things_in_{request.param.__name__}"
    members = {part: MEMBER.format(package=name, name=part) for part in ("zebra", "ant", "mole")}
    files = {"__init__": FOUND, "base": "", "_parts": "raise AssertionError", **members}
    place: Callable[[Path, dict[str, str]], Path] = request.param
    root = place(tmp_path, {f"{name}/{part}.py": text for part, text in files.items()})
    monkeypatch.syspath_prepend(root)
    yield importlib.import_module(name)
    for known in [known for known in sys.modules if known.partition(".")[0] == name]:
        del sys.modules[known]


def test_public_modules_register_in_order_of_name(package: Any) -> None:
    assert list(package.THINGS) == ["ant", "mole", "zebra"]
    assert modules_in(package.__path__) == ["ant", "base", "mole", "zebra"]


def test_a_forgotten_dataclass_is_told() -> None:
    """Its fields would silently be no knobs."""

    class Mine(Policy):
        recent: int = knob(3, "tokens")

    with pytest.raises(TypeError, match=r"policy 'mine' is no dataclass: write @dataclass\(frozen"):
        POLICIES.register("mine")(Mine)
    assert "mine" not in POLICIES


def test_a_module_that_fails_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_folder(tmp_path, {"broken_things/__init__.py": "", "broken_things/one.py": "1 / 0"})
    monkeypatch.syspath_prepend(tmp_path)
    broken = importlib.import_module("broken_things")
    with pytest.raises(ZeroDivisionError):
        import_all("broken_things", broken.__path__)


@pytest.mark.parametrize(
    ("registry", "package"),
    [(POLICIES, policies), (ALLOCATIONS, allocations), (STORES, stores)],
    ids=["policies", "allocations", "stores"],
)
def test_a_file_has_the_name_of_its_method(registry: Registry[Any], package: Any) -> None:
    """So the names are known without importing anything, as shell completion needs them."""
    assert list(registry) == [name for name in modules_in(package.__path__) if name != "base"]


def test_tasks_are_found_too() -> None:
    homes = {task.__module__.rpartition(".")[2] for task in tasks.TASKS.values()}
    assert homes == set(modules_in(tasks.__path__)) - {"base", "context"}


def test_a_new_file_is_all_a_new_policy_takes(tmp_path: Path) -> None:
    """That of CONTRIBUTING, in a copy of the package, a zip file from which the command runs."""
    home = Path(kvhive.__file__).parent
    sources = {
        path.relative_to(home.parent).as_posix(): path.read_text(encoding="utf-8")
        for path in home.rglob("*.py")
    }
    archive = in_zip(tmp_path, {**sources, "kvhive/policies/value_norm.py": shown_policy()})
    script = (
        "import kvhive, sys; from kvhive.cli import main; "
        f"assert kvhive.__file__.startswith({str(archive)!r}); "
        "sys.argv = ['kvhive', 'recipes', 'value_norm']; main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(archive)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "Keep the longest values" in run.stdout
