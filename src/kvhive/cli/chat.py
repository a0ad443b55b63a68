"""`kvhive generate --chat`: a conversation over one cache, a line of stdin for each turn."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from kvhive.cli.console import note
from kvhive.inference.document import STDIN

if TYPE_CHECKING:
    from kvhive.cache.report import Report
    from kvhive.inference.conversation import Conversation

INTERRUPTED = 130  # how shells report a program that Ctrl-C ended
_COMMANDS = {"/exit": "ends the chat", "/reset": "begins a new one with an empty cache"}


def is_wanted(prompt: str | None, chat: bool, as_json: bool = False) -> bool:
    """Whether to chat: asked for, or no prompt was given and there is a terminal to ask on.

    Raises `ValueError` where neither a prompt nor a chat is possible.
    """
    if not chat and prompt is not None:
        return False
    if sys.stdin is None:
        raise ValueError("stdin is closed: a chat reads what you say from it; give a PROMPT alone")
    if prompt == STDIN:
        raise ValueError(
            "a chat reads a turn from every line of stdin; leave - out, or leave out --chat to "
            "read stdin as one prompt"
        )
    if not chat and not sys.stdin.isatty():
        raise ValueError(
            "no PROMPT was given: give a text, - to read it from stdin, or --chat to answer every "
            "line of stdin"
        )
    if as_json:
        raise ValueError("--json prints one answer when it is whole; a chat needs it left out")
    return True


@dataclass
class Chat:
    """The loop: a line is read, answered on stdout, and told about.

    begin: makes a conversation that has read nothing. options: of every answer, as
    `Conversation.stream` takes them. tell: called with what the cache holds after each answer.
    """

    begin: Callable[[], Conversation]
    options: dict[str, Any]
    tell: Callable[[Report], None]
    talk: Conversation = field(init=False)

    def run(self, prompt: str | None) -> None:
        """Chat until stdin ends or /exit; prompt: said before anything is read.

        Raises `typer.Exit` with code 130 for Ctrl-C where no answer is being written, `ValueError`
        for bytes that are no text and when the conversation becomes longer than the model allows.
        """
        self.talk = self.begin()
        try:
            for line in _said(prompt):
                command = line.split()[0] if line.startswith("/") else ""
                if command == "/exit":
                    return
                if command:
                    self._obey(command)
                elif line.strip():
                    self._answer(line)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            raise typer.Exit(INTERRUPTED) from None

    def _obey(self, command: str) -> None:
        if command == "/reset":
            self.talk = self.begin()
            note("a new conversation; nothing is remembered.")
            return
        known = ", ".join(f"{name} {does}" for name, does in _COMMANDS.items())
        note(f"{command} is no command ({known}); a space before it makes it words.")

    def _answer(self, words: str) -> None:
        try:
            answer = self.talk.stream(words, **self.options)
        except ValueError as error:
            raise ValueError(
                f"the conversation ends here: {error}; one of any length needs a recipe with a "
                "count of tokens and positions counted in the cache, such as streaming_llm@512"
            ) from None
        with _interruptible() as interrupted:
            for piece in answer:
                sys.stdout.write(piece)
                sys.stdout.flush()
                if interrupted():
                    break
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.tell(self.talk.report())


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted in this block, and a second one raises `KeyboardInterrupt` as usual; yields
    whether there was one.
    """
    noted = False

    def handle(*_: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _said(prompt: str | None) -> Iterator[str]:
    """The prompt, and then the lines of stdin. Raises `ValueError` for bytes that are no text."""
    if prompt is not None:
        yield " " + prompt  # no command, whatever it begins with
    lines = _typed() if sys.stdin.isatty() and sys.stdout.isatty() else sys.stdin.buffer
    try:
        for line in lines:
            yield line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"stdin must be text in UTF-8, got the line {bytes(error.object[:60])!r}; convert it "
            "first"
        ) from None


def _typed() -> Iterator[bytes]:
    """Lines typed on a terminal, with what `input` offers to edit them, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history)
    while True:
        try:
            yield input("> ").encode("utf-8", "surrogateescape")
        except EOFError:
            sys.stdout.write("\n")
            return
