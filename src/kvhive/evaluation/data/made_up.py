"""Made-up records in the shape of every data set: a small world of people, towns and trades.

Nothing here is taken from a published data set. It serves tests, trials without data, and the
generated tasks that need facts to ask for. A world is drawn from a seed; asking twice gives the
same.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from kvhive.evaluation.data.catalogue import Record

VERSION = 1
_SIZES = {"books": 2, "wikitext2": 12}
_USUAL = 24
_STARTS = ("Bar", "Cal", "Dor", "Fen", "Gal", "Har", "Ish", "Jor", "Kel", "Lun", "Mar", "Nor")
_ENDS = (
    "a",
    "an",
    "do",
    "eth",
    "ia",
    "in",
    "la",
    "mir",
    "na",
    "or",
    "ra",
    "ric",
    "ta",
    "us",
    "vin",
)
_TOWN_ENDS = ("bridge", "bury", "by", "den", "field", "ford", "ham", "mouth", "ton", "wick")
_TRADES = ("baker", "beekeeper", "boatman", "carpenter", "doctor", "gardener", "glazier", "miller")
_THINGS = ("bell", "boat", "bridge", "clock", "door", "fence", "gate", "kettle", "ladder", "lamp")
_PLACES = ("abbey", "barn", "chapel", "harbour", "inn", "library", "market", "orchard", "square")
_VERBS = ("bought", "cleaned", "found", "left", "mended", "moved", "painted", "sold", "wanted")
_SEASONS = ("autumn", "spring", "summer", "winter")
_OPENINGS = (
    "In the {season} of {year}",
    "On the way to the {place}",
    "Long before that",
    "The next morning",
    "As everybody in {town} knew",
    "After the rain",
)


@dataclass(frozen=True)
class Person:
    """Somebody with three facts that can be asked for."""

    name: str
    town: str
    trade: str
    year: int

    def passage(self, rng: random.Random) -> str:
        """A few sentences that tell all facts, between others that tell none."""
        facts = [
            f"{self.name} was born in {self.town} in {self.year}.",
            f"Like few others there, {self.name} worked as a {self.trade}.",
        ]
        return " ".join([facts[0], sentence(rng), facts[1], sentence(rng), sentence(rng)])


def people(rng: random.Random, count: int) -> list[Person]:
    """`count` people with different names, towns and years."""
    names: dict[str, None] = {}
    towns: dict[str, None] = {}
    while len(names) < count:
        names[
            f"{rng.choice(_STARTS)}{rng.choice(_ENDS)} {rng.choice(_STARTS)}{rng.choice(_ENDS)}"
        ] = None
    while len(towns) < count:
        towns[f"{rng.choice(_STARTS)}{rng.choice(_ENDS)}{rng.choice(_TOWN_ENDS)}"] = None
    years = rng.sample(range(1700, 1990), count)
    return [
        Person(name, town, rng.choice(_TRADES), year)
        for name, town, year in zip(names, towns, years, strict=True)
    ]


def sentence(rng: random.Random) -> str:
    """One sentence about nothing in particular."""
    opening = rng.choice(_OPENINGS).format(
        season=rng.choice(_SEASONS),
        year=rng.randint(1700, 1989),
        place=rng.choice(_PLACES),
        town=rng.choice(_STARTS) + rng.choice(_TOWN_ENDS),
    )
    return (
        f"{opening} the {rng.choice(_TRADES)} {rng.choice(_VERBS)} the old {rng.choice(_THINGS)} "
        f"by the {rng.choice(_PLACES)}, and the {rng.choice(_TRADES)} {rng.choice(_VERBS)} another."
    )


def prose(rng: random.Random, sentences: int) -> str:
    """Paragraphs of five sentences, a blank line between two."""
    lines = [sentence(rng) for _ in range(sentences)]
    return "\n\n".join(" ".join(lines[i : i + 5]) for i in range(0, sentences, 5))


def records(name: str, seed: int) -> list[Record]:
    """All records of the data set `name`, which the catalogue knows."""
    rng = random.Random(f"{seed}/{name.partition('/')[0]}")
    family, _, part = name.partition("/")
    make = _MAKERS[family]
    return [make(rng, number, part) for number in range(_SIZES.get(family, _USUAL))]


def _book(rng: random.Random, number: int, part: str) -> Record:
    return {"id": f"book{number}", "title": f"Book {number}", "text": prose(rng, 1500)}


def _summary(rng: random.Random, number: int, part: str) -> Record:
    hero = people(rng, 1)[0]
    gist = f"{hero.name}, a {hero.trade} from {hero.town}, was honoured on Monday."
    article = f"{gist} {prose(rng, 12)} {hero.passage(rng)}"
    return {"id": f"news{number}", "article": article, "summary": gist}


def _question(person: Person) -> tuple[str, str]:
    return f"where was {person.name} born", person.town


def _ten(rng: random.Random, number: int, part: str) -> Record:
    place = int(part.rpartition("_")[2] or 0)
    crowd = people(rng, 10)
    documents = [{"title": one.name, "text": one.passage(rng), "isgold": False} for one in crowd]
    gold = {**documents.pop(0), "isgold": True}
    documents.insert(place, gold)
    question, answer = _question(crowd[0])
    return {
        "id": f"ask{number}",
        "question": question,
        "answers": [answer],
        "gold_index": place,
        "ctxs": documents,
    }


def _hotpot(rng: random.Random, number: int, part: str) -> Record:
    record = _ten(rng, number, "at_3")
    return {**record, "question": record["question"] + "?", "type": "bridge", "level": "easy"}


def _shared(rng: random.Random, number: int, part: str) -> Record:
    crowd = people(rng, 10)
    documents = [{"title": one.name, "text": one.passage(rng)} for one in crowd]
    turns = []
    for place in rng.sample(range(10), 10):
        question, answer = _question(crowd[place])
        turns.append(
            {
                "id": f"turn{number}-{place}",
                "question": question,
                "answers": [answer],
                "gold_index": place,
            }
        )
    return {"id": f"shared{number}", "ctxs": documents, "turns": turns}


def random_uuid(rng: random.Random) -> str:
    """A UUID drawn from `rng`."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def coded_word(rng: random.Random) -> str:
    """Six random letters."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))


def _article(rng: random.Random, number: int, part: str) -> Record:
    title = people(rng, 1)[0].name
    text = f" = {title} = \n\n {prose(rng, 80)}\n"
    return {"id": f"wiki{number}", "order": number, "title": title, "text": text}


def _many_shot(rng: random.Random, number: int, part: str) -> Record:
    labels = {"Place": "Where is the {} of {}?", "Person": "Who {1} the {0} of {1}?"}
    lines = []
    for _ in range(120):
        label, form = rng.choice(sorted(labels.items()))
        asked = form.format(rng.choice(_THINGS), people(rng, 1)[0].town)
        lines.append(f"Question: {asked}\nType: {label}")
    return {
        "id": f"trec{number}",
        "dataset": "trec",
        "context": "\n".join(lines),
        "input": "Type:",
        "answers": ["Place"],
        "all_classes": sorted(labels),
    }


_MAKERS: dict[str, Callable[[random.Random, int, str], Record]] = {
    "books": _book,
    "cnn_dailymail": _summary,
    "hotpotqa_10": _hotpot,
    "longbench_mini": _many_shot,
    "multi_news": _summary,
    "qa10_nq": _ten,
    "shared_context_nq": _shared,
    "wikitext2": _article,
    "xsum": _summary,
}
