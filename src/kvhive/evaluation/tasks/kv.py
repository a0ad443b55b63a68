"""Key-value retrieval: which UUID belongs to this one?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvhive.evaluation.data.made_up import random_uuid
from kvhive.evaluation.measures import (
    CHOICE,
    EXACT,
    MARGIN,
    TOKEN_ACCURACY,
    Measure,
    per_probe,
)
from kvhive.evaluation.tasks.base import TASKS, Conversation
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Outcome, Probe
from kvhive.spec import knob

_INSTRUCTION = "Extract the value corresponding to the specified key in the JSON object below.\n\n"


def _first_block(probe: Probe, outcome: Outcome) -> float | None:
    """The first half of the tokens of the value's first eight hex digits at least, all right."""
    return float(all(outcome.hits[: max(1, len(outcome.hits) * 8 // 36)]))


@TASKS.register("kv")
@dataclass(frozen=True)
class KeyValue(Conversation):
    """A JSON object of random UUID pairs; the value of a key is asked. Nothing can be guessed.

    Every pair is equally likely to be asked: in mode "agnostic" a policy that evicts can know about
    the kept share of the pairs, no more; clearly more points to a leak of the question. Source: Liu
    et al. 2023, arXiv:2307.03172, section 3 (75 pairs and more there); own UUIDs.
    """

    measures = (
        CHOICE,
        EXACT,
        TOKEN_ACCURACY,
        Measure("first_block", per_probe(_first_block)),
        MARGIN,
    )

    pairs: int = knob(8, "pairs in the object", least=1, most=1000)
    asked: int = knob(1, "keys asked of one object", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.asked > self.pairs:
            raise ValueError(
                f"kv: asked must be at most pairs, got asked={self.asked}, pairs={self.pairs}"
            )

    def items(self, context: TaskContext) -> Iterator[Item]:
        """New pairs every time; those asked lie anywhere among them."""
        number = 0
        while True:
            rng = context.random("kv", number)
            pairs = [(random_uuid(rng), random_uuid(rng)) for _ in range(self.pairs)]
            asked = rng.sample(pairs, self.asked)
            values = tuple(value for _, value in pairs)
            probes = tuple(_probe(key, value, values) for key, value in asked)
            body = (
                "JSON data:\n{" + ",\n ".join(f'"{key}": "{value}"' for key, value in pairs) + "}"
            )
            facts = {"pairs": self.pairs}
            yield Item(f"kv-{number}", _INSTRUCTION + body, _INSTRUCTION, probes, facts=facts)
            number += 1


def _probe(key: str, value: str, values: tuple[str, ...]) -> Probe:
    return Probe(
        f'\n\nKey: "{key}"',
        cue='Corresponding value: "',
        target=value,
        choices=values,
        gold=values.index(value),
        history=value + '"',
    )
