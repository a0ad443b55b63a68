"""Code of a user's own: files or modules that register tasks, policies, stores or allocations."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from kvhive.files import expanded


def load_plugins(names: Iterable[str]) -> dict[str, str]:
    """Import each file (a name that ends in .py) or module once; the SHA-256 of each one's source.

    Raises `FileNotFoundError` or `ImportError` for one that is not there, `ValueError` for one that
    fails, with its own error and the line it is in.
    """
    return {Path(name).name: _digest(_load(name)) for name in names}


def _load(name: str) -> ModuleType:
    try:
        return _from_file(name) if name.endswith(".py") else importlib.import_module(name)
    except Exception as error:
        if isinstance(error, FileNotFoundError) and error.filename == name:
            raise FileNotFoundError(f"no plugin at {name!r}: there is no such file") from None
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise ImportError(
                f"no plugin {name!r}: expected a file NAME.py, or a module that can be imported"
            ) from None
        reason = f"{type(error).__name__}: {error}{_where(error)}"
        raise ValueError(f"plugin {name!r} cannot be loaded: {reason}") from error
    except SystemExit:
        raise ValueError(f"plugin {name!r} cannot be loaded: it ended the program") from None


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


def _where(error: Exception) -> str:
    """The last line that ran, unless the error (of syntax) names one itself."""
    trace = error.__traceback__
    if trace is None or isinstance(error, SyntaxError):
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})"


def _digest(module: ModuleType) -> str:
    source = Path(module.__file__ or "")
    return hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else "unknown"
