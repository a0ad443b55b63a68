"""The main job: several recipes on the same document and questions, measured side by side.

Every recipe reads the document through its own cache, answers the questions greedily, and is then
fed the full cache's answers token by token, so that its next-token distributions can be compared
with the full cache's on the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvhive.comparison.result import Answer, Fidelity, Result
from kvhive.comparison.results import Results
from kvhive.comparison.run import REFERENCE, Comparison, Generated, Progress
from kvhive.inference.modes import QuestionMode
from kvhive.inference.prompt import Prompt
from kvhive.model.tokenizers import remember
from kvhive.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["REFERENCE", "Answer", "Fidelity", "Progress", "Result", "compare"]


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    questions: Sequence[str],
    recipes: Sequence[Recipe | str],
    *,
    max_new_tokens: int = 64,
    mode: QuestionMode = "agnostic",
    turns: bool = False,
    prefill_chunk: int | None = None,
    progress: Progress | None = None,
) -> Results:
    """Run every recipe on `document` and `questions`; the full cache comes first, asked for or not.

    mode: "agnostic" compresses the document before a question is seen and asks each question on a
    copy; "aware" reads document and question together. turns: instead, the questions are turns of
    one conversation on one cache. So that turns can be compared, every cache then holds the full
    cache's answers to the earlier ones, and the recipe's own where there is no full cache to
    compare with. prefill_chunk: read in steps of so many tokens. progress: called with (recipe,
    what happens now, share done).

    A document beyond the length the model was trained on has no full cache to compare with: the
    recipes that can read it run without the reference, and their `fidelity` is None.

    Raises `ValueError` before anything runs for input or a recipe that cannot work, `TypeError` for
    texts that are none.
    """
    _check_texts(document, questions)
    remember(model, tokenizer)
    prompt = Prompt.build(tokenizer, document, list(questions), turns)
    wanted = list(dict.fromkeys(Recipe.parse(recipe) for recipe in recipes))
    comparison = Comparison(
        model, tokenizer, prompt, tuple(questions), max_new_tokens, mode, prefill_chunk, progress
    )
    order = comparison.order(wanted)
    comparison.warm_up()
    reference: list[Generated] | None = None
    results = Results()
    for recipe in order:
        result, answers = comparison.run(recipe, reference)
        results.append(result)
        if recipe == REFERENCE:
            reference = answers
    return results


def _check_texts(document: str, questions: Sequence[str]) -> None:
    if not isinstance(document, str):
        raise TypeError(f"compare: document must be a text, got {type(document).__name__}")
    listed = isinstance(questions, list | tuple)
    if not (listed and all(isinstance(question, str) for question in questions)):
        raise TypeError(f"compare: questions must be a list of texts, got {questions!r:.60}")
