"""`quintet chat` at a terminal: a process of its own at a real pseudo-terminal."""

import contextlib
import json
import os
import re
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forking import CHATS, Forks
from waiting import PATIENCE

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
pty = pytest.importorskip("pty")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

CTRL_C, CTRL_D, UP, TAB = "\x03", "\x04", "\x1b[A", "\t"
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PROMPT = r"(^|\n)> $"
# Ctrl-C is heard also where the tests themselves were started in the background.
CHAT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from quintet.cli.main import main
main(["chat", *sys.argv[1:]])
"""
Talk = Callable[..., "Terminal"]


class Terminal:
    """The other end of a pseudo-terminal at which a chat runs."""

    def __init__(self, descriptor: int, forks: Forks, child: int) -> None:
        self.descriptor = descriptor
        self.forks = forks
        self.child: int | None = child
        self.seen = ""
        self.raw = ""

    def type(self, text: str) -> None:
        if text == CTRL_C:
            # A signal between readline's echo and its wait for the next key is not seen until that
            # comes. Nobody is that quick.
            time.sleep(0.5)
        os.write(self.descriptor, text.encode())

    def say(self, text: str) -> str:
        """Type a line, and return what is shown up to the next prompt."""
        self.type(f"{text}\n")
        return self.until(PROMPT)

    def leave(self) -> int:
        self.type(CTRL_D)
        return self.ended()

    def ended(self) -> int:
        """Wait for the end, and return the exit code."""
        with contextlib.suppress(OSError):  # as nobody holds the other end
            self.until(r"$^")
        assert self.child is not None
        code, self.child = self.forks.wait(self.child), None
        return code

    def until(self, pattern: str, seconds: float = PATIENCE) -> str:
        """Read until a pattern is seen, and return and forget all up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.descriptor], [], [], left)[0]:
                data = os.read(self.descriptor, 4096).decode(errors="replace")
                self.raw += data
                self.seen += CODES.sub("", data).replace("\r\n", "\n")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    running = Forks(CHATS)
    yield running
    running.close()


@pytest.fixture
def talk(forks: Forks, tmp_path: Path) -> Iterator[Talk]:
    """Start a chat at a terminal of its own, with a home of its own."""
    started: list[Terminal] = []

    def start(*arguments: object, columns: int = 80, **environment: str) -> Terminal:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        usual = {"NO_COLOR": "1", "TERM": "dumb", "XDG_STATE_HOME": str(tmp_path / "state")}
        child = forks.start(
            CHAT,
            arguments,
            [os.ttyname(theirs)] * 3,
            {**os.environ, **usual, **environment},
            cwd=tmp_path,
        )
        terminal = Terminal(ours, forks, child)
        started.append(terminal)
        assert "/help lists the commands" in terminal.until(PROMPT)
        os.close(theirs)
        return terminal

    yield start
    for terminal in started:
        if terminal.child is not None:
            os.kill(terminal.child, signal.SIGKILL)
            forks.wait(terminal.child)
        os.close(terminal.descriptor)


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(talk: Talk, tireless_model: Path) -> None:
    terminal = talk(tireless_model, "-n", 29_000)
    terminal.type("Hello\n")
    terminal.until(r"Hello\n(.|\n){40}")
    terminal.type(CTRL_C)
    shown = terminal.until(r"of 30000\n> $")
    made = re.search(r"\n(\d+) tokens, .*of 30000\n> $", shown)
    assert made
    assert 0 < int(made[1]) < 29_000
    saved = terminal.say("/save talk.json")
    assert "saved to talk.json" in saved
    assert "forget the conversation" in terminal.say("/help")
    assert terminal.leave() == 0


