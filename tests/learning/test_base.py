"""A calibration: texts are cut, a stopped run goes on, a profile appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvhive.calibration import Profile
from kvhive.learning import CALIBRATIONS, Calibration, Kept, calibrate, partial_file
from kvhive.learning.base import cut
from kvhive.model.facts import ModelFacts
from kvhive.spec import parse
from tests.cli.tiny import text, tokenizer
from tests.support import tiny_llama


@dataclass(frozen=True)
class Lengths(Calibration):
    """The sum of every piece; stops before the piece `stop`."""

    name: ClassVar[str] = "lengths"
    done: ClassVar[list[int]] = []
    stop: ClassVar[int] = 99

    def learn(
        self,
        model: PreTrainedModel,
        texts: Sequence[Sequence[int]],
        kept: Kept,
        tick: Callable[[float], None],
    ) -> dict[str, Tensor]:
        """One part a piece."""
        for place, ids in enumerate(texts):
            if kept.get(str(place)) is None:
                if place == self.stop:
                    raise KeyboardInterrupt
                self.done.append(place)
                kept.put(str(place), {"sum": torch.tensor(float(sum(ids)))})
            tick((place + 1) / len(texts))
        return {"sums": torch.stack([kept.parts[str(i)]["sum"] for i in range(len(texts))])}


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was done, nothing stops."""
    monkeypatch.setattr(Lengths, "done", [])
    monkeypatch.setattr(Lengths, "stop", 99)


TEXTS = [text(60), text(90), text(75)]
FEW = Lengths(pieces=3, tokens=128)


def learn(
    out: Path, method: Calibration = FEW, texts: Sequence[str] = TEXTS, seed: int = 0
) -> Profile:
    """With a tiny model of that seed."""
    return calibrate(tiny_llama(seed=seed), tokenizer(), method, texts, "three texts", out)


def test_what_is_learnt_is_written_with_its_origin(tmp_path: Path) -> None:
    out = tmp_path / "p"
    made = learn(out)
    again = Profile.load(out)
    assert list(tmp_path.iterdir()) == [out], "no partial file is left"
    assert again.method == "lengths"
    assert again.fingerprint == ModelFacts.of(tiny_llama()).fingerprint
    assert again.data == "three texts: 3 pieces of 128 tokens"
    assert again.date == made.date
    ids = [tokenizer()(one).input_ids[:128] for one in TEXTS]
    assert again.tensors["sums"].tolist() == [float(sum(one)) for one in ids]


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn(tmp_path / "whole").tensors["sums"]
    out = tmp_path / "p"
    monkeypatch.setattr(Lengths, "stop", 2)
    with pytest.raises(KeyboardInterrupt):
        learn(out)
    assert partial_file(out).exists()
    assert not out.exists()
    Lengths.done.clear()
    monkeypatch.setattr(Lengths, "stop", 99)
    assert torch.equal(learn(out).tensors["sums"], whole)
    assert Lengths.done == [2], "what was done is not done again"
    assert not partial_file(out).exists()


@pytest.mark.parametrize("other", ["text", "model", "setting", "method"])
def test_what_another_learning_left_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    @dataclass(frozen=True)
    class Others(Lengths):
        """Another method."""

        name: ClassVar[str] = "others"

    out = tmp_path / "p"
    monkeypatch.setattr(Lengths, "stop", 1)
    with pytest.raises(KeyboardInterrupt):
        learn(out)
    before = partial_file(out).read_bytes()
    changed: dict[str, dict[str, object]] = {
        "text": {"texts": [text(61)[1:], *TEXTS[1:]]},
        "model": {"seed": 1},
        "setting": {"method": Lengths(pieces=2, tokens=128)},
        "method": {"method": Others(pieces=3, tokens=128)},
    }
    with pytest.raises(ValueError, match=r"p\.partial' was begun with another model, other texts"):
        learn(out, **changed[other])  # type: ignore[arg-type]
    assert partial_file(out).read_bytes() == before


def test_a_damaged_partial_file_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "p"
    partial_file(out).write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"p\.partial' is damaged .*; delete it to begin anew"):
        learn(out)


def test_a_profile_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "p"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="exists; delete it first"):
        learn(out)
    assert Lengths.done == [], "refused before the work"
    assert out.read_text() == "mine"
    calibrate(tiny_llama(), tokenizer(), FEW, TEXTS, "texts", out, replace=True)
    assert Profile.load(out).data.startswith("texts")


def test_parts_come_back_as_they_were(tmp_path: Path) -> None:
    kept = Kept.open(tmp_path / "k", "this")
    tensors = {"a": torch.randn(3, 2).T, "b": torch.arange(3)}
    kept.put("one/two", tensors)
    kept.put("three", {"a": torch.zeros(())})
    again = Kept.open(tmp_path / "k", "this")
    found = again.get("one/two")
    assert found is not None
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert again.get("three") == {"a": torch.zeros(())}
    assert again.get("two") is None
    assert list(tmp_path.iterdir()) == [tmp_path / "k"]
    again.remove()
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_cannot_be_written_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept.open(tmp_path / "k", "this")
    kept.put("one", {"a": torch.ones(2)})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvhive.files.os.fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        kept.put("two", {"a": torch.ones(2)})
    monkeypatch.undo()
    assert set(Kept.open(tmp_path / "k", "this").parts) == {"one"}
    assert list(tmp_path.iterdir()) == [tmp_path / "k"]


def test_texts_are_cut_in_turn() -> None:
    texts = [list(range(7)), list(range(100, 103)), list(range(200, 206))]
    assert cut(texts, 9, 3) == [
        [0, 1, 2],
        [100, 101, 102],
        [200, 201, 202],
        [3, 4, 5],
        [203, 204, 205],
    ]
    assert cut(texts, 2, 3) == [[0, 1, 2], [100, 101, 102]]
    with pytest.raises(ValueError, match="no text has the 8 tokens of a piece, the longest has 7"):
        cut(texts, 2, 8)
    with pytest.raises(ValueError, match="the longest has 0"):
        cut([], 2, 8)


def test_every_calibration_is_of_a_method_that_reads_it() -> None:
    from kvhive.allocations import ALLOCATIONS
    from kvhive.stores import STORES

    readers = [*ALLOCATIONS.values(), *STORES.values()]
    assert set(CALIBRATIONS) == {member.calibration for member in readers} - {None}
    homes = [member.__module__ for member in CALIBRATIONS.values()]
    assert homes == [f"kvhive.learning.{name}" for name in CALIBRATIONS]


def test_a_typo_is_answered() -> None:
    with pytest.raises(ValueError, match=r"unknown calibration 'zigzak'; did you mean: zigzag\?"):
        parse(CALIBRATIONS, "zigzak")
