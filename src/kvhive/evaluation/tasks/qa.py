"""Ten-document question answering, and its forms with shared contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvhive.evaluation.data import Record
from kvhive.evaluation.measures import (
    ANSWER_GAIN,
    CENTRED_CHOICE,
    CHOICE,
    EXACT_MATCH,
    F1,
    NLL,
    PMI_CHOICE,
    PMI_MARGIN,
    STRICT_EXACT_MATCH,
    SUBSTRING,
)
from kvhive.evaluation.tasks.base import TASKS, Conversation, Task
from kvhive.evaluation.tasks.context import TaskContext
from kvhive.evaluation.types import Item, Probe
from kvhive.inference.modes import Mode
from kvhive.spec import knob

_INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n"
)
_CUE = "The answer is"
_LIMIT = 32


def documents_text(documents: Sequence[Record]) -> str:
    """Numbered documents with titles, as in lost-in-the-middle."""
    return "\n".join(
        f"Document [{place}] (Title: {one['title']}) {one['text']}"
        for place, one in enumerate(documents, start=1)
    )


def question_text(question: str) -> str:
    """The question as the end of the user's turn."""
    return f"\n\nQuestion: {question.rstrip('?')}?"


def choice_probe(context: TaskContext, record: Record, records: Sequence[Record]) -> Probe:
    """Its own answer against nine answers of other questions, after the cue."""
    rng = context.random("choices", record["id"])
    own = {answer.lower() for answer in record["answers"]}
    others = {one["answers"][0] for one in records if one["id"] != record["id"]}
    wrong = rng.sample(sorted(one for one in others if one.lower() not in own), 9)
    right = record["answers"][0]
    choices = rng.sample([right, *wrong], 10)
    return Probe(
        question_text(record["question"]),
        cue=_CUE,
        choices=tuple(f" {one}" for one in choices),
        gold=choices.index(right),
        references=tuple(record["answers"]),
        history=f" {right}.",
    )


def written_probe(record: Record) -> Probe:
    """An answer in the model's own words."""
    return Probe(
        question_text(record["question"]),
        references=tuple(record["answers"]),
        limit=_LIMIT,
        history=f"{record['answers'][0]}.",
    )


_CHOSEN = (PMI_CHOICE, ANSWER_GAIN, PMI_MARGIN, CHOICE)
_WRITTEN = (SUBSTRING, F1, EXACT_MATCH, STRICT_EXACT_MATCH)


@dataclass(frozen=True)
class _TenDocuments(Task):
    """Base: records with ten documents, from one file or, in turn, from several."""

    written: ClassVar[bool] = False

    def items(self, context: TaskContext) -> Iterator[Item]:
        """Question by question; each in all the places its gold document is at."""
        files = [context.records(name) for name in self.data]
        for row, _ in enumerate(files[0]):
            for records in files:
                record = records[row]
                if self.written:
                    probe = written_probe(record)
                else:
                    probe = choice_probe(context, record, records)
                place = record.get("gold_index")
                facts = {} if place is None else {"gold_index": place}
                prefix = _INSTRUCTION + documents_text(record["ctxs"])
                name = record["id"] if place is None else f"{record['id']}@{place}"
                yield Item(name, prefix, _INSTRUCTION, (probe,), cluster=record["id"], facts=facts)


_NQ = tuple(f"qa10_nq/gold_at_{place}" for place in (0, 4, 9))


@TASKS.register("qa10")
@dataclass(frozen=True)
class Qa10(_TenDocuments):
    """Natural Questions, ten passages, the right one at 0, 4 or 9: choice among ten answers.

    A choice's score is its log probability minus that without the documents, which takes out length
    and what a small model believes anyway. Source: Liu et al. 2023, arXiv:2307.03172; the card,
    section 3.
    """

    measures = _CHOSEN
    data: ClassVar = _NQ


@TASKS.register("qa10_written")
@dataclass(frozen=True)
class Qa10Written(_TenDocuments):
    """The same, answered in 32 tokens: substring, F1, exact match (and that of BUZZ's code)."""

    measures = _WRITTEN
    data: ClassVar = _NQ
    written: ClassVar[bool] = True


@TASKS.register("hotpotqa")
@dataclass(frozen=True)
class HotpotQa(_TenDocuments):
    """HotpotQA, distractor setting: ten paragraphs, two of them needed. Choice as in `qa10`."""

    measures = _CHOSEN
    data: ClassVar = ("hotpotqa_10",)


@TASKS.register("hotpotqa_written")
@dataclass(frozen=True)
class HotpotQaWritten(_TenDocuments):
    """The same, answered in 32 tokens."""

    measures = _WRITTEN
    data: ClassVar = ("hotpotqa_10",)
    written: ClassVar[bool] = True


@TASKS.register("shared_context")
@dataclass(frozen=True)
class SharedContext(Conversation):
    """Ten passages, ten questions of one compressed context: which answer belongs to which
    question?

    All candidates are answers of this context, so each gains from it; minus its mean over the
    questions only what the question adds is left. `turns=True` asks them in one conversation.
    Source: in the style of SCBench, arXiv:2412.10319; the card, sections 3 and 9.
    """

    measures = (CENTRED_CHOICE, CHOICE, NLL)
    data: ClassVar = ("shared_context_nq",)

    asked: int = knob(10, "questions asked of one context", least=2, most=10)

    @property
    def modes(self) -> tuple[Mode, ...]:  # type: ignore[override]
        """Apart, the questions cannot be known when the context is compressed; of turns, the first
        can.
        """
        return ("agnostic", "aware") if self.turns else ("agnostic",)

    def items(self, context: TaskContext) -> Iterator[Item]:
        """One for every context."""
        for record in context.records("shared_context_nq"):
            answers = [turn["answers"][0] for turn in record["turns"]]
            probes = tuple(
                Probe(
                    question_text(turn["question"]),
                    cue=_CUE,
                    target=f" {answers[place]}",
                    choices=tuple(f" {answer}" for answer in answers),
                    gold=place,
                    history=f" {answers[place]}.",
                    facts={"turn": place + 1, "gold_index": turn.get("gold_index", -1)},
                )
                for place, turn in enumerate(record["turns"][: self.asked])
            )
            yield Item(
                record["id"], _INSTRUCTION + documents_text(record["ctxs"]), _INSTRUCTION, probes
            )