def test_what_was_interrupted_is_kept(talk: Talk, tireless_model: Path, tmp_path: Path) -> None:
    terminal = talk(tireless_model, "-n", 29_000)
    terminal.type("Hello\n")
    shown = terminal.until(r"Hello\n(.|\n){20}").partition("Hello\n")[2]
    terminal.type(CTRL_C)
    terminal.until(PROMPT)
    terminal.say("/save talk.json")
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"].startswith(shown.replace("\n> ", "")[:10])
    assert terminal.leave() == 0


def test_ctrl_c_twice_leaves_and_once_does_not(talk: Talk, chat_model: Path) -> None:
    terminal = talk(chat_model, "-n", 5)
    terminal.type("half a mess")
    terminal.until("half a mess$")
    terminal.type(CTRL_C)
    assert "Ctrl-C once more leaves" in terminal.until(PROMPT)
    assert "5 tokens" in terminal.say("Hello")
    terminal.type(CTRL_C)
    terminal.until(PROMPT)
    terminal.type(CTRL_C)
    assert terminal.ended() == 0


def test_a_mistyped_command_names_the_nearest(talk: Talk, chat_model: Path) -> None:
    terminal = talk(chat_model, "-n", 5)
    assert "there is no command /resett. Did you mean /reset?" in terminal.say("/resett")
    assert "there is no command /xyzzy. /help lists them." in terminal.say("/xyzzy")
    assert "error: there is no message to take back" in terminal.say("/undo")
    assert "did you mean 'temperature'?" in terminal.say("/set temprature=1")
    assert "error: the prompt has" in terminal.say("Hello " * 200)
    assert "5 tokens" in terminal.say("Hello")
    assert terminal.leave() == 0


