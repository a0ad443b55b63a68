"""Numbers that the scheduler counts and the server shows, although they are two processes.

vLLM hands statistics over in a fixed form that knows none of ours. So they lie in a small file that
both map into memory, named after the engine.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import weakref
from pathlib import Path

from vllm.config import VllmConfig

FORM = struct.Struct("4q")


class Counters:
    """The scheduler's end. A file of the same name that was left over is replaced.

    close: nobody counts any more, and the file goes if nobody has taken it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.truncate(file, FORM.size)
            self._map = mmap.mmap(file, FORM.size)
        finally:
            os.close(file)
        self.close = weakref.finalize(self, path.unlink, missing_ok=True)  # or when python ends

    @classmethod
    def of(cls, config: VllmConfig) -> Counters:
        """Of an engine."""
        return cls(place(config, config.parallel_config.data_parallel_index))

    def write(self, dropped: int, freed: int, blocks: int, requests: int) -> None:
        """Tokens dropped and blocks freed since the start; blocks held now, by so many requests."""
        FORM.pack_into(self._map, 0, dropped, freed, blocks, requests)


def place(config: VllmConfig, engine: int) -> Path:
    """Where an engine of a data-parallel group counts."""
    return Path(tempfile.gettempdir()) / f"kvhive-vllm-{config.instance_id}-{engine}"


class Reader:
    """The server's end. Once it has the file mapped it removes the name, so that nothing is left
    over even where the engine is killed, and of several servers of one engine only one counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: mmap.mmap | None = None

    def read(self) -> tuple[int, int, int, int] | None:
        """What `write` wrote last; None: no engine counts there, it is on another machine, or
        somebody else reads.
        """
        if self._map is None:
            self._map = _taken(self._path)
        return None if self._map is None else FORM.unpack_from(self._map)


def _taken(path: Path) -> mmap.mmap | None:
    """A file, mapped, without its name."""
    mine = path.with_name(f"{path.name}-{os.getpid()}")
    try:
        path.rename(mine)  # one of several readers succeeds
    except OSError:
        return None
    try:
        with mine.open("rb") as file:
            return mmap.mmap(file.fileno(), FORM.size, access=mmap.ACCESS_READ)
    finally:
        mine.unlink()
