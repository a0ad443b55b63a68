"""Made-up documents for the tasks beside this file: words with codes, one of which is asked."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from kvhive.evaluation.nouns import NOUNS

WORDS = 48  # with codes, in every document
CHOICES = 4


def documents(**_: Any) -> dict[str, Dataset]:
    """A hundred documents of about 570 tokens, always the same. Ignores the model's arguments."""
    return {"test": Dataset.from_list([_document(number) for number in range(100)])}


def _document(number: int) -> dict[str, Any]:
    rng = random.Random(number)
    words = rng.sample(NOUNS, WORDS)
    codes = [str(code) for code in rng.sample(range(1000, 10_000), WORDS)]
    lines = [f"The code of {word} is {code}." for word, code in zip(words, codes, strict=True)]
    asked = rng.sample(range(WORDS), CHOICES)
    return {
        "list": "Memorise the code of every word.\n\n" + "\n".join(lines),
        "word": words[asked[0]],
        "choices": sorted(codes[place] for place in asked),
        "code": codes[asked[0]],
    }