def test_history_is_restored(talk: Talk, chat_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    first = talk(chat_model, "-n", 5)
    first.say("The quick brown fox")
    first.say("a second line")
    assert first.leave() == 0
    path = tmp_path / "state" / "quintet" / "chat_history"
    assert "The quick brown fox" in path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o077 == 0
    second = talk(chat_model, "-n", 5)
    second.type(UP)
    second.until("a second line$")
    second.type(UP)
    second.until("The quick brown fox")
    assert "5 tokens" in second.say("")
    assert second.leave() == 0
    assert path.read_text(encoding="utf-8").count("a second line") == 1


def test_tab_completes_commands(talk: Talk, chat_model: Path) -> None:
    pytest.importorskip("readline")
    terminal = talk(chat_model, "-n", 5)
    terminal.type(f"/un{TAB}")
    terminal.until("/undo ?$")
    assert "no message to take back" in terminal.say("")
    assert terminal.leave() == 0


def test_undo_regen_save_and_load(talk: Talk, chat_model: Path, tmp_path: Path) -> None:
    terminal = talk(chat_model, "-n", 5, "-t", 1.5, "--seed", 3)
    terminal.say("Hello")
    terminal.say("/save one.json")
    terminal.say("/regen")
    terminal.say("/save two.json")
    one, two = (
        json.loads((tmp_path / name).read_text(encoding="utf-8"))["messages"]
        for name in ("one.json", "two.json")
    )
    assert one[0] == two[0] == {"role": "user", "content": "Hello"}
    assert len(one) == len(two) == 2
    assert one[1] != two[1]
    assert "taken back: Hello" in terminal.say("/undo")
    terminal.say("/save three.json")
    assert json.loads((tmp_path / "three.json").read_text(encoding="utf-8"))["messages"] == []
    assert "2 messages from one.json" in terminal.say("/load one.json")
    terminal.say("How are you?")
    terminal.say("/save four.json")
    four = json.loads((tmp_path / "four.json").read_text(encoding="utf-8"))["messages"]
    assert four[:2] == one
    assert len(four) == 4
    assert terminal.leave() == 0


def test_a_message_of_several_lines(talk: Talk, chat_model: Path, tmp_path: Path) -> None:
    terminal = talk(chat_model, "-n", 5)
    terminal.type('"""one\n')
    terminal.until(r"\.\.\. $")
    terminal.type("two\n")
    terminal.until(r"two\n\.\.\. $")
    assert "5 tokens" in terminal.say('three"""')
    terminal.say("/save talk.json")
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert messages[0]["content"] == "one\ntwo\nthree"
    assert terminal.leave() == 0


def test_what_is_pasted_is_one_message(talk: Talk, chat_model: Path, tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit knows no pasting in brackets")
    terminal = talk(chat_model, "-n", 5, TERM="xterm")
    pasted = "def f(x):\n    return x\n\nExplain this."
    terminal.type(f"\x1b[200~{pasted}\x1b[201~")
    assert "5 tokens" in terminal.say("")
    terminal.say("/save talk.json")
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == pasted
    assert terminal.leave() == 0


@pytest.mark.parametrize("word", ["exit", "quit", "/bye", "/quit"])
def test_words_of_other_programs_leave(talk: Talk, chat_model: Path, word: str) -> None:
    terminal = talk(chat_model, "-n", 5)
    terminal.type(f"{word}\n")
    assert terminal.ended() == 0


def test_reasoning_is_folded(talk: Talk, thinking_model: Path) -> None:
    terminal = talk(thinking_model, "-n", 30, NO_COLOR="", TERM="xterm")
    shown = terminal.say("Hello")
    assert re.search(r"thinking, \d+ tokens", shown)
    assert re.search(r"thought for [\d.]+ s, \d+ tokens\n", shown)
    assert "\x1b[2mth" in terminal.raw
    shown = terminal.say("/set reasoning=show")
    assert "reasoning=show" in shown
    assert "thinking" not in terminal.say("Hello")
    assert terminal.leave() == 0


def test_a_dumb_terminal_gets_no_codes(talk: Talk, thinking_model: Path) -> None:
    terminal = talk(thinking_model, "-n", 20, TERM="dumb", NO_COLOR="")
    assert re.search(r"thought for [\d.]+ s", terminal.say("Hello"))
    terminal.say("/help")
    assert terminal.leave() == 0
    assert "\x1b" not in terminal.raw


def test_what_was_taken_of_drafts_is_told(talk: Talk, predicting_model: Path) -> None:
    taken = r"\n24 tokens, [\d.]+ tokens/s, (\d+)% of (\d+) drafted tokens taken, context "
    terminal = talk(predicting_model, "num_assistant_tokens=2", "-n", 24, "--mtp")
    shown = terminal.say("Hello")
    found = re.search(taken, shown)
    assert found, shown
    assert int(found[2]) > 10
    plain = terminal.say("/set use_mtp=false")
    assert "use_mtp=False" in plain
    terminal.say("/undo")
    again = terminal.say("Hello")
    assert "drafted" not in again
    # The echo of what was typed, the answer, the line of figures, that it was cut, the prompt.
    assert again.splitlines()[:-3] == shown.splitlines()[:-3]
    assert terminal.leave() == 0


def test_words_are_whole_on_a_narrow_terminal(talk: Talk, chat_model: Path) -> None:
    terminal = talk(chat_model, "-n", 60, columns=40, TERM="xterm")
    figures = re.search(r"\n60 tokens, (.|\n)*of\s256\n", terminal.say("Hello"))
    assert figures
    assert len(figures[0].split("\n")) == 4
    assert all(len(line) <= 40 for line in figures[0].split("\n"))
    assert terminal.leave() == 0


def test_what_is_typed_meanwhile_is_not_in_the_answer(talk: Talk, tireless_model: Path) -> None:
    terminal = talk(tireless_model, "-n", 600)
    terminal.type("Hello\n")
    terminal.until(r"Hello\n(.|\n){20}")
    terminal.type("/undo\n")
    shown = terminal.until(r"taken back: Hello\n(.|\n)*> $")
    answered, _, after = shown.partition("600 tokens, ")
    assert "/undo" not in answered
    assert "/undo" in after
    assert terminal.leave() == 0
