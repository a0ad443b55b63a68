"""Where records come from: a folder, the Hugging Face hub, or text made up on the spot."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from kvhive.evaluation.data import made_up
from kvhive.evaluation.data.catalogue import DataSet, Record, find
from kvhive.evaluation.schema import check
from kvhive.files import expanded

VARIABLE = "KVHIVE_DATA"
_HELP = (
    "give --data FOLDER or set KVHIVE_DATA (files as in docs/evaluation.md), --data hub to "
    "download with the `datasets` package, or --data builtin for a little made-up text; "
    "--task generated needs none"
)


@runtime_checkable
class Source(Protocol):
    """Records of a data set by name, and what identifies them."""

    def records(self, name: str) -> list[Record]:
        """All records, checked. Raises `ValueError` or `OSError` that says what to do."""

    def identity(self, name: str) -> str:
        """What a run records of them: a checksum, or a revision."""

    def notes(self, name: str) -> list[str]:
        """What a reader of the results should know."""


def open_source(where: str | None) -> Source:
    """The source that `--data` or `KVHIVE_DATA` names: a folder, "hub" or "builtin"; one that holds
    nothing when neither is given.

    Raises `FileNotFoundError` when there is no such folder.
    """
    place = named(where)
    if place is None:
        return Nothing()
    if place == "builtin":
        return Builtin()
    if place == "hub":
        from kvhive.evaluation.data.hub import HubSource

        return HubSource()
    folder = expanded(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no data folder {place!r}: {_HELP}")
    return Folder(folder)


def named(where: str | None) -> str | None:
    """What `--data` says, or else `KVHIVE_DATA`."""
    return where or os.environ.get(VARIABLE) or None


class Nothing:
    """No data: for tasks that generate what they ask."""

    def records(self, name: str) -> list[Record]:
        """Raises `ValueError` that says how to give data."""
        raise ValueError(f"no data was given for {find(name).name!r}: {_HELP}")

    def identity(self, name: str) -> str:
        """Raises `ValueError`, as `records`."""
        self.records(name)
        return ""

    def notes(self, name: str) -> list[str]:
        """Nothing."""
        return []


class Folder:
    """Gzipped JSON lines below a folder, checked by checksum and schema."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[str, tuple[str, list[Record]]] = {}

    def records(self, name: str) -> list[Record]:
        """See `Source`."""
        return self._load(find(name))[1]

    def identity(self, name: str) -> str:
        """The SHA-256 sum of the file."""
        return f"sha256:{self._load(find(name))[0]}"

    def notes(self, name: str) -> list[str]:
        """A note where the file is another one than was published."""
        data = find(name)
        if self._load(data)[0] in data.sums:
            return []
        return [
            f"{data.file} is not the published file: results compare only with runs on this one"
        ]

    def _load(self, data: DataSet) -> tuple[str, list[Record]]:
        if data.name not in self._read:
            path = self.root / data.file
            if not path.is_file():
                raise FileNotFoundError(
                    f"data set {data.name!r} ({data.about}) is missing: there is no "
                    f"{str(path)!r}; {_HELP}"
                )
            packed = path.read_bytes()
            self._read[data.name] = hashlib.sha256(packed).hexdigest(), _parse(packed, data, path)
        return self._read[data.name]


def _parse(packed: bytes, data: DataSet, path: Path) -> list[Record]:
    try:
        text = gzip.decompress(packed).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from None
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg})") from None
        check(record, data.record, where)
        records.append(record)
    if not records:
        raise ValueError(f"{path} is empty: it holds no records")
    return records


class Builtin:
    """A little made-up text in the shape of every data set, for trials and tests."""

    seed: ClassVar[int] = 2718

    def records(self, name: str) -> list[Record]:
        """See `Source`."""
        return made_up.records(find(name).name, self.seed)

    def identity(self, name: str) -> str:
        """The generator's version."""
        find(name)
        return f"builtin:{made_up.VERSION}"

    def notes(self, name: str) -> list[str]:
        """That figures on it mean little."""
        return [
            "the text is made up (--data builtin): figures compare recipes with one another only"
        ]
