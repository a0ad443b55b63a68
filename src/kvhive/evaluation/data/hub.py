"""Public data sets through the `datasets` package: from the Hugging Face hub, and from GitHub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvhive.evaluation.data.catalogue import DataSet, Record, find
from kvhive.evaluation.data.public import Hub
from kvhive.evaluation.schema import check


class HubSource:
    """Records by name. mirror: a folder with copies, `mirror/owner/name` of what is on the hub and
    `mirror/host/path` of other files, read instead.
    """

    def __init__(self, mirror: Path | None = None) -> None:
        self._mirror = mirror
        self._read: dict[str, list[Record]] = {}

    def records(self, name: str) -> list[Record]:
        """See `Source`."""
        if name not in self._read:
            self._read[name] = self._load(find(name))
        return self._read[name]

    def identity(self, name: str) -> str:
        """The data set, its commit where there is one, and the SHA-256 sum of the records."""
        text = json.dumps(self.records(name), sort_keys=True)
        return f"hub:{find(name).hub.address} sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def notes(self, name: str) -> list[str]:
        """That these are not the items of the published figures."""
        return [
            "data from the hub are other items than those of the published figures: of the same "
            "kind, so rankings compare and single scores do not"
        ]

    def _load(self, data: DataSet) -> list[Record]:
        address = data.hub.address
        try:
            records = list(data.hub.convert(self._rows(data.hub)))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{address} has other columns than expected for {data.name!r} "
                f"({type(error).__name__}: {error}); give the data as a folder (--data FOLDER)"
            ) from error
        for number, record in enumerate(records):
            check(record, data.record, f"{address}, record {number}")
        if not records:
            raise ValueError(f"{address} gave no usable rows for {data.name!r}")
        return records

    def _rows(self, hub: Hub) -> Iterable[Record]:
        try:
            import datasets
        except ImportError:
            raise ImportError(
                "data from the hub needs the package datasets: pip install 'kvhive[eval]'"
            ) from None
        try:
            found: Any = datasets.load_dataset(**_request(hub, self._mirror))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OSError(
                f"cannot load {hub.address}: {reason}; check the network, give the data as a "
                "folder (--data FOLDER), or run tasks that need none (-t generated)"
            ) from error
        rows: Iterable[Record] = found.select(range(min(hub.rows or len(found), len(found))))
        return rows


def _request(hub: Hub, mirror: Path | None) -> dict[str, Any]:
    """What `load_dataset` is called with."""
    path, files, revision = hub.path, hub.files, hub.revision
    if mirror is not None and path == "json":
        files = str(mirror / str(files).partition("://")[2])
    elif mirror is not None:
        path, revision = str(mirror / path), None
    request: dict[str, Any] = {"path": path, "name": hub.config, "split": hub.split}
    if files is not None:
        request["data_files"] = {hub.split: files}
    return {**request, "revision": revision} if revision else request
