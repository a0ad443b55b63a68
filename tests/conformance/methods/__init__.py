"""One file a method; a new one is a new file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from ..cases import Case
from . import (
    buzz,
    cascading_kv,
    corm,
    elastic_cache,
    h2o,
    kv_compress,
    scissorhands,
    streaming_llm,
)

REPLAYS: dict[str, Callable[[Case], None]] = {
    "buzz": buzz.replay,
    "cascading_kv": cascading_kv.replay,
    "corm": corm.replay,
    "elastic_cache": elastic_cache.replay,
    "h2o": h2o.replay,
    "kv_compress": kv_compress.replay,
    "scissorhands": scissorhands.replay,
    "streaming_llm": streaming_llm.replay,
}
