"""Variable tracing (RULER vt): which variables hold this value?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from kvhive.evaluation.measures import CHOICE, SHARE_FOUND
from kvhive.evaluation.tasks.base import TASKS, Conversation, InText
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.spec import knob

_INSTRUCTION = "Memorise the chains of variable assignment hidden in the following text.\n\n"


@TASKS.register("vt")
@dataclass(frozen=True)
class VariableTracing(InText, Conversation):
    """Chains "VAR B = VAR A." in a text; all names that hold a value are to be listed.

    Also a choice between the chains' last names. Source: RULER, arXiv:2404.06654, section 3; own
    text.
    """

    measures = (SHARE_FOUND, CHOICE)

    tokens: int = knob(1024, "length of the context", least=1)
    hops: int = knob(1, "assignments after the first of a chain", least=0, most=50)
    chains: int = knob(2, "chains in the text", least=1, most=50)
    asked: int = knob(1, "chains asked of one context", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.asked > self.chains:
            raise ValueError(
                f"vt: asked must be at most chains, got asked={self.asked}, chains={self.chains}"
            )

    def items(self, context: TaskContext) -> Iterator[Item]:
        """New names and values every time."""
        number = 0
        while True:
            rng = context.random("vt", number)
            names = _names(rng, self.chains * (self.hops + 1))
            values = [str(value) for value in rng.sample(range(10_000, 100_000), self.chains)]
            chains = [names[place :: self.chains] for place in range(self.chains)]
            needles = []
            for chain, value in zip(chains, values, strict=True):
                depths = sorted(rng.random() for _ in chain)
                lines = [f"VAR {chain[0]} = {value}."]
                lines += [f"VAR {b} = VAR {a}." for a, b in pairwise(chain)]
                needles += list(zip(depths, lines, strict=True))
            lasts = tuple(f" {chain[-1]}" for chain in chains)
            probes = tuple(
                _probe(chains[place], values[place], lasts, place) for place in range(self.asked)
            )
            hay = context.haystack(rng, self.tokens, needles, self.hay)
            facts = {"length": self.tokens, "hops": self.hops}
            yield Item(f"vt-{number}", _INSTRUCTION + hay, _INSTRUCTION, probes, facts=facts)
            number += 1


def _names(rng: Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.sample(ascii_uppercase, 5))] = None
    return list(names)


def _probe(chain: list[str], value: str, lasts: tuple[str, ...], place: int) -> Probe:
    return Probe(
        f"\n\nFind all variables that are assigned the value {value}.",
        cue=f"The variables that are assigned the value {value} are:",
        choices=lasts,
        gold=place,
        references=tuple(chain),
        limit=30,
        stop=("\n\n",),
        history=" " + ", ".join(chain) + ".",
    )
