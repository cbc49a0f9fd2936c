"""What is said beside the result, at terminals of any width."""

import io
import os
import re
import sys
import time

import pytest

from quintet.cli import compiling, output, terminal
from quintet.cli.answer import AnswerPrinter
from quintet.kernels import native as module
from quintet.parsing.events import Content, Reasoning
from waiting import until

Captured = pytest.CaptureFixture[str]


def at(columns: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "width", lambda _: columns)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


def test_lines_are_folded_between_words(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    at(20, monkeypatch)
    terminal.complain(
        "error: nothing is in /a/folder/with-a-long-name\n  one\n    a list of some words"
    )
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "error: nothing is in",
        "/a/folder/with-a-long-name",
        "  one",
        "    a list of some",
        "    words",
    ]
    at(None, monkeypatch)
    terminal.note("words " * 30)
    assert capsys.readouterr().err == "words " * 30 + "\n"


def test_facts_are_folded_below_their_names(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    facts = {"name": "one", "long name": "several words that do not fit"}
    monkeypatch.setattr(output, "width", lambda _: 25)
    output.show(facts, as_json=False)
    assert capsys.readouterr().out == (
        "name       one\nlong name  several words\n           that do not\n           fit\n"
    )
    monkeypatch.setattr(output, "width", lambda _: None)
    output.show(facts, as_json=False)
    assert capsys.readouterr().out.splitlines()[1] == "long name  several words that do not fit"


def test_who_waits_is_told_for_how_long_and_then_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at(40, monkeypatch)
    seen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", seen)
    with terminal.Waiting("reading", after=0.01):
        until(seen.getvalue)
    assert re.fullmatch(r"(\r\x1b\[Kreading, \d+ s\r)+\r\x1b\[K", seen.getvalue())


@pytest.mark.parametrize("case", ["soon", "quiet", "dumb", "pipe"])
def test_nobody_else_is_told(case: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    at(None if case == "pipe" else 40, monkeypatch)
    if case == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    after = 60.0 if case == "soon" else 0.0
    with terminal.Waiting("reading", quiet=case == "quiet", after=after):
        time.sleep(0.02)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="kernels are compiled on Linux")
def test_ctrl_c_leaves_the_compiling_to_another_process(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    started = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "native", interrupted)
    monkeypatch.setattr(os, "posix_spawn", lambda *given, **how: started.append((given, how)))
    with pytest.raises(KeyboardInterrupt):
        compiling.have_kernels(quiet=False)
    (((_, command, _), how),) = started
    assert command[1:] == ["-P", "-m", "quintet.kernels"]
    assert how["setsid"]
    assert "compiled in the background" in capsys.readouterr().err


class Screen(io.StringIO):
    """Standard output that somebody looks at."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("screen", [True, False])
def test_what_a_model_writes_gives_a_terminal_no_orders(
    monkeypatch: pytest.MonkeyPatch, screen: bool
) -> None:
    out = Screen() if screen else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "dumb")
    answer = AnswerPrinter("show")
    orders = "\x1b[2J\x1b]52;c;ZXZpbA==\x07\x9b31m\r\b"
    answer.feed([Reasoning(f"a{orders}"), Content(f"b\t{orders}c\n")])
    answer.end()
    # What is piped on is as it was written, and so is what is kept.
    plain = "[2J]52;c;ZXZpbA==31m" if screen else orders
    assert out.getvalue() == f"a{plain}\n\nb\t{plain}c\n\n"
    assert answer.text == f"b\t{orders}c\n"
