"""`kvhive generate --chat`: turns on one cache, commands, and every way to end."""

from __future__ import annotations

import io
import re
import signal

import pytest
import typer

from kvhive.cache.report import Report
from kvhive.cli.chat import Chat, is_wanted
from kvhive.inference.conversation import Conversation
from tests.cli.tiny import TRAINED_LENGTH, model, save, text, tokenizer

CHAT = ["generate", "--chat", "-r", "h2o@0.4", "--max-new-tokens", "5"]


def spoken(stderr: str) -> str:
    return " ".join(stderr.split())


def expected(*turns: str) -> str:
    """What a conversation answers, a line each."""
    talk = Conversation.begin(model(), tokenizer(), "h2o@0.4")
    return "".join("".join(talk.stream(turn, max_new_tokens=5)) + "\n" for turn in turns)


def test_lines_of_a_pipe_are_turns_of_one_conversation(run):
    result = run(*CHAT, stdin=b"Hi there\r\n\nWhat?\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected("Hi there", "What?")
    seen = [int(count) for count in re.findall(r"(\d+) tokens seen", result.stderr)]
    assert len(seen) == 2
    assert seen[0] < seen[1]


def test_a_prompt_is_the_first_turn_and_no_command(run):
    result = run(*CHAT, "/exit or not", stdin=b"What?")
    assert result.stdout == expected("/exit or not", "What?")


def test_commands(run):
    result = run(*CHAT, stdin=b"Hi\n/reset\nHi\n/list all\n /list\n/exit\nWhat?\n")
    assert result.exit_code == 0
    again = expected("Hi")
    assert result.stdout == again + expected("Hi", "/list")
    assert "/list is no command" in spoken(result.stderr)
    assert all(name in spoken(result.stderr) for name in ("/exit", "/reset"))


def test_a_conversation_that_grows_too_long_keeps_what_was_said(run):
    result = run(*CHAT, stdin=f"Hi\n{text(TRAINED_LENGTH // 4)}\nWhat?\n".encode())
    assert result.exit_code == 2
    assert result.stdout == expected("Hi")
    assert "the conversation ends here: h2o@0.4" in spoken(result.stderr)
    assert "streaming_llm@512" in spoken(result.stderr)
    endless = ["generate", "--chat", "-r", "streaming_llm@200", "--max-new-tokens", "5"]
    result = run(*endless, stdin=f"{text(120)}\n".encode() * 3)
    assert result.exit_code == 0, result.stderr
    seen = re.findall(r"([\d,]+) tokens seen, (\d+) kept", result.stderr)
    assert int(seen[-1][0].replace(",", "")) > TRAINED_LENGTH
    assert int(seen[-1][1]) <= 200


def test_what_cannot_be_read(run):
    for stdin, words, said in (
        (b"Hi\nna\xefve\n", "must be text in UTF-8, got the line b'na\\xefve", expected("Hi")),
        (b"", "", ""),
    ):
        result = run(*CHAT, stdin=stdin)
        assert result.exit_code == (2 if words else 0)
        assert words in spoken(result.stderr)
        assert result.stdout == said
    for words in (["generate"], [*CHAT, "-"]):
        result = run(*words)
        assert result.exit_code == 2
        assert "--chat" in spoken(result.stderr)


def test_a_model_without_a_chat_template_is_asked_in_the_plain_form(run, tmp_path):
    result = run(*CHAT, stdin=b"Hi\n", model=save(tmp_path / "plain", chat=False))
    assert result.exit_code == 0, result.stderr
    assert "Question: ... Answer:" in spoken(result.stderr)


def test_quiet_tells_nothing_and_json_is_refused(run):
    result = run(*CHAT, "--quiet", stdin=b"Hi\n")
    assert (result.stdout, result.stderr) == (expected("Hi"), "")
    result = run(*CHAT, "--json", stdin=b"Hi\n")
    assert result.exit_code == 2
    assert "--json" in result.stderr


def test_it_fits_a_size(run):
    result = run("generate", "--chat", "-r", "h2o", "--fit", "300KiB", stdin=b"Hi\n")
    assert result.exit_code == 0, result.stderr
    assert "h2o@" in result.stderr


class Stdin(io.TextIOWrapper):
    """Standard input that is a terminal or a pipe."""

    def __init__(self, terminal: bool, data: bytes = b"") -> None:
        super().__init__(io.BytesIO(data))
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Terminal(io.StringIO):
    """Standard output on which Ctrl-C is pressed at the third piece, `presses` times."""

    def __init__(self, presses: int) -> None:
        super().__init__()
        self.presses, self.pieces = presses, 0

    def isatty(self) -> bool:
        return True

    def write(self, piece: str) -> int:
        self.pieces += 1
        if self.pieces == 3:
            for _ in range(self.presses):
                signal.raise_signal(signal.SIGINT)
        return super().write(piece)


def test_no_prompt_on_a_terminal_begins_a_chat(monkeypatch):
    monkeypatch.setattr("sys.stdin", Stdin(terminal=True))
    assert is_wanted(None, chat=False)
    assert is_wanted("Hi", chat=True)
    assert not is_wanted("Hi", chat=False)
    monkeypatch.setattr("sys.stdin", None)
    assert not is_wanted("Hi", chat=False)
    for prompt, chat in ((None, False), (None, True), ("Hi", True)):
        with pytest.raises(ValueError, match="stdin is closed"):
            is_wanted(prompt, chat)


@pytest.fixture
def chat() -> tuple[Chat, list[Report]]:
    """A chat on the tiny model with answers of up to 40 tokens, and the reports it tells."""
    told: list[Report] = []

    def begin() -> Conversation:
        return Conversation.begin(model(), tokenizer(), "full")

    return Chat(begin, {"max_new_tokens": 40}, told.append), told


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """`input` on a terminal: these lines, or what a key raises."""
    given = iter(lines)

    def answer(asked: str) -> str:
        assert asked == "> "
        line = next(given)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("sys.stdin", Stdin(terminal=True))
    monkeypatch.setattr("builtins.input", answer)


def test_ctrl_c_ends_the_answer_alone_and_ctrl_d_the_chat(monkeypatch, chat):
    before = signal.getsignal(signal.SIGINT)
    written = Terminal(presses=1)
    typed(monkeypatch, "Hi", "What?", EOFError)
    monkeypatch.setattr("sys.stdout", written)
    chat[0].run(None)
    assert written.pieces > 3 + 2
    assert signal.getsignal(signal.SIGINT) is before
    first, second = (report.tokens_seen for report in chat[1])
    asked = len(
        tokenizer()(
            tokenizer().apply_chat_template(
                [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
            )
        ).input_ids
    )
    assert asked < first < asked + 39
    assert second > first


@pytest.mark.parametrize(
    ("presses", "lines"), [(0, ["Hi", KeyboardInterrupt]), (2, ["Hi", "never read"])]
)
def test_ctrl_c_at_the_prompt_or_twice_in_an_answer_ends_it_all(monkeypatch, chat, presses, lines):
    before = signal.getsignal(signal.SIGINT)
    typed(monkeypatch, *lines)
    monkeypatch.setattr("sys.stdout", Terminal(presses))
    with pytest.raises(typer.Exit) as ended:
        chat[0].run(None)
    assert ended.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert len(chat[1]) == (0 if presses else 1)
