"""Data sets of the Hugging Face hub, through the `datasets` package, at fixed commits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvhive.evaluation.data.catalogue import CATALOGUE, DataSet, Hub, Record, find
from kvhive.evaluation.data.schema import check

MOST_ROWS = 2000  # of a split: evaluation takes the first few hundred


class HubSource:
    """Records by name. mirror: a folder with a copy of each data set, `mirror/owner/name`, read
    instead of the hub.
    """

    def __init__(self, mirror: Path | None = None) -> None:
        self._mirror = mirror
        self._read: dict[str, list[Record]] = {}

    def records(self, name: str) -> list[Record]:
        """See `Source`."""
        if name not in self._read:
            data = find(name)
            self._read[name] = self._load(data, _hub(data))
        return self._read[name]

    def identity(self, name: str) -> str:
        """The data set and its commit."""
        hub = _hub(find(name))
        return f"hub:{hub.path}@{hub.revision}"

    def notes(self, name: str) -> list[str]:
        """Nothing."""
        return []

    def _load(self, data: DataSet, hub: Hub) -> list[Record]:
        rows = _joined(self._rows(hub)) if hub.join else self._rows(hub)
        records: list[Record] = []
        for number, row in enumerate(rows):
            for record in hub.convert(number, row):
                check(record, data.fields, f"{hub.path}, row {number}")
                records.append(record)
        if not records:
            raise ValueError(f"{hub.path} gave no usable rows for {data.name!r}")
        return records

    def _rows(self, hub: Hub) -> Iterable[Record]:
        """The split's rows; a split that is joined to one text is taken whole."""
        try:
            import datasets
        except ImportError:
            raise ImportError(
                "data from the hub needs the package datasets: pip install 'kvhive[eval]'"
            ) from None
        if self._mirror is not None:
            hub = replace(hub, path=str(self._mirror / hub.path), revision="")
        try:
            found: Any = datasets.load_dataset(
                hub.path, hub.config, split=hub.split, revision=hub.revision or None
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OSError(
                f"cannot load {hub.path} from the hub: {reason}; check the network, or give the "
                "data as a folder (--data FOLDER)"
            ) from error
        rows: Iterable[Record] = (
            found if hub.join else found.select(range(min(MOST_ROWS, len(found))))
        )
        return rows


def _hub(data: DataSet) -> Hub:
    if data.hub is None:
        known = ", ".join(name for name, one in CATALOGUE.items() if one.hub)
        raise ValueError(
            f"data set {data.name!r} is not on the hub in this form; give it in a folder (--data "
            f"FOLDER, {data.file}). From the hub come: {known}"
        )
    return data.hub


def _joined(rows: Iterable[Record]) -> list[Record]:
    return [{"text": "".join(str(row["text"]) for row in rows)}]
