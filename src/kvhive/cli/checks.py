"""What `kvhive doctor` looks at: versions, extras, devices, folders, the terminal, and a model."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from kvhive import __version__
from kvhive.files import expanded

PACKAGE = "kvhive"
_DEVELOPING = "dev"  # an extra for work on kvhive itself
_GIB = 2**30
_MIB = 2**20


@dataclass(frozen=True)
class Check:
    """One line of the report. advice: what to do, where something could be better. broken: whether
    kvhive, or the model that was asked about, cannot work as it is.
    """

    name: str
    value: str
    advice: str = ""
    broken: bool = False


def versions() -> Iterator[Check]:
    """Python, kvhive and what it requires."""
    yield Check(
        "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    yield Check(PACKAGE, __version__)
    for requirement in _requirements(""):
        yield _version(requirement)


def extras() -> Iterator[Check]:
    """Every extra that adds something, and what of it is missing."""
    try:
        names = metadata(PACKAGE).get_all("Provides-Extra") or []
    except PackageNotFoundError:
        yield Check("extras", "unknown", "kvhive runs from its sources; see pyproject.toml")
        return
    for extra in sorted(set(names) - {_DEVELOPING}):
        missing = [one.name for one in _requirements(extra) if _installed(one.name) is None]
        if missing:
            advice = f"pip install 'kvhive[{extra}]'"
            yield Check(extra, f"missing: {', '.join(missing)}", advice)
        else:
            yield Check(extra, "installed")


def devices() -> Iterator[Check]:
    """What torch can compute on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        advice = "install torch again, as https://pytorch.org tells for this machine"
        yield Check("torch", f"cannot be imported: {error}", advice, broken=True)
        return
    build = torch.version.cuda or torch.version.hip
    yield Check("torch build", f"for GPUs ({build})" if build else "for the CPU alone")
    asked = os.environ.get("OMP_NUM_THREADS")
    told = f" (OMP_NUM_THREADS={asked})" if asked else ""
    yield Check("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads{told}")
    yield _c_kernels()
    for place in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(place)
        yield Check(f"cuda:{place}", f"{facts.name}, {facts.total_memory / _GIB:.1f} GiB")
    if torch.backends.mps.is_available():
        yield Check("mps", "Apple GPU")


def folders() -> Iterator[Check]:
    """The cache of unpacked models, the small model, evaluation data."""
    from kvhive.evaluation.data.catalogue import CATALOGUE
    from kvhive.model.smollm2 import cache_root, smollm2_place

    cache = cache_root()
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / _MIB
    if _writable(cache):
        yield Check("cache", f"{cache} ({size:,.0f} MiB)")
    else:
        advice = "set KVHIVE_CACHE to a folder that can be written"
        yield Check("cache", f"{cache} cannot be written", advice, broken=True)
    try:
        unpacked = smollm2_place().is_dir()
        yield Check("smollm2", "unpacked" if unpacked else "installed; unpacked on first use")
    except (ImportError, FileNotFoundError) as error:
        yield Check("smollm2", "not installed", str(error).rpartition(": ")[2])
    told = os.environ.get("KVHIVE_DATA")
    if not told or told in {"hub", "builtin"}:
        advice = "" if told else "set KVHIVE_DATA for kvhive evaluate, or give it --data"
        yield Check("data", f"KVHIVE_DATA={told}" if told else "KVHIVE_DATA is not set", advice)
        return
    folder = expanded(told)
    present = [one.name for one in CATALOGUE.values() if (folder / one.file).is_file()]
    sets = f"{len(present)} of {len(CATALOGUE)} sets: {', '.join(present) or 'none'}"
    advice = "" if present else "files lie as in docs/evaluation.md"
    yield Check("data", f"{folder}: {sets}", advice, broken=not folder.is_dir())


def terminal() -> Iterator[Check]:
    """Where tables are printed."""
    from kvhive.cli.console import out

    console = out()
    kind = "a terminal" if console.is_terminal else "not a terminal"
    colours = f"{console.color_system} colours" if console.color_system else "no colours"
    yield Check("stdout", f"{kind}, {console.width} columns, {colours}")
    encoding = sys.stdout.encoding or "unknown"
    utf8 = encoding.lower().replace("-", "") == "utf8"
    advice = "" if utf8 else "set PYTHONUTF8=1, so that every letter can be printed"
    yield Check("encoding", encoding, advice)


def model(name: str) -> Iterator[Check]:
    """Whether kvhive can serve a model, from its config alone."""
    from kvhive.cache.support import Support
    from kvhive.model.config import load_config
    from kvhive.model.loading import be_quiet

    be_quiet()
    try:
        support = Support.of(load_config(name))
    except (OSError, ValueError, ImportError) as error:
        yield Check("config", str(error), broken=True)
        return
    yield Check("family", support.family)
    if support.problem:
        yield Check("supported", f"no: {support.problem}", broken=True)
        return
    rest = f"; not tried without its weights: {support.untried}" if support.untried else ""
    yield Check("supported", f"yes{rest}")
    stock = support.layers - support.full_layers
    layers = f"{support.full_layers} of {support.layers} have full attention and are compressed"
    yield Check("layers", layers + (f"; {stock} stay as they are" if stock else ""))
    yield Check("heads", f"{support.heads} of queries, {support.kv_heads} of keys and values")
    length = support.trained_length
    yield Check("trained length", f"{length:,} tokens" if length else "not in its config")
    kept = f"original only: {support.positions}" if support.positions else "original, cache"
    yield Check("positions", kept)


SECTIONS: dict[str, Callable[[], Iterator[Check]]] = {
    "versions": versions,
    "extras": extras,
    "devices": devices,
    "folders": folders,
    "terminal": terminal,
}


def _c_kernels() -> Check:
    """Whether packed stores decode in C on a CPU."""
    from kvhive.kernels import native

    if native.loaded() is not None:
        return Check("c kernels", f"compiled; {native.lanes()} numbers at a time")
    if native.turned_off():
        return Check("c kernels", "turned off by KVHIVE_NATIVE=0")
    advice = (
        "packed stores decode several times faster with them; with a C compiler: "
        "python -m kvhive.kernels.native_build"
    )
    return Check("c kernels", "not compiled from these sources", advice)


def _requirements(extra: str) -> list[Requirement]:
    """What kvhive requires here, for an extra or ("") at all; its own extras left out."""
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        return []
    wanted = [Requirement(line) for line in lines]
    return [one for one in wanted if one.name != PACKAGE and _belongs(one, extra)]


def _belongs(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    core = marker is None or marker.evaluate({"extra": ""})
    if not extra:
        return core
    return not core and marker is not None and marker.evaluate({"extra": extra})


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _version(requirement: Requirement) -> Check:
    found = _installed(requirement.name)
    advice = f"pip install '{requirement}'"
    if found is None:
        return Check(requirement.name, "missing", advice, broken=True)
    if not requirement.specifier.contains(found, prereleases=True):
        value = f"{found}, but kvhive needs {requirement.specifier}"
        return Check(requirement.name, value, advice, broken=True)
    return Check(requirement.name, found)


def _writable(folder: Path) -> bool:
    """Whether a folder can be written, or made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
