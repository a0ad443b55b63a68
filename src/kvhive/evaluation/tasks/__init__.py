"""The tasks, by name, and the groups that the command line knows. A new task is a new file here."""

from __future__ import annotations

from kvhive.evaluation.tasks.base import TASKS, Conversation, Task, parse_task
from kvhive.registry import import_all

__all__ = ["GROUPS", "TASKS", "Conversation", "Task", "is_group", "parse_task", "parse_tasks"]

import_all(__name__, __path__)

# The suite holds what a small model can do and what so can show a loss with a few items a task.
_SUITE = (
    "fidelity",
    "wikitext",
    "verbatim",
    "passkey",
    "niah_multikey",
    "word_codes(asked=2)",
    "qa10",
    "shared_context(asked=5)",
    "cnn_dailymail(write=False)",
    "xsum(write=False)",
)
_RULER = (
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "ruler_qa",
)
# Those of the generators that a small model can do: no data is needed.
_GENERATED = (
    "verbatim(hay='prose')",
    "passkey(hay='prose')",
    "niah_multikey(hay='prose')",
    "word_codes(hay='prose', asked=2)",
    "kv",
    "ruler_qa",
    "vt(hay='prose')",
    "cwe",
    "fwe",
)
# The same at a length that cache compression is for: 4,096 tokens.
_LONG = (
    "verbatim(hay='prose', tokens=4096)",
    "passkey(hay='prose', lengths=(4096,))",
    "niah_multikey(hay='prose', tokens=4096)",
    "word_codes(hay='prose', pairs=32, asked=2, tokens=4096)",
    "kv(pairs=48)",
)
GROUPS: dict[str, tuple[str, ...]] = {
    "suite": _SUITE,
    "generated": _GENERATED,
    "long": _LONG,
    "ruler": _RULER,
    "all": tuple(TASKS),
}


def is_group(text: str) -> bool:
    """Whether it names several tasks."""
    return text.strip() in GROUPS


def parse_tasks(texts: list[str]) -> list[Task]:
    """Tasks from names, `name(knob=value)` and groups, each once, in the order given."""
    spelled = [one for text in texts for one in GROUPS.get(text.strip(), (text,))]
    return list({str(task): task for task in map(parse_task, spelled)}.values())
