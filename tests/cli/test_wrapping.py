"""Answers in the lines of a terminal."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.cli.wrapping import Wrapped

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=30), min_size=1, max_size=40)


def screen(written: str, columns: int) -> list[str]:
    """Return the lines that a terminal shows; like a real one, it is between two at its edge."""
    lines, column = [[" "] * columns], 0
    written = written.replace("\x1b[K", "\0")
    for character in written:
        if character == "\n":
            lines.append([" "] * columns)
            column = 0
        elif character == "\b":
            column = min(column, columns - 1) - 1
        elif character == "\0":
            lines[-1][column:] = [" "] * (columns - column)
        else:
            if column == columns:
                lines.append([" "] * columns)
                column = 0
            lines[-1][column] = character
            column += 1
    return ["".join(line).rstrip() for line in lines]


def shown(pieces: list[str], columns: int | None) -> str:
    out = io.StringIO()
    page = Wrapped(out, lambda: columns)
    for piece in pieces:
        page.write(piece)
    return out.getvalue()


@given(words=WORDS, columns=st.integers(12, 60), cuts=st.lists(st.integers(1, 9), min_size=1))
def test_no_word_is_torn_however_the_text_arrives(
    words: list[str], columns: int, cuts: list[int]
) -> None:
    text, pieces = " ".join(words), []
    rest = text
    for cut in cuts * len(text):
        pieces.append(rest[:cut])
        rest = rest[cut:]
    lines = screen(shown(pieces, columns), columns)
    assert "".join(lines).replace(" ", "") == "".join(words)
    if max(map(len, words)) < columns:
        assert [word for line in lines for word in line.split()] == words
        assert max(map(len, lines)) < columns


def test_a_line_is_filled_before_the_next_begins() -> None:
    text = "one two three four five six"
    assert screen(shown([text], 15), 15) == ["one two three", "four five six"]
    assert screen(shown([f"{text}\n\n- {text}"], 15), 15) == [
        "one two three",
        "four five six",
        "",
        "- one two",
        "three four",
        "five six",
    ]


@pytest.mark.parametrize("columns", [None, 4])
def test_where_there_are_no_lines_the_text_is_as_it_is(columns: int | None) -> None:
    text = "one two three four five six\nseven"
    assert shown(list(text), columns) == text


def test_programs_between_fences_are_as_they_are() -> None:
    code = "```python\nprint('a rather long line of a program, to be copied')\n```\n"
    assert shown(list(code), 20) == code
    after = shown([*code, "one two three four five"], 20).removeprefix(code)
    assert screen(after, 20) == ["one two three four", "five"]


def test_characters_of_two_cells_break_anywhere() -> None:
    out = shown(list("你好世界你好世界"), 10)
    assert out.split("\n") == ["你好世界", "你好世界"]
