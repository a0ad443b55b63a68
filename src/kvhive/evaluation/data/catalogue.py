"""The data sets tasks read, by name: where a record's fields come from and what shape they have.

`sums` are SHA-256 sums of published files. The evaluation sets are subsets that a user brings in
a folder; a file with another sum is read too, if its schema is right, and the sum is recorded with
the run, so that results on other items cannot be mistaken for results on these.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvhive.evaluation.data import public
from kvhive.evaluation.data.public import Hub, Record
from kvhive.evaluation.schema import TEXT, WHOLE, Shape, listed, record
from kvhive.registry import did_you_mean

__all__ = ["CATALOGUE", "DataSet", "Record", "find"]


@dataclass(frozen=True)
class DataSet:
    """file: below the data folder. record: the shape of one of its records. hub: where `--data hub`
    gets it.
    """

    name: str
    file: str
    record: Shape
    about: str
    sums: tuple[str, ...]
    hub: Hub


_TEXTS = listed(TEXT, "a list of texts, at least one", least=1)
_DOCUMENTS = listed(
    record({"title": TEXT, "text": TEXT}), "a list of documents, at least one", least=1
)
_TURNS = listed(record({"question": TEXT, "answers": _TEXTS}), "a list of turns", least=1)
_BOOK = record({"id": TEXT, "title": TEXT, "text": TEXT})
_QA = record({"id": TEXT, "question": TEXT, "answers": _TEXTS, "ctxs": _DOCUMENTS})
_SUMMARY = record({"id": TEXT, "article": TEXT, "summary": TEXT})
_EXAMPLES = record({"id": TEXT, "dataset": TEXT, "context": TEXT, "answers": _TEXTS})
_CONTEXT = record({"id": TEXT, "ctxs": _DOCUMENTS, "turns": _TURNS})
_ARTICLE = record({"id": TEXT, "order": WHOLE, "title": TEXT, "text": TEXT})
_ALL = (
    DataSet(
        "books",
        "books/books.jsonl.gz",
        _BOOK,
        "public-domain books: haystacks, and long perplexity",
        ("2b49afb7f2d70a93d317c32abfe0a3cca2a37e7bda8e74d3e02036ad833e1df6",),
        public.BOOKS,
    ),
    DataSet(
        "cnn_dailymail",
        "cnn_dailymail/test_subset.jsonl.gz",
        _SUMMARY,
        "CNN / Daily Mail articles with highlights",
        ("e6d19b4cba8bb62f6a2d046bf2327644abed9ef81432817e4e130e2f98cc3179",),
        public.CNN_DAILYMAIL,
    ),
    DataSet(
        "hotpotqa_10",
        "hotpotqa_10/distractor.jsonl.gz",
        _QA,
        "HotpotQA, distractor setting: ten paragraphs, two of them needed",
        ("3bde815357de179640609dbca501cb05ce111e302a247cd45c54667dc2195d0e",),
        public.HOTPOTQA,
    ),
    DataSet(
        "longbench_mini",
        "longbench_mini/items.jsonl.gz",
        _EXAMPLES,
        "LongBench items, trec among them",
        ("1afc4494dddc515421bb643bafb663bc7307cc42ed8b1d9811d3cbc41f059216",),
        public.LONGBENCH_TREC,
    ),
    DataSet(
        "multi_news",
        "multi_news/longbench_subset.jsonl.gz",
        _SUMMARY,
        "several articles on one event, and their summary",
        ("898fbe3c2d0e5d23d3202a1302b8f7eee191ef7bd1678ca8b048c1fc6ef5ea7f",),
        public.MULTI_NEWS,
    ),
    *(
        DataSet(
            f"qa10_nq/gold_at_{place}",
            f"qa10_nq/gold_at_{place}.jsonl.gz",
            _QA,
            f"Natural Questions with ten passages, the right one at {place}",
            (total,),
            public.ten_passages(place),
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
        _CONTEXT,
        "ten passages, ten questions",
        ("bad3dfdb1554bfeba4130390b85f995c74d89b8b1855bcc09df1163a156e0832",),
        public.SHARED_CONTEXT,
    ),
    DataSet(
        "wikitext2",
        "wikitext2/test_articles.jsonl.gz",
        _ARTICLE,
        "WikiText-2 raw, test split, by article",
        ("13ddab2fa28f3946ecf6ba8cd62c6d0a71b05f284a088f1aa73c731e6c134ccf",),
        public.WIKITEXT,
    ),
    DataSet(
        "xsum",
        "xsum/test_subset.jsonl.gz",
        _SUMMARY,
        "BBC articles with one-sentence summaries",
        ("ab89ce8b27a0413f47274c519abbf2269d7d73f8981d082768c4acbe1c6bee66",),
        public.XSUM,
    ),
)
CATALOGUE: dict[str, DataSet] = {one.name: one for one in _ALL}


def find(name: str) -> DataSet:
    """The data set called `name`. Raises `ValueError` with near names for an unknown one."""
    if name not in CATALOGUE:
        raise ValueError(f"unknown data set {name!r}; {did_you_mean(name, CATALOGUE)}")
    return CATALOGUE[name]
