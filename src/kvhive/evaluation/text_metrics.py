"""Scores of a generated text against references. Pure functions of strings."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (the SQuAD rule)."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def substring(text: str, references: Iterable[str]) -> float:
    """1 if any reference, normalised, occurs in the text, normalised; empty references never do."""
    held = normalise(text)
    return float(any((short := normalise(one)) and short in held for one in references))


def exact_match(text: str, references: Iterable[str]) -> float:
    """1 if the text equals any reference after normalisation."""
    return float(normalise(text) in {normalise(one) for one in references})


def strict_exact_match(text: str, references: Iterable[str]) -> float:
    """1 if the text equals the first reference, trimmed, in lower case: BUZZ's own rule."""
    first = next(iter(references), "")
    return float(text.strip().lower() == first.strip().lower())


def token_f1(text: str, references: Iterable[str]) -> float:
    """Harmonic mean of word precision and recall, at its best over the references."""
    words = normalise(text).split()
    return max((_f1(words, normalise(one).split()) for one in references), default=0.0)


def share_found(text: str, references: Iterable[str]) -> float:
    """The share of references that occur in the text, whatever their case."""
    wanted = list(references)
    held = text.lower()
    return sum(one.lower() in held for one in wanted) / len(wanted) if wanted else 0.0


def first_number(text: str) -> str:
    """The first run of digits, or an empty string."""
    found = re.search(r"\d+", text)
    return found.group() if found else ""


def rouge(text: str, reference: str) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum F1 with stemming, by the `rouge-score` package.

    Sentences are put on lines of their own for Lsum. Raises `ImportError` with the command to run.
    """
    scores: Any = _scorer().score(_one_a_line(reference), _one_a_line(text))
    return {name: float(score.fmeasure) for name, score in scores.items()}


def _f1(words: list[str], wanted: list[str]) -> float:
    common = sum((Counter(words) & Counter(wanted)).values())
    if not common:
        return float(words == wanted)
    return 2 * common / (len(words) + len(wanted))


def _one_a_line(text: str) -> str:
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


@lru_cache(maxsize=1)
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError("ROUGE needs rouge-score: pip install 'kvhive[eval]'") from None
    return RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
