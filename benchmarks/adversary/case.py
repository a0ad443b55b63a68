"""One hostile call, and what became of it."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

LIMIT = 60  # seconds until a case counts as hanging
REFUSALS = (ValueError, TypeError, OSError, ImportError, MemoryError)


@dataclass(frozen=True)
class Case:
    """What is called, in a process of its own.

    call: gets the exit code of a command, or raises what a user of the library would see. stdin:
    bytes; None: closed. guarded: files that must be the same afterwards. before: done first;
    such a case must not run beside others.
    """

    name: str
    call: Callable[[], int]
    stdin: bytes | None = b""
    guarded: tuple[Path, ...] = ()
    before: Callable[[], object] | None = None


@dataclass
class Outcome:
    """verdict: "fine", "refused", or one of the faults."""

    name: str
    verdict: str
    seconds: float
    text: str = field(default="", repr=False)


FAULTS = ("traceback", "a bug", "hang", "lost file", "died", "several lines")


def run(case: Case) -> Outcome:
    """The case in a child of this process, which has everything loaded."""
    if case.before is not None:
        case.before()
    sums = [_sum(path) for path in case.guarded]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as told:
        code = _in_child(case, told.fileno())
        told.seek(0)
        text = told.read().decode(errors="replace")
    seconds = time.perf_counter() - start
    lost = sums != [_sum(path) for path in case.guarded]
    return Outcome(case.name, "lost file" if lost else _verdict(code, text), seconds, text)


def _sum(path: Path) -> str:
    if not path.is_file():
        return f"{path.lstat().st_mode:o}" if path.is_symlink() or path.exists() else "missing"
    return f"{path.is_symlink()}{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _in_child(case: Case, told: int) -> int | None:
    """The exit code; minus the signal that ended it; None: it had to be killed."""
    child = os.fork()
    if not child:
        _be_the_child(case, told)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _be_the_child(case: Case, told: int) -> None:
    code = 70
    try:
        os.dup2(told, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb"), encoding="utf-8", write_through=True)
        if case.stdin is None:
            sys.stdin = None  # type: ignore[assignment]
        else:
            sys.stdin = io.TextIOWrapper(io.BytesIO(case.stdin), encoding="utf-8")
        code = case.call()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except REFUSALS as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _verdict(code: int | None, text: str) -> str:
    if code is None:
        return "hang"
    if "Traceback (most recent" in text:
        return "traceback"
    if "(a bug" in text:
        return "a bug"
    if code < 0 or code == 70:
        return "died"
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    if code and len(errors) > 1:
        return "several lines"
    return "refused" if code else "fine"
