"""When a context is compressed: before its question is seen, with it, or while it streams."""

from __future__ import annotations

from typing import Literal, get_args

QuestionMode = Literal["agnostic", "aware"]
Mode = Literal[QuestionMode, "stream"]  # a stream has no question

QUESTION_MODES: tuple[QuestionMode, ...] = get_args(QuestionMode)
MODES: tuple[Mode, ...] = get_args(Mode)
