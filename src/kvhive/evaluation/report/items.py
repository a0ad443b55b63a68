"""The items behind the numbers of a page, packed: a browser unpacks a part when it is opened."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable
from typing import Any

from kvhive.evaluation.statistics import Row

_LONGEST_TEXT = 400  # characters of an answer shown


def pack(rows: Iterable[Row]) -> str:
    """`{"facts": {item: facts}, "rows": {recipe: {item: [scores, probes, held]}}}` as gzipped JSON
    in base64.

    probes: [scores, text] of each; held: [tokens kept, bytes]. The same rows give the same text.
    """
    facts: dict[str, Any] = {}
    packed: dict[str, dict[str, Any]] = {}
    for row in rows:
        facts[row["item"]] = row["facts"]
        probes = [[one["scores"], one.get("text", "")[:_LONGEST_TEXT]] for one in row["probes"]]
        held = [row["kept"], row["bytes"]]
        packed.setdefault(row["recipe"], {})[row["item"]] = [row["scores"], probes, held]
    text = json.dumps({"facts": facts, "rows": packed}, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 9, mtime=0)).decode("ascii")


def unpack(text: str) -> dict[str, Any]:
    """What `pack` was given, as its description says."""
    unpacked: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(text)))
    return unpacked
