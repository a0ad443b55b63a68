"""One file a method; a new one is a new file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from ..cases import Case
from . import (
    adakv,
    baklava,
    buzz,
    cascading_kv,
    corm,
    elastic_cache,
    h2o,
    kivi,
    kv_compress,
    kvsharer,
    l2norm,
    less,
    pyramidkv,
    scissorhands,
    snapkv,
    streaming_llm,
    think,
    tova,
    zigzagkv,
)

REPLAYS: dict[str, Callable[[Case], None]] = {
    "adakv": adakv.replay,
    "baklava": baklava.replay,
    "buzz": buzz.replay,
    "cascading_kv": cascading_kv.replay,
    "corm": corm.replay,
    "elastic_cache": elastic_cache.replay,
    "h2o": h2o.replay,
    "kivi": kivi.replay,
    "kv_compress": kv_compress.replay,
    "kvsharer": kvsharer.replay,
    "l2norm": l2norm.replay,
    "less": less.replay,
    "pyramidkv": pyramidkv.replay,
    "scissorhands": scissorhands.replay,
    "snapkv": snapkv.replay,
    "streaming_llm": streaming_llm.replay,
    "think": think.replay,
    "tova": tova.replay,
    "zigzagkv": zigzagkv.replay,
}
