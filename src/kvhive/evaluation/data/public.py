"""Public data sets: where `datasets` finds them, and how their rows become our records."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Convert = Callable[[Iterable[Record]], Iterator[Record]]

CONVERTED = "refs/convert/parquet"  # where the hub keeps every data set's rows as Parquet files
_LOST = "https://github.com/nelson-liu/lost-in-the-middle/raw/main/qa_data"
_TEN = 10  # passages of a context


@dataclass(frozen=True)
class Hub:
    """What `datasets.load_dataset` is told. path: a name on the hub, or "json" for `files` that lie
    elsewhere. revision: a commit, or the branch of converted files; None takes the newest. files:
    of that split, where the repository does not say so itself. rows: the first that are read, None
    for all: evaluation takes a few hundred. convert: rows in their order -> records.
    """

    path: str
    convert: Convert
    split: str = "test"
    config: str | None = None
    revision: str | None = None
    files: str | None = None
    rows: int | None = 2000

    @property
    def address(self) -> str:
        """What a run records and messages name."""
        if self.path == "json":
            return str(self.files)
        return f"{self.path}@{self.revision}" if self.revision else self.path


def _each(one: Callable[[int, Record], Record | None]) -> Convert:
    """A conversion row by row; None leaves a row out."""

    def convert(rows: Iterable[Record]) -> Iterator[Record]:
        found = (one(number, row) for number, row in enumerate(rows))
        return (record for record in found if record is not None)

    return convert


def _summary(article: str, summary: str) -> Convert:
    """The two columns, and the row's id where it has one."""
    return _each(
        lambda number, row: {
            "id": str(row.get("id", number)),
            "article": str(row[article]).strip(),
            "summary": str(row[summary]).strip(),
        }
    )


def _book(number: int, row: Record) -> Record:
    """A blank line between paragraphs, each of them one line."""
    paragraphs = row["text"].replace("\r\n", "\n").split("\n\n")
    lines = (" ".join(one.split()) for one in paragraphs)
    text = "\n\n".join(line for line in lines if line)
    return {"id": f"pg19-{number}", "title": row["short_book_title"], "text": text}


def _articles(rows: Iterable[Record]) -> Iterator[Record]:
    """WikiText cut at its level-1 headings: " = Title = "."""
    found: list[list[str]] = []
    for line in "".join(row["text"] for row in rows).split("\n"):
        if line.startswith(" = ") and not line.startswith(" = = "):
            found.append([])
        if found:
            found[-1].append(line)
    for order, lines in enumerate(found):
        text, title = "\n".join(lines), lines[0].strip(" =")
        yield {"id": f"wiki{order}", "order": order, "title": title, "text": text}


def _hotpot(number: int, row: Record) -> Record | None:
    """Ten paragraphs, their sentences joined; the few rows with fewer are left out."""
    titles, sentences = row["context"]["title"], row["context"]["sentences"]
    gold = set(row["supporting_facts"]["title"])
    documents = [
        {"title": title, "text": "".join(parts).strip(), "isgold": title in gold}
        for title, parts in zip(titles, sentences, strict=True)
    ]
    if len(documents) != _TEN:
        return None
    question = {"id": str(row["id"]), "question": row["question"]}
    return {**question, "answers": [row["answer"]], "ctxs": documents}


def _passage(row: Mapping[str, Any]) -> Record:
    return {name: row[name] for name in ("title", "text", "isgold")}


def _ten_passages(number: int, row: Record) -> Record:
    """A row of lost-in-the-middle; its place among the rows is the question's name."""
    documents = [_passage(one) for one in row["ctxs"]]
    return {
        "id": f"nq{number}",
        "question": row["question"],
        "answers": list(row["answers"]),
        "gold_index": [one["isgold"] for one in documents].index(True),
        "ctxs": documents,
    }


def _shared(rows: Iterable[Record]) -> Iterator[Record]:
    """Ten questions each, with their ten gold passages, of which no two share title or answer.

    From the last row backwards: the questions of `qa10` come from the other end.
    """
    group: list[tuple[int, Record]] = []
    number = 0
    for place, row in reversed(list(enumerate(rows))):
        titles = {one["ctxs"][0]["title"] for _, one in group}
        answers = {one["answers"][0].lower() for _, one in group}
        if row["ctxs"][0]["title"] in titles or row["answers"][0].lower() in answers:
            continue
        group.append((place, row))
        if len(group) == _TEN:
            yield _context(number, group)
            group, number = [], number + 1


def _context(number: int, group: list[tuple[int, Record]]) -> Record:
    """Asked in another order than the passages are in."""
    turns = [
        {
            "id": f"nq{place}",
            "question": row["question"],
            "answers": list(row["answers"]),
            "gold_index": index,
        }
        for index, (place, row) in enumerate(group)
    ]
    random.Random(number).shuffle(turns)
    passages = [_passage(row["ctxs"][0]) for _, row in group]
    return {"id": f"shared{number}", "ctxs": passages, "turns": turns}


def _examples(number: int, row: Record) -> Record:
    return {
        "id": f"{row['dataset']}_{number}",
        "dataset": row["dataset"],
        "context": row["context"],
        "answers": list(row["answers"]),
    }


def _long_bench(name: str, convert: Convert) -> Hub:
    return Hub("THUDM/LongBench", convert, revision=CONVERTED, files=f"{name}/test/*.parquet")


BOOKS = Hub(
    "emozilla/pg19-test",
    _each(_book),
    revision="c5e39bf32e33f9111323aa68d7d9000d22722035",
    rows=20,
)
CNN_DAILYMAIL = Hub(
    "abisee/cnn_dailymail",
    _summary("article", "highlights"),
    config="3.0.0",
    revision="96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
)
HOTPOTQA = Hub(
    "hotpotqa/hotpot_qa",
    _each(_hotpot),
    split="validation",
    config="distractor",
    revision="1908d6afbbead072334abe2965f91bd2709910ab",
)
LONGBENCH_TREC = _long_bench("trec", _each(_examples))
MULTI_NEWS = _long_bench(
    "multi_news",
    _each(
        lambda number, row: {
            "id": f"multi_news_{number}",
            "article": row["context"].strip(),
            "summary": row["answers"][0].strip(),
        }
    ),
)
SHARED_CONTEXT = Hub("json", _shared, files=f"{_LOST}/nq-open-oracle.jsonl.gz", rows=None)
WIKITEXT = Hub(
    "Salesforce/wikitext",
    _articles,
    config="wikitext-2-raw-v1",
    revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    rows=None,
)
XSUM = Hub(
    "EdinburghNLP/xsum",
    _summary("document", "summary"),
    revision=CONVERTED,
    files="default/test/*.parquet",
)


def ten_passages(place: int) -> Hub:
    """Natural Questions with ten passages, the right one at `place`: 0, 4 or 9."""
    file = f"{_TEN}_total_documents/nq-open-{_TEN}_total_documents_gold_at_{place}.jsonl.gz"
    return Hub("json", _each(_ten_passages), files=f"{_LOST}/{file}", rows=500)
