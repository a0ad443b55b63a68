"""What a calibration is: it learns a profile from texts, once, and can be stopped and taken up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvhive.cache.attention import attach
from kvhive.calibration import Profile
from kvhive.learning.kept import Kept, partial_file
from kvhive.learning.picture import Picture
from kvhive.registry import Registry
from kvhive.spec import Spec, knob


@dataclass(frozen=True)
class Calibration(Spec):
    """Base of all calibrations. Fields are settings of the learning; the name is that of the
    method whose profile it makes.
    """

    source: ClassVar[str] = ""

    pieces: int = knob(8, "most pieces of text that are read", least=1)
    tokens: int = knob(1024, "length of a piece, in tokens", least=64)

    def learn(
        self,
        model: PreTrainedModel,
        texts: Sequence[Sequence[int]],
        kept: Kept,
        tick: Callable[[float], None],
    ) -> dict[str, Tensor]:
        """The tensors of the profile, on the CPU.

        texts: token ids of each piece, all of `tokens` tokens. kept: takes what is done, and gives
        what an earlier run left. tick: is told the share of the work that is done, 0 to 1. May
        raise `ValueError`.
        """
        raise TypeError(f"{type(self).__name__} learns nothing")

    @classmethod
    def pictures(cls, profile: Profile) -> tuple[Picture, ...]:
        """What to show of a profile by this method. Raises `ValueError` for a damaged one."""
        return ()

    @classmethod
    def remark(cls, profile: Profile) -> str:
        """A sentence for whoever had this profile made; "" where there is nothing to say."""
        return ""


CALIBRATIONS: Registry[Calibration] = Registry("calibration")


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Calibration,
    texts: Sequence[str],
    data: str,
    out: Path,
    tick: Callable[[float], None] = lambda share: None,
    replace: bool = False,
) -> Profile:
    """Learn a profile of `model` from `texts`, and write it to `out`.

    data: says in words what the texts are. What is done is kept beside `out` (`partial_file`); a
    run that was stopped goes on there when it is called in the same way again. replace: a file that
    is there. Raises `FileExistsError` for an `out` that is there otherwise; `ValueError` for texts
    that are too short, a model that kvhive does not support, and what another learning left beside
    `out`.
    """
    if out.exists() and not replace:
        raise FileExistsError(f"{str(out)!r} exists; delete it first, or choose another name")
    facts = attach(model)
    pieces = cut([_ids(tokenizer, text) for text in texts], method.pieces, method.tokens)
    kept = Kept.open(partial_file(out), _mark(method, facts.fingerprint, pieces))
    tensors = method.learn(model, pieces, kept, tick)
    read = f"{data}: {len(pieces)} pieces of {method.tokens} tokens"
    profile = Profile(method.name, facts.fingerprint, read, date.today().isoformat(), tensors)
    profile.save(out, replace)
    kept.remove()
    return profile


def cut(texts: Sequence[Sequence[int]], pieces: int, tokens: int) -> list[list[int]]:
    """At most `pieces` pieces of `tokens` tokens: the first of every text, then the second of every
    text, and so on. Raises `ValueError` when no text is that long.
    """
    longest = max(map(len, texts), default=0)
    found = [
        list(text[start : start + tokens])
        for start in range(0, longest - tokens + 1, tokens)
        for text in texts
        if len(text) >= start + tokens
    ]
    if not found:
        raise ValueError(
            f"no text has the {tokens:,} tokens of a piece, the longest has {longest:,}: give "
            "longer texts, or lower the setting tokens"
        )
    return found[:pieces]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _mark(method: Calibration, fingerprint: str, pieces: list[list[int]]) -> str:
    """SHA-256 of all that decides what is learnt."""
    settings = {one.name: getattr(method, one.name) for one in method.knobs()}
    told = json.dumps([method.name, settings, fingerprint, pieces])
    return hashlib.sha256(told.encode()).hexdigest()
