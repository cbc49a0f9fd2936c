"""`quintet chat`: piped, and at a terminal."""

import os
import re
import select
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quintet import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def answer(chat_model: Path) -> Any:
    """The answer to a conversation, by hand."""
    model: Any = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)

    def made(*messages: str, system: str | None = None, new: int = 10) -> str:
        chat = [] if system is None else [{"role": "system", "content": system}]
        for index, content in enumerate(messages):
            chat.append({"role": ("user", "assistant")[index % 2], "content": content})
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(ids, max_new_tokens=new)
        text: str = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    return made


# -- piped -----------------------------------------------------------------------------------


def test_only_answers_are_printed(quintet: Any, chat_model: Path, answer: Any) -> None:
    result = quintet("chat", chat_model, "-n", 10, stdin="Hello\n\n  How are you?  \n")
    first = answer("Hello")
    second = answer("Hello", first, "How are you?")
    assert result.code == 0
    assert result.out == f"{first}\n{second}\n"
    assert re.search(r"10 tokens, [\d.]+ tokens/s, context \d+ of 256", result.err)
    assert "/help" not in result.err


def test_quiet_says_nothing_else(quintet: Any, chat_model: Path, answer: Any) -> None:
    result = quintet("chat", chat_model, "-n", 10, "-q", stdin="Hello")
    assert (result.code, result.out, result.err) == (0, answer("Hello") + "\n", "")


def test_nothing_piped_is_nothing_said(quintet: Any, chat_model: Path) -> None:
    result = quintet("chat", chat_model, stdin="")
    assert (result.code, result.out) == (0, "")


def test_reset_forgets_the_conversation(quintet: Any, chat_model: Path, answer: Any) -> None:
    result = quintet("chat", chat_model, "-n", 10, stdin="Hello\n/reset\nHello\n")
    assert result.out == f"{answer('Hello')}\n" * 2


def test_a_system_message(quintet: Any, chat_model: Path, answer: Any) -> None:
    brief = answer("Hello", system="Be brief, please.")
    assert brief != answer("Hello")
    asked = ["chat", chat_model, "-n", 10, "--system", "Be brief, please."]
    assert quintet(*asked, stdin="Hello\n").out == f"{brief}\n"
    assert quintet(*asked, stdin="Hello\n/reset\nHello\n").out == f"{brief}\n" * 2
    typed = quintet("chat", chat_model, "-n", 10, stdin="Hi\n/system Be brief, please.\nHello\n")
    assert typed.out == f"{answer('Hi')}\n{brief}\n"
    removed = quintet(*asked, stdin="/system\nHello\n")
    assert removed.out == f"{answer('Hello')}\n"


def test_exit_leaves(quintet: Any, chat_model: Path) -> None:
    result = quintet("chat", chat_model, "-n", 10, stdin="/exit\nHello\n")
    assert (result.code, result.out) == (0, "")


@pytest.mark.parametrize(
    ("typed", "said"), [("/help", "/reset "), ("/rest", "There is no command /rest.\n/help")]
)
def test_commands_are_explained_beside_the_answers(
    quintet: Any, chat_model: Path, typed: str, said: str
) -> None:
    result = quintet("chat", chat_model, stdin=f"{typed}\n")
    assert (result.code, result.out) == (0, "")
    assert said in result.err
    assert result.is_one_screen


def test_a_model_without_a_template(quintet: Any, plain_model: Path) -> None:
    result = quintet("chat", plain_model, stdin="Hello\n")
    assert (result.code, result.out) == (4, "")
    assert "has no chat template" in result.err
    assert "quintet generate" in result.err
    assert result.is_one_screen


def test_a_conversation_longer_than_the_context(quintet: Any, chat_model: Path) -> None:
    result = quintet("chat", chat_model, stdin="Hello " * 300 + "\n")
    assert (result.code, result.out) == (2, "")
    assert re.search(r"error: the prompt has \d+ tokens and the model's context is 256", result.err)
    assert result.is_one_screen


def test_sampling_is_repeatable(quintet: Any, chat_model: Path, answer: Any) -> None:
    asked = ["chat", chat_model, "-n", 10, "-t", 1, "--seed"]
    first = quintet(*asked, 3, stdin="Hello\n").out
    assert quintet(*asked, 3, stdin="Hello\n").out == first
    assert quintet(*asked, 4, stdin="Hello\n").out != first


# -- at a terminal ---------------------------------------------------------------------------


class Terminal:
    """The other end of a pseudo-terminal."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Read until a pattern is seen, and return and forget all up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.descriptor], [], [], left)[0]:
                data = os.read(self.descriptor, 4096)
                self.seen += data.decode(errors="replace").replace("\r\n", "\n")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(process: Any, tireless_model: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    try:
        child = process(
            "chat",
            tireless_model,
            "-n",
            29_000,
            before="import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)",
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        terminal = Terminal(ours)
        assert "/help lists the commands" in terminal.until("> $")
        terminal.type("Hello\n")
        terminal.until(r"Hello\n(.|\n){40}")
        terminal.type("\x03")
        made = re.search(r"\n(\d+) tokens, .*of 30000\n> $", terminal.until("of 30000\n> $"))
        assert made
        assert 0 < int(made[1]) < 29_000
        terminal.type("/help\n")
        terminal.until("forget the conversation(.|\n)*> $")
        terminal.type("\x04")
        assert child.wait(timeout=60) == 0
    finally:
        os.close(ours)
