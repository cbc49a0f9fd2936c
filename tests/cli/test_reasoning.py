"""Reasoning told apart from the answer, however the text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.cli.reasoning import ReasoningSplitter


def split(pieces: list[str], prompt: str = "") -> tuple[str, str]:
    splitter = ReasoningSplitter(prompt)
    texts = {"reasoning": "", "answer": ""}
    for piece in pieces:
        for kind, text in splitter.push(piece):
            texts[kind] += text
    for kind, text in splitter.flush():
        texts[kind] += text
    return texts["reasoning"], texts["answer"]


CASES = [
    ("Hello there", "", ("", "Hello there")),
    ("  Hello", "", ("", "  Hello")),
    ("<think>\nhm\n</think>\n\nHello", "", ("hm", "Hello")),
    ("\n<think>hm</think>Hello", "", ("hm", "Hello")),
    ("hm, yes\n</think>\n\nHello", "<|Assistant|><think>\n", ("hm, yes", "Hello")),
    ("hm, no end", "<think>", ("hm, no end", "")),
    ("a </thin b</think>c", "<think>", ("a </thin b", "c")),
    ("</think>Hello", "<think>\n", ("", "Hello")),
    ("Hello <think>no</think>", "", ("", "Hello <think>no</think>")),
    ("<thing>", "", ("", "<thing>")),
    ("<thi", "", ("", "<thi")),
    ("", "", ("", "")),
    ("a</think>b</think>c", "<think>", ("a", "b</think>c")),
    ("One.\n\nTwo.\n</think>\n\nA\n\nB", "<think>", ("One.\n\nTwo.", "A\n\nB")),
]


@pytest.mark.parametrize(("text", "prompt", "expected"), CASES)
def test_a_text_in_one_piece_and_letter_by_letter(
    text: str, prompt: str, expected: tuple[str, str]
) -> None:
    assert split([text], prompt) == expected
    assert split(list(text), prompt) == expected


@given(st.sampled_from(CASES), st.lists(st.integers(0, 40), max_size=6))
def test_it_does_not_matter_where_a_text_is_cut(
    case: tuple[str, str, tuple[str, str]], cuts: list[int]
) -> None:
    text, prompt, expected = case
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert split(pieces, prompt) == expected


def test_what_is_certain_is_not_held_back() -> None:
    splitter = ReasoningSplitter()
    assert splitter.push("Hel") == [("answer", "Hel")]
    assert splitter.push("lo <") == [("answer", "lo <")]
    splitter = ReasoningSplitter("<think>")
    assert splitter.push("hm <") == [("reasoning", "hm")]
    assert splitter.push("b") == [("reasoning", " <b")]
