"""What a line of `rows.jsonl` and `run.json` hold: checked when they are written and read."""

from __future__ import annotations

from kvhive.evaluation.schema import (
    AMOUNT,
    COUNT,
    FLAG,
    NUMBER,
    PLAIN,
    TEXT,
    WHOLE,
    among,
    listed,
    mapping,
    optional,
    record,
)
from kvhive.inference.modes import MODES

_MODE = among(*MODES)
_SCORES = mapping(NUMBER)
_FACTS = mapping(PLAIN, {"length": NUMBER, "depth": NUMBER, "turn": NUMBER})  # those reports read
_PROBE = record({"scores": _SCORES, "facts": _FACTS}, {"text": TEXT})
_TEXTS = listed(TEXT, "a list of texts, at least one", least=1)

ROW_SHAPE = record(
    {
        **dict.fromkeys(("task", "item", "recipe", "cluster"), TEXT),
        "mode": _MODE,
        **dict.fromkeys(("seen", "bytes", "full_bytes"), COUNT),
        "kept": AMOUNT,
        "scores": _SCORES,
        "probes": listed(_PROBE, "a list of probes"),
        "facts": _FACTS,
    },
    {
        "prefill": TEXT,
        "decode": among("step", "hold"),
        **dict.fromkeys(("seen_end", "bytes_end"), COUNT),
        "kept_end": AMOUNT,
    },
)

_SETTINGS = record(
    {
        **dict.fromkeys(("model", "dtype", "device"), TEXT),
        **dict.fromkeys(("recipes", "tasks"), _TEXTS),
        "modes": listed(_MODE, "a list of modes, at least one", least=1),
        "limit": COUNT,
        "seed": WHOLE,
        "block": optional(COUNT),
        "hold": FLAG,
    },
    {"engine": TEXT},
)
_VERSIONS = ("kvhive", "torch", "transformers", "python", "machine", "model_type", "model_sha256")
_RUN_FACTS = record(
    {**dict.fromkeys(_VERSIONS, TEXT), "threads": COUNT, "data": mapping(TEXT)},
    {"plugin_sha256": mapping(TEXT), "items": mapping(COUNT), "engine": TEXT},
)
RUN_SHAPE = record({"settings": _SETTINGS, "facts": _RUN_FACTS})
