"""The data sets tasks read, by name: where a record's fields come from and what shape they have.

`sums` are SHA-256 sums of published files. The evaluation sets are subsets that a user brings in
a folder; a file with another sum is read too, if its schema is right, and the sum is recorded with
the run, so that results on other items cannot be mistaken for results on these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvhive.registry import did_you_mean

Record = dict[str, Any]


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub at a fixed commit, and how its rows become our records.

    convert: (row number, row) -> records. join: rows of one text each
    are first joined to one, in order (`convert` then sees {"text": whole}).
    """

    path: str
    config: str | None
    split: str
    revision: str
    convert: Callable[[int, Record], list[Record]]
    join: bool = False


@dataclass(frozen=True)
class DataSet:
    """file: below the data folder. fields: name -> shape of a record's fields (`schema.py`)."""

    name: str
    file: str
    fields: Mapping[str, str]
    about: str
    sums: tuple[str, ...] = ()
    hub: Hub | None = None


def _summaries(row: int, record: Record, article: str, summary: str) -> list[Record]:
    return [
        {
            "id": str(record.get("id", row)),
            "article": str(record[article]).strip(),
            "summary": str(record[summary]).strip(),
        }
    ]


def _articles(row: int, record: Record) -> list[Record]:
    """WikiText cut at its level-1 headings: " = Title = "."""
    found: list[list[str]] = []
    for line in str(record["text"]).split("\n"):
        if line.startswith(" = ") and not line.startswith(" = = "):
            found.append([])
        if found:
            found[-1].append(line)
    return [
        {
            "id": f"wiki{order}",
            "order": order,
            "title": lines[0].strip(" ="),
            "text": "\n".join(lines),
        }
        for order, lines in enumerate(found)
    ]


def _hotpot(row: int, record: Record) -> list[Record]:
    titles, sentences = record["context"]["title"], record["context"]["sentences"]
    gold = set(record["supporting_facts"]["title"])
    documents = [
        {"title": title, "text": "".join(parts).strip(), "isgold": title in gold}
        for title, parts in zip(titles, sentences, strict=True)
    ]
    if len(documents) != 10:
        return []
    question = {"id": str(record["id"]), "question": record["question"]}
    return [{**question, "answers": [record["answer"]], "ctxs": documents}]


_QA = {"id": "text", "question": "text", "answers": "texts", "ctxs": "documents"}
_SUMMARY = {"id": "text", "article": "text", "summary": "text"}
_ALL = (
    DataSet(
        "books",
        "books/books.jsonl.gz",
        {"id": "text", "title": "text", "text": "text"},
        "public-domain books: haystacks, and long perplexity",
        ("2b49afb7f2d70a93d317c32abfe0a3cca2a37e7bda8e74d3e02036ad833e1df6",),
    ),
    DataSet(
        "cnn_dailymail",
        "cnn_dailymail/test_subset.jsonl.gz",
        _SUMMARY,
        "CNN / Daily Mail articles with highlights",
        ("e6d19b4cba8bb62f6a2d046bf2327644abed9ef81432817e4e130e2f98cc3179",),
        Hub(
            "abisee/cnn_dailymail",
            "3.0.0",
            "test",
            "96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
            lambda row, record: _summaries(row, record, "article", "highlights"),
        ),
    ),
    DataSet(
        "hotpotqa_10",
        "hotpotqa_10/distractor.jsonl.gz",
        _QA,
        "HotpotQA, distractor setting: ten paragraphs, two of them needed",
        ("3bde815357de179640609dbca501cb05ce111e302a247cd45c54667dc2195d0e",),
        Hub(
            "hotpotqa/hotpot_qa",
            "distractor",
            "validation",
            "1908d6afbbead072334abe2965f91bd2709910ab",
            _hotpot,
        ),
    ),
    DataSet(
        "kv_retrieval",
        "kv_retrieval/kv75.jsonl.gz",
        {"id": "text", "records": "pairs", "key": "text", "value": "text"},
        "75 pairs of random UUIDs",
        ("68876dffb774c7f8e4f64b0ec6aaadfa9812f65177fd0d00b33f42b65ef759e1",),
    ),
    DataSet(
        "longbench_mini",
        "longbench_mini/items.jsonl.gz",
        {"id": "text", "dataset": "text", "context": "text", "answers": "texts"},
        "LongBench items, trec among them",
        ("1afc4494dddc515421bb643bafb663bc7307cc42ed8b1d9811d3cbc41f059216",),
    ),
    DataSet(
        "multi_news",
        "multi_news/longbench_subset.jsonl.gz",
        _SUMMARY,
        "several articles on one event, and their summary",
        ("898fbe3c2d0e5d23d3202a1302b8f7eee191ef7bd1678ca8b048c1fc6ef5ea7f",),
    ),
    *(
        DataSet(
            f"qa10_nq/gold_at_{place}",
            f"qa10_nq/gold_at_{place}.jsonl.gz",
            _QA,
            f"Natural Questions with ten passages, the right one at {place}",
            (total,),
        )
        for place, total in (
            (0, "9ee86bd4ed983b331573f08ad70838e386e7922181713215edaf4431deae5e3a"),
            (4, "5ce827417983fbf267380ceb90aeaa193e5b44af5c4ea312826a8218354a6a12"),
            (9, "0acc276b0fcc7260e34a20b96bc8f15d2f862018189631a650398314889c7529"),
        )
    ),
    DataSet(
        "shared_context_nq",
        "shared_context_nq/contexts.jsonl.gz",
        {"id": "text", "ctxs": "documents", "turns": "turns"},
        "ten passages, ten questions",
        ("bad3dfdb1554bfeba4130390b85f995c74d89b8b1855bcc09df1163a156e0832",),
    ),
    DataSet(
        "wikitext2",
        "wikitext2/test_articles.jsonl.gz",
        {"id": "text", "order": "number", "title": "text", "text": "text"},
        "WikiText-2 raw, test split, by article",
        ("13ddab2fa28f3946ecf6ba8cd62c6d0a71b05f284a088f1aa73c731e6c134ccf",),
        Hub(
            "Salesforce/wikitext",
            "wikitext-2-raw-v1",
            "test",
            "b08601e04326c79dfdd32d625aee71d232d685c3",
            _articles,
            join=True,
        ),
    ),
    DataSet(
        "xsum",
        "xsum/test_subset.jsonl.gz",
        _SUMMARY,
        "BBC articles with one-sentence summaries",
        ("ab89ce8b27a0413f47274c519abbf2269d7d73f8981d082768c4acbe1c6bee66",),
        Hub(
            "EdinburghNLP/xsum",
            None,
            "test",
            "7d4d486c2f8ef850b1a11aead99b894ff3dd7da9",
            lambda row, record: _summaries(row, record, "document", "summary"),
        ),
    ),
)
CATALOGUE: dict[str, DataSet] = {one.name: one for one in _ALL}


def find(name: str) -> DataSet:
    """The data set called `name`. Raises `ValueError` with near names for an unknown one."""
    if name not in CATALOGUE:
        raise ValueError(f"unknown data set {name!r}; {did_you_mean(name, CATALOGUE)}")
    return CATALOGUE[name]
