"""A run's folder: what was run (`run.json`) and every result as a line of `rows.jsonl`.

A unit's rows are written together, at once, and only whole units count: a run that was killed, or
whose disk filled up, goes on where it stopped. When all is done the rows are put into the order of
the plan, so that two runs with the same seed give the same file whatever finished first.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from kvhive.evaluation.engine import TRANSFORMERS
from kvhive.evaluation.row import ROW_SHAPE, RUN_SHAPE
from kvhive.evaluation.schema import check
from kvhive.files import write_whole

Row = dict[str, Any]
RUN, ROWS, LOCK = "run.json", "rows.jsonl", "lock"
PACKED = f"{ROWS}.gz"  # rows of a run that was published
_RESTORE = "restore it, or choose another folder"
_DELETE = "delete that line, and kvhive evaluate computes it anew"
_SAME = ("model_sha256", "data", "plugin_sha256")  # facts that identify a run: checksums


class ResultsFolder:
    """The folder of one run, locked against other runs while it is open (as in `with`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: IO[str] | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ResultsFolder:
        """Raises `ValueError` when another run writes here, `OSError` when the folder cannot be
        used.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (RUN, ROWS, LOCK):
                check_regular(self.folder / name)
            self._lock = (self.folder / LOCK).open("a")
        except OSError as error:
            raise OSError(
                f"cannot write to the folder {str(self.folder)!r}: {str(error.strerror).lower()}; "
                "choose another"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(
                f"another run is writing to {str(self.folder)!r}; wait, or choose another folder"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.close()

    def begin(self, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Row]:
        """Start the run, or go on with it; the rows that are there already.

        Raises `ValueError` when the folder holds another run, naming what differs.
        """
        path = self.folder / RUN
        now = {"settings": dict(identity), "facts": dict(facts)}
        if path.exists():
            _check_same(read_run(self.folder), now, self.folder)
        elif (self.folder / ROWS).exists():
            raise ValueError(f"{str(self.folder)!r} has rows but no {RUN}; choose another folder")
        else:
            write_whole(path, json.dumps(now, indent=2, ensure_ascii=False).encode() + b"\n")
        return read_rows(self.folder) if (self.folder / ROWS).exists() else []

    def keep_only(self, rows: Sequence[Row]) -> None:
        """Make these the rows of the run."""
        if self._file is not None:
            self._file.close()
            self._file = None
        write_whole(self.folder / ROWS, b"".join(map(_line, rows)))

    def append(self, rows: Sequence[Row]) -> None:
        """Add a unit's rows, all or none.

        Raises `OSError` that says what to do when the disk is full; the rows before are untouched.
        """
        if self._file is None:
            self._file = (self.folder / ROWS).open("ab", buffering=0)
        before = self._file.seek(0, os.SEEK_END)
        try:
            _write(self._file, b"".join(map(_line, rows)))
        except OSError as error:
            self._file.truncate(before)
            raise _full(error, self.folder) from error

    def finish(self, order: Callable[[Row], Any]) -> None:
        """Put the rows in order."""
        rows = read_rows(self.folder)
        self.keep_only(sorted(rows, key=order))


def read_run(folder: Path) -> dict[str, Any]:
    """`run.json`, checked. Raises `FileNotFoundError` or `ValueError` for what is no run."""
    path = folder / RUN
    check_regular(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not the folder of a run: it has no {RUN}")
    try:
        run: dict[str, Any] = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged, it is not JSON ({error}); {_RESTORE}"
        ) from None
    check(run, RUN_SHAPE, f"{str(path)!r} is damaged", _RESTORE)
    run["settings"].setdefault("engine", TRANSFORMERS)  # of runs from before there were others
    return run


def read_rows(folder: Path) -> list[Row]:
    """The rows of `rows.jsonl`; see `numbered_rows`."""
    return [row for _, row in numbered_rows(folder)]


def numbered_rows(folder: Path) -> Iterator[tuple[int, Row]]:
    """All whole lines of `rows.jsonl`, checked, with their numbers from 1; a last line that was cut
    off by a crash is left out.

    A run that was published may hold them as `rows.jsonl.gz`. Raises `ValueError` that names the
    line and the field for damage anywhere else, and for a result that is there twice.
    """
    path, packed = rows_file(folder)
    lines = packed.split(b"\n")
    seen: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{str(path)!r} is damaged in line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                return
            raise ValueError(f"{where}: expected a result as a JSON object; {_DELETE}") from None
        check(row, ROW_SHAPE, where, _DELETE)
        key = tuple(row[name] for name in ("task", "mode", "item", "recipe"))
        if key in seen:
            raise ValueError(f"{where}: the same result as in line {seen[key]}; {_DELETE}")
        seen[key] = number
        yield number, row


def rows_file(folder: Path) -> tuple[Path, bytes]:
    """The file that holds a run's rows, and what it holds, unpacked."""
    path, packed = folder / ROWS, folder / PACKED
    for one in (path, packed):
        check_regular(one)
    if path.exists() or not packed.exists():
        return path, path.read_bytes() if path.exists() else b""
    try:
        return packed, gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(packed)!r} is damaged: {error}") from None


def check_regular(path: Path) -> None:
    """Raises `ValueError` where a folder, a pipe or a device lies in a file's place."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is no file but a folder, pipe or device; move it away")


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _write(file: IO[bytes], data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


def _full(error: OSError, folder: Path) -> OSError:
    """The error, or what to do about it if there is no room."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return OSError(
        f"the disk with {str(folder)!r} is full, or no larger file is allowed there; nothing is "
        "lost: make room and run the same command again"
    )


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Versions and threads may change between the parts of a run; what is measured may not."""
    before, after = dict(old["settings"]), dict(new["settings"])
    for name in _SAME:
        before[name], after[name] = old["facts"].get(name) or {}, new["facts"].get(name) or {}
    for name in after:
        if before.get(name) != after[name]:
            what = f"{name} {before.get(name)!r}, not {after[name]!r}"
            what = f"another {name}" if name in _SAME else what
            raise ValueError(
                f"{str(folder)!r} holds a run with {what}; choose another folder, or give the same "
                "settings to go on with it"
            )
