"""JSON followed while it arrives, beside a reader of the whole."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.parsing.json_value import JsonValue, Unwrapped

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-9, 9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def refuse(name: str) -> Any:
    raise ValueError(name)


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def can_be_completed(text: str) -> bool:
    """Try the ways in which a value that is broken off can go on."""
    opened, inside, escaped = [], False, False
    for letter in text:
        if inside:
            inside, escaped = escaped or letter != '"', not escaped and letter == "\\"
        elif letter == '"':
            inside = True
        elif letter in "{[":
            opened.append("}" if letter == "{" else "]")
        elif letter in "}]" and opened:
            opened.pop()
    ends = ["", '"', "0", '":0', ":0", '"":0', 'n"', '0000"', '000"', '00"', '0"']
    ends += ['n":0', '0000":0', '000":0', '00":0', '0":0', '"a":0']
    ends += [word[start:] for word in ("true", "false", "null") for start in range(1, 5)]
    return any(is_json(text + end + "".join(reversed(opened))) for end in ends)


@settings(max_examples=100, deadline=None)
@given(values, st.booleans(), st.sampled_from([None, 1]), st.integers(0, 30))
def test_a_value_is_complete_at_its_end(value: Any, plain: bool, indent: Any, cut: int) -> None:
    text = json.dumps(value, ensure_ascii=plain, indent=indent)
    one = JsonValue()
    assert one.push(text[:cut]) == len(text[:cut])
    assert one.push(text + " rest", len(text[:cut])) == len(text)
    assert one.complete
    assert not one.broken
    assert one.push("more") == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*'{}[]":,\\u01-+.eE \n\x01', "true", "nul", "é", '"a"', "12"])))
def test_it_breaks_at_the_first_letter_that_no_json_has_there(parts: list[str]) -> None:
    text = "".join(parts)
    one = JsonValue()
    end = one.push(text)
    assert can_be_completed(text[:end]) or not text[:end].strip()
    if one.broken:
        assert not can_be_completed(text[: end + 1])
    elif one.end():
        assert is_json(text[:end])
    letters = JsonValue()
    taken = [letters.push(letter) for letter in text]
    assert sum(taken) == end
    assert (letters.complete, letters.broken) == (one.complete, one.broken) or one.end()


@pytest.mark.parametrize(
    "text", ["NaN", "-Infinity", "[01]", "1.", "+1", "'a'", "{a:1}", "[1,]", "tru "]
)
def test_what_is_no_json_breaks(text: str) -> None:
    one = JsonValue()
    one.push(text + " ")
    assert one.broken or not one.end()


@settings(max_examples=100, deadline=None)
@given(st.text(), st.booleans(), st.lists(st.integers(0, 60), max_size=4))
def test_a_string_is_unwrapped_in_pieces(text: str, plain: bool, cuts: list[int]) -> None:
    inside = json.dumps(text, ensure_ascii=plain)[1:-1]
    edges = sorted([0, *(min(cut, len(inside)) for cut in cuts), len(inside)])
    one = Unwrapped()
    pieces = [one.push(inside[a:b]) for a, b in pairwise(edges)]
    assert "".join(pieces) + one.push("", last=True) == text


def test_half_of_a_pair_is_a_replacement_character() -> None:
    one = Unwrapped()
    assert one.push(r"a\ud83d") + one.push(r"\ude0") == "a"
    assert one.push("0b") == "😀b"
    assert one.push(r"\ud83d\u0041\udc00 end") == "\ufffdA\ufffd end"
    assert one.push(r"\ud83d") == ""
    assert one.push("", last=True) == "\ufffd"
