"""The tokenizer of a model: the one it was loaded or used with, else the one that lies with it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase
else:
    Tokenizer = object  # importing the class takes what a cache can do without

_KNOWN: weakref.WeakKeyDictionary[Any, Tokenizer | None]
_KNOWN = weakref.WeakKeyDictionary()


def remember(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """This is the model's tokenizer, as long as the model lives."""
    _KNOWN[model] = tokenizer


def tokenizer_of(model: PreTrainedModel) -> Tokenizer | None:
    """The tokenizer that was remembered; else what lies where the model was loaded from, without
    asking a network; None: there is none.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _beside(model.name_or_path)
    return _KNOWN[model]


def _beside(place: str | None) -> Tokenizer | None:
    if not place:
        return None
    from transformers import AutoTokenizer

    try:
        found: Tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception:  # whatever is missing or damaged there: the model itself was made without it
        return None
    return found
