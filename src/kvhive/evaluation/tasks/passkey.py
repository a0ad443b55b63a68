"""Passkey: a number hidden in a long text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvhive.evaluation.measures import CHOICE, EXACT, MARGIN, TOKEN_ACCURACY
from kvhive.evaluation.tasks.base import TASKS, InText
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.spec import knob

_INSTRUCTION = "There is important information hidden in the text below. Remember it.\n\n"


@TASKS.register("passkey")
@dataclass(frozen=True)
class Passkey(InText):
    """A five-digit key, stated twice, at some depth of a text; the key alone is the answer.

    Source: the card's section 4, after Mohtashami and Jaggi 2023, arXiv:2305.16300. Ten-way choice
    beside the exact key. Decoys are other keys with a colour, so that being odd is not enough.
    """

    measures = (EXACT, TOKEN_ACCURACY, CHOICE, MARGIN)

    lengths: tuple[int, ...] = knob(
        (1024,), "tokens of the context; items take them in turn", least=1
    )
    depths: tuple[float, ...] = knob(
        (0.0, 0.25, 0.5, 0.75, 1.0), "where the key lies", least=0, most=1
    )
    decoys: int = knob(0, "keys of another name in the same text", least=0, most=45)

    def items(self, context: TaskContext) -> Iterator[Item]:
        """All depths of the first length, then of the next, and again with other keys."""
        number = 0
        while True:
            for length in self.lengths:
                for depth in self.depths:
                    yield self._item(context, number, length, depth)
                    number += 1

    def _item(self, context: TaskContext, number: int, length: int, depth: float) -> Item:
        rng = context.random("passkey", number)
        keys = [str(key) for key in rng.sample(range(10_000, 100_000), 10 + self.decoys)]
        key, others = keys[0], keys[1:10]
        needles = [(depth, f"The pass key is {key}. Remember it. {key} is the pass key.")]
        for decoy, colour in zip(
            keys[10:], ("red", "blue", "green", "white", "black") * 9, strict=False
        ):
            needles.append((rng.random(), f"The {colour} key is {decoy}. Remember it."))
        choices = tuple(rng.sample([key, *others], 10))
        probe = Probe(
            "\n\nWhat is the pass key?",
            cue="The pass key is ",
            target=key,
            choices=choices,
            gold=choices.index(key),
            history=key + ".",
        )
        hay = context.haystack(rng, length, needles, self.hay)
        facts = {"length": length, "depth": depth}
        return Item(f"passkey-{number}", _INSTRUCTION + hay, _INSTRUCTION, (probe,), facts=facts)
