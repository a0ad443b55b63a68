"""Files on disk: paths as people type them, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STDOUT = ("-", "/dev/stdout")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HEAD = 4096  # bytes at the front of a file in which its maker's mark is looked for


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with `~` replaced. Raises `ValueError` for the home of a user who does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise ValueError(
            f"cannot read the path {str(path)!r}: this computer has no home folder for {user}; "
            "write it in full"
        ) from None


def write_whole(path: Path, data: bytes) -> None:
    """Make `data` the file at `path`: the old file or the whole new one is there at every moment.

    Owner and mode of a file that was there are kept. Raises `OSError` that names the file and, when
    the disk is full, says so; nothing of the attempt is left.
    """
    part = _new_name_beside(path)
    try:
        with open(_opened(part), "wb") as file:
            if path.exists():
                _take_owner_and_mode(file.fileno(), path.stat())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise _unwritten(error, path) from error
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Output:
    """A file that a command writes when its work is done; checked before the work.

    path: where it goes, links followed; None: to stdout. name: as it was asked for.
    """

    path: Path | None
    name: str

    @classmethod
    def prepare(
        cls,
        wanted: str | os.PathLike[str],
        mark: str,
        inputs: Iterable[Path] = (),
        force: bool = False,
    ) -> Output:
        """For a file that may be made anew, or replace one which holds `mark` near its front, or
        any file with force. inputs: what the command reads, and what else it writes.

        Raises `OSError` or `ValueError` for a folder, a device, a write-protected file, a folder
        where nothing can be written, a file of `inputs`, and a file that kvhive did not make.
        """
        name = os.fspath(wanted)
        if name in STDOUT:
            return cls(None, name)
        if _is_system_place(expanded(name)):
            raise _no_ordinary_file(name)
        path = _followed(expanded(name), name)
        _check_replaceable(path, name)
        for read in inputs:
            if path.exists() and read.exists() and path.samefile(read):
                raise ValueError(
                    f"cannot write {name!r}: the command reads it; choose another name"
                )
        if not force and path.exists() and not _made_here(path, mark):
            raise FileExistsError(
                f"cannot write {name!r}: there is a file that kvhive did not make; choose another "
                "name, or replace it with --force"
            )
        return cls(path, name)

    def write(self, text: str) -> None:
        """Write it, whole or not at all. Raises `OSError` that names the file."""
        data = text.encode("utf-8", errors="backslashreplace")
        if self.path is None:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            write_whole(self.path, data)


def check_distinct(outputs: Sequence[Output]) -> None:
    """Raises `ValueError` when two outputs of one command are the same file."""
    for place, output in enumerate(outputs):
        if any(output.path == earlier.path for earlier in outputs[:place]):
            raise ValueError(f"cannot write {output.name!r} twice: give every output a file")


def _followed(path: Path, name: str) -> Path:
    """Where a link leads in the end, whether or not there is something."""
    try:
        return path.resolve()
    except RuntimeError:
        raise OSError(f"cannot write {name!r}: the link leads in a circle") from None
    except OSError as error:
        raise _unwritten(error, Path(name)) from None


def _is_system_place(path: Path) -> bool:
    """Whether it lies where devices and open descriptors have their names."""
    parts = path.absolute().parts[1:3]
    return parts[:1] in (("dev",), ("proc",), ("sys",)) and parts != ("dev", "shm")


def _no_ordinary_file(name: str) -> OSError:
    return OSError(f"cannot write {name!r}: it is no ordinary file; name one, or - for stdout")


def _check_replaceable(path: Path, name: str) -> None:
    """Raises `OSError` unless `path` is free or a file that may be written."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:  # a name that is too long, a part that is no folder, ...
        raise _unwritten(error, Path(name)) from None
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(f"cannot write {name!r}: it is a folder; name a file in it")
    if mode is not None and not stat.S_ISREG(mode):
        raise _no_ordinary_file(name)
    if mode is not None and not (mode & 0o222 and os.access(path, os.W_OK)):
        raise PermissionError(f"cannot write {name!r}: the file is write-protected")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {name!r}: there is no folder {str(path.parent)!r}; make it first"
        )
    probe = _new_name_beside(path)
    try:
        os.close(_opened(probe))
        probe.unlink()
    except OSError as error:
        raise _unwritten(error, Path(name)) from None


def _new_name_beside(path: Path) -> Path:
    return path.with_name(f".kvhive-{secrets.token_hex(8)}.part")


def _opened(new: Path) -> int:
    """A descriptor to write a new file with, of the mode that new files have here."""
    return os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _take_owner_and_mode(descriptor: int, old: os.stat_result) -> None:
    with suppress(PermissionError):  # only root may give files away
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _made_here(path: Path, mark: str) -> bool:
    """Whether a file has the mark near its front, or nothing that could be lost."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return not head or mark.encode() in head


def _unwritten(error: OSError, path: Path) -> OSError:
    """The error with the file's name, and what to do when the disk is full."""
    reason = (error.strerror or str(error)).lower()
    if error.errno in _NO_ROOM:
        reason = (
            "the disk is full, or no larger file is allowed there; nothing is lost: make room and "
            "run the same command again"
        )
    return type(error)(f"cannot write {str(path)!r}: {reason}")
