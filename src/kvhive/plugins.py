"""Code of a user's own: files or modules that register tasks, policies, stores or allocations."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from kvhive.files import expanded

_REFUSALS = (ValueError, OSError, ImportError, MemoryError)
_FILES: dict[str, str] = {}  # the source of each plugin that was loaded -> its name
_OURS = str(Path(__file__).parent)


def load_plugins(names: Iterable[str]) -> dict[str, str]:
    """Import each file (a name that ends in .py) or module once; the SHA-256 of each one's source.

    Raises `FileNotFoundError` or `ImportError` for one that is not there, `ValueError` for one that
    fails, with its own error and the line it is in.
    """
    return {Path(name).name: _digest(_load(name)) for name in names}


def anywhere(names: Sequence[str]) -> tuple[str, ...]:
    """The same plugins, files with absolute paths: for processes that work in other folders."""
    files = {name: expanded(name) for name in names if name.endswith(".py")}
    return tuple(
        str(files[name].resolve()) if name in files and files[name].exists() else name
        for name in names
    )


@contextmanager
def told_as_plugins(owner: type | None = None) -> Iterator[None]:
    """An error within becomes a `ValueError` that names the plugin, its file and line, if it is a
    plugin's own: raised by its code, or by what its code called other than a refusal of kvhive.

    owner: a class; if a plugin defines it, unexpected errors are the plugin's wherever they arise.
    """
    try:
        yield
    except Exception as error:
        told = _told(error, owner)
        if told is None:
            raise
        raise told from error


def _told(error: Exception, owner: type | None) -> ValueError | None:
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename in _FILES]
    file = getattr(sys.modules.get(owner.__module__), "__file__", None) if owner else None
    if _is_refusal(error, frames[-1]) or not (theirs or file in _FILES):
        return None
    name, line = (theirs[-1].filename, f", line {theirs[-1].lineno}") if theirs else (file, "")
    return ValueError(
        f"plugin {_FILES[str(name)]!r} failed: {type(error).__name__}: {error} ({name}{line})"
    )


def _is_refusal(error: Exception, last: traceback.FrameSummary) -> bool:
    """Whether kvhive, or the check of a plugin's own knobs, says what a user can do about it."""
    if "out of memory" in str(error):
        return True
    checked = last.filename.startswith(_OURS) or last.name == "__post_init__"
    return isinstance(error, _REFUSALS) and checked


def _load(name: str) -> ModuleType:
    try:
        module = _from_file(name) if name.endswith(".py") else importlib.import_module(name)
    except Exception as error:
        if isinstance(error, FileNotFoundError) and error.filename == name:
            raise FileNotFoundError(f"no plugin at {name!r}: there is no such file") from None
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise ImportError(
                f"no plugin {name!r}: expected a file NAME.py, or a module that can be imported"
            ) from None
        reason = f"{type(error).__name__}: {error}{_where(error, name)}"
        raise ValueError(f"plugin {name!r} cannot be loaded: {reason}") from error
    except SystemExit:
        raise ValueError(f"plugin {name!r} cannot be loaded: it ended the program") from None
    _FILES[str(module.__file__)] = name
    return module


def _from_file(name: str) -> ModuleType:
    path = expanded(name).resolve()
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", name)
    known = f"kvhive_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if known not in sys.modules:
        spec = spec_from_file_location(known, path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[known] = module  # dataclasses look their own module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[known]
            raise
    return sys.modules[known]


def _where(error: Exception, name: str) -> str:
    """The plugin's last line that ran, or any, unless the error (of syntax) names one itself."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return ""
    path = str(expanded(name).resolve())
    frame = ([one for one in frames if one.filename == path] or frames)[-1]
    return f" ({frame.filename}, line {frame.lineno})"


def _digest(module: ModuleType) -> str:
    source = Path(module.__file__ or "")
    return hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else "unknown"
