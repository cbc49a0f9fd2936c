"""What a model writes told apart, however the text is cut, and as a slow reading of the whole."""

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsing.wholetext import Said, Whole, merged, said
from quintet.parsing import (
    CODER,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    HERMES,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Format,
    Reasoning,
)
from quintet.parsing.parser import Opening, StreamParser

FORMATS = {"hermes": HERMES, "v3": DEEPSEEK_V3, "v3.1": DEEPSEEK_V31, "coder": CODER}
MARKERS = ["<think>", "</think>", "<｜tool▁sep｜>"]
MARKERS += sorted({m for f in FORMATS.values() for m in (*f.opens, *f.closes, *f.invents)})
TOKENS = {marker: 1000 + index for index, marker in enumerate(MARKERS)}
# How the reference reads a marker that was a token.
MARKS = {marker: chr(0xE000 + index) for index, marker in enumerate(MARKERS)}

Pieces = list[tuple[str, int]]


def read(
    pieces: Pieces,
    written: Format | None,
    opening: Opening = "unknown",
    *,
    tokens: bool = False,
    parallel: bool = True,
) -> list[Event]:
    parser = StreamParser(TOKENS if tokens else {}, written, opening, parallel)
    events = [event for text, token in pieces for event in parser.feed(text, token)]
    return merged(events + parser.flush())


def text_of(text: str) -> Pieces:
    return [(text, 0)]


def letters(text: str) -> Pieces:
    return [(letter, 0) for letter in text]


def cut(text: str, cuts: list[int]) -> Pieces:
    edges = [0, *sorted(min(place, len(text)) for place in cuts), len(text)]
    return [(text[a:b], 0) for a, b in pairwise(edges)]


def outcome(text: str, written: Format | None, opening: Opening = "unknown") -> Said:
    events = read(text_of(text), written, opening)
    assert read(letters(text), written, opening) == events
    return said(events)


# -- thoughts -----------------------------------------------------------------------------------

THOUGHTS: list[tuple[str, Opening, tuple[str, str]]] = [
    ("Hello there", "unknown", ("", "Hello there")),
    ("  Hello", "unknown", ("", "  Hello")),
    ("<think>\nhm\n</think>\n\nHello", "unknown", ("hm", "Hello")),
    ("\n<think>hm</think>Hello", "unknown", ("hm", "Hello")),
    ("hm, yes\n</think>\n\nHello", "reasoning", ("hm, yes", "Hello")),
    ("hm, no end", "reasoning", ("hm, no end", "")),
    ("a </thin b</think>c", "reasoning", ("a </thin b", "c")),
    ("</think>Hello", "reasoning", ("", "Hello")),
    ("Hello <think>no</think>", "unknown", ("", "Hello <think>no</think>")),
    ("<thing>", "unknown", ("", "<thing>")),
    ("<thi", "unknown", ("", "<thi")),
    ("", "unknown", ("", "")),
    ("a</think>b</think>c", "reasoning", ("a", "b</think>c")),
    ("One.\n\nTwo.\n</think>\n\nA\n\nB", "reasoning", ("One.\n\nTwo.", "A\n\nB")),
    ("a </think> b", "content", ("", "a </think> b")),
    ("<think>a</think>b", "content", ("", "<think>a</think>b")),
]


@pytest.mark.parametrize(("text", "opening", "expected"), THOUGHTS)
@pytest.mark.parametrize("written", [None, HERMES, DEEPSEEK_V3], ids=["none", "hermes", "v3"])
def test_a_thought_is_told_from_the_answer(
    text: str, opening: Opening, expected: tuple[str, str], written: Format | None
) -> None:
    kinds = ("reasoning", "content")
    found = [(kind, part) for kind, part in zip(kinds, expected, strict=True) if part]
    assert outcome(text, written, opening) == found


def test_what_is_certain_is_not_held_back() -> None:
    parser = StreamParser({}, None, "unknown", True)
    assert parser.feed("Hel", 0) == [Content("Hel")]
    assert parser.feed("lo <", 0) == [Content("lo <")]
    parser = StreamParser({}, None, "reasoning", True)
    assert parser.feed("hm <", 0) == [Reasoning("hm")]
    assert parser.feed("b", 0) == [Reasoning(" <b")]


def test_arguments_come_as_they_are_written() -> None:
    parser = StreamParser({}, HERMES, "content", True)
    assert parser.feed('<tool_call>\n{"name": "look", "arguments"', 0) == []
    assert parser.feed(": ", 0) == []
    assert parser.feed('{"path": "test/{a', 0) == [
        CallStart(0, "look"),
        CallArguments(0, '{"path": "test/{a'),
    ]
    assert parser.feed("", 0) == []
    assert parser.feed(',b}", "n": 1', 0) == [CallArguments(0, ',b}", "n": 1')]
    assert parser.feed("}", 0) == [CallArguments(0, "}")]
    assert parser.feed("}", 0) == [CallEnd(0)]
    assert parser.feed("\n</tool_call>", 0) == parser.flush() == []


# -- calls --------------------------------------------------------------------------------------

TOOL = '<tool_call>\n{"name": "f", "arguments": '
END = "}\n</tool_call>"
CALL = ("call", "f", '{"a": 1}')
SECTION, EACH, SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
EACH_END, SECTION_END = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"

HERMES_CASES: dict[str, tuple[str, Said]] = {
    "alone": (TOOL + '{"a": 1}' + END, [CALL]),
    "behind text": ("Yes.\n" + TOOL + '{"a": 1}' + END, [("content", "Yes."), CALL]),
    "the beginning of a marker": ("a <tool", [("content", "a <tool")]),
    "arguments first": (
        '<tool_call>{"arguments": {"name": "g"}, "name": "f"}</tool_call>',
        [("call", "f", '{"name": "g"}')],
    ),
    "arguments in a string": (TOOL + '"{\\"a\\": 1}"' + END, [CALL]),
    "arguments in two strings": (
        TOOL + '"\\"{}\\""' + END,
        [("content", TOOL + '"\\"{}\\""' + END)],
    ),
    "escapes in a string": (
        TOOL + r'"{\"a\": \"\\u00e9\\n\ud83d\ude00\"}"' + END,
        [("call", "f", '{"a": "\\u00e9\\n😀"}')],
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', [("call", "f", "{}")]),
    "null": (TOOL + "null" + END, [("call", "f", "{}")]),
    "an empty string": (TOOL + '""' + END, [("call", "f", "{}")]),
    "ends inside of strings": (
        TOOL + '{"a": "}}</tool_call> \\" ```"}' + END,
        [("call", "f", '{"a": "}}</tool_call> \\" ```"}')],
    ),
    "text between and behind": (
        f"{TOOL}{{}}{END} and \n{TOOL}{{}}{END}\nbye",
        [("call", "f", "{}"), ("content", "and"), ("call", "f", "{}"), ("content", "bye")],
    ),
    "space between and behind": (
        f"{TOOL}{{}}{END} \n\n {TOOL}{{}}{END}\n \n",
        [("call", "f", "{}"), ("call", "f", "{}")],
    ),
    "two objects": (
        '<tool_call>{"name": "f"}\n{"name": "g"}</tool_call>',
        [("call", "f", "{}"), ("call", "g", "{}")],
    ),
    "broken": (f'a {TOOL}{{"a": 1,}}{END} b', [("content", f'a {TOOL}{{"a": 1,}}{END} b')]),
    "no object": (f"{TOOL}[1]{END}", [("content", f"{TOOL}[1]{END}")]),
    "a name that is none": (
        '<tool_call>{"name": 1}</tool_call>',
        [("content", '<tool_call>{"name": 1}</tool_call>')],
    ),
    "broken off": (TOOL + '{"a": 1', [("content", TOOL + '{"a": 1')]),
    "no closing tag": (TOOL + '{"a": 1}}', [CALL]),
    "no closing tag, and another": (
        TOOL + '{"a": 1}}\n' + TOOL + '{"a": 1}' + END,
        [CALL, CALL],
    ),
    "line ends of two": (TOOL.replace("\n", "\r\n") + '{"a": 1}}\r\n</tool_call>\r\n', [CALL]),
    "in a fence": ('<tool_call>\n```json\n{"name": "f"}\n```\n</tool_call>', [("call", "f", "{}")]),
    "results": (
        TOOL + '{"a": 1}' + END + "\n<tool_response>\nit is 4\n</tool_response> so",
        [CALL],
    ),
}


@pytest.mark.parametrize(("text", "expected"), HERMES_CASES.values(), ids=HERMES_CASES)
def test_calls_between_tags(text: str, expected: Said) -> None:
    assert outcome(text, HERMES) == expected


DEEPSEEK_CASES: dict[str, tuple[str, Said]] = {
    "fenced": (DEEPSEEK_V3.written([("f", '{"a": 1}')]), [CALL]),
    "two": (
        "So:" + DEEPSEEK_V3.written([("f", '{"a": 1}'), ("g", "{}")]),
        [("content", "So:"), CALL, ("call", "g", "{}")],
    ),
    "without a fence": (
        f'{SECTION}{EACH}function{SEP}f\n{{"a": 1}}\n{EACH_END}{SECTION_END}',
        [CALL],
    ),
    "line ends of two, space behind the name": (
        f'{SECTION}{EACH}function{SEP}f \r\n```json\r\n{{"a": 1}}\r\n```{EACH_END}{SECTION_END}',
        [CALL],
    ),
    "fences inside of strings": (
        DEEPSEEK_V3.written([("f", '{"a": "```\\n}"}')]),
        [("call", "f", '{"a": "```\\n}"}')],
    ),
    "no ends": (f'{EACH}function{SEP}f\n```json\n{{"a": 1}}', [CALL]),
    "the name in front": (
        DEEPSEEK_V31.written([("f", '{"a": 1}'), ("g", "{}")]),
        [CALL, ("call", "g", "{}")],
    ),
    "a tool named function": (
        f"{SECTION}{EACH}function{SEP}{{}}{EACH_END}",
        [("call", "function", "{}")],
    ),
    "nothing but a name": (f"{SECTION}{EACH}function{SEP}f{EACH_END}", [("call", "f", "{}")]),
    "an empty fence": (
        f"{SECTION}{EACH}function{SEP}f\n```json\n```{EACH_END}",
        [("call", "f", "{}")],
    ),
    "null": (f"{SECTION}{EACH}f{SEP}null{EACH_END}", [("call", "f", "{}")]),
    "a string": (f'{SECTION}{EACH}f{SEP}"{{\\"a\\": 1}}"{EACH_END}', [CALL]),
    "broken off in the name": (f"{EACH}function{SEP}f", [("content", f"{EACH}function{SEP}f")]),
    "no name": (f"{EACH}{SEP}{{}}{EACH_END}", [("content", f"{EACH}{SEP}{{}}{EACH_END}")]),
    "no separator": (f"{EACH}f {{}}{EACH_END}", [("content", f"{EACH}f {{}}{EACH_END}")]),
    "a section without calls": (f"a {SECTION} b", [("content", f"a {SECTION} b")]),
    "closing markers without calls": (f"a{EACH_END}b", [("content", f"a{EACH_END}b")]),
    "results": (
        DEEPSEEK_V3.written([("f", '{"a": 1}')]) + "<｜tool▁outputs▁begin｜>4",
        [CALL],
    ),
}


@pytest.mark.parametrize(("text", "expected"), DEEPSEEK_CASES.values(), ids=DEEPSEEK_CASES)
@pytest.mark.parametrize("written", [DEEPSEEK_V3, DEEPSEEK_V31], ids=["v3", "v3.1"])
def test_calls_behind_headers(text: str, expected: Said, written: Format) -> None:
    assert outcome(text, written) == expected


CODER_CASES: dict[str, tuple[str, Said]] = {
    "tools": ('<tools>\n{"name": "f", "arguments": {"a": 1}}\n</tools>', [CALL]),
    "bare": ('\n{"name": "f", "arguments": {"a": 1}}', [CALL]),
    "bare in a fence": ('```json\n{"name": "f", "arguments": {"a": 1}}\n```', [CALL]),
    "an object": ('{"name": "Ann", "age": 7}', [("content", '{"name": "Ann", "age": 7}')]),
    "code": ("```python\nprint()\n```", [("content", "```python\nprint()\n```")]),
}


@pytest.mark.parametrize(("text", "expected"), CODER_CASES.values(), ids=CODER_CASES)
def test_calls_without_tags(text: str, expected: Said) -> None:
    assert outcome(text, CODER) == expected


@pytest.mark.parametrize("written", FORMATS.values(), ids=FORMATS)
def test_a_call_inside_of_a_thought_is_part_of_it(written: Format) -> None:
    call = written.written([("f", '{"a": 1}')])
    assert outcome(f"{call}</think>\n\n{call}", written, "reasoning") == [
        ("reasoning", call),
        CALL,
    ]


@pytest.mark.parametrize("written", FORMATS.values(), ids=FORMATS)
def test_after_one_call_or_an_invented_result_nothing_is_wanted(written: Format) -> None:
    two = written.written([("f", '{"a": 1}'), ("g", "{}")]) + "more"
    parser = StreamParser({}, written, "unknown", False)
    events = []
    for letter in two:
        assert not parser.done or parser.feed(letter, 0) == []
        events += parser.feed(letter, 0)
    assert parser.done
    assert said(events + parser.flush()) == [CALL]

    parser = StreamParser({}, written, "unknown", True)
    assert parser.feed(f"a {written.invents[0]} b", 0) == [Content("a")]
    assert parser.done
    assert parser.feed("c", 0) == parser.flush() == []


def test_a_broken_call_is_said_in_its_own_words_even_where_it_began_well() -> None:
    text = TOOL + '{"a": [1, 2' + END
    parser = StreamParser({}, HERMES, "unknown", True)
    events = merged(parser.feed(text, 0) + parser.flush())
    assert events == [CallStart(0, "f"), CallArguments(0, '{"a": [1, 2'), Content(text)]


# -- markers that are tokens --------------------------------------------------------------------


def tokens_of(parts: list[str]) -> Pieces:
    return [(part, TOKENS.get(part, 0)) for part in parts]


def test_text_that_spells_a_marker_is_text_where_the_marker_is_a_token() -> None:
    spelled = TOOL + "{}" + END
    events = read(letters(spelled), HERMES, tokens=True)
    assert said(events) == [("content", spelled)]
    parts = ["<tool_call>", '\n{"name": "f", "arguments": {"a": "', "</tool_call>", '"}}', "\n"]
    events = read(tokens_of([*parts, "</tool_call>"]), HERMES, tokens=True)
    assert said(events) == [("call", "f", '{"a": "</tool_call>"}')]
    thought = [("a </think> b", 0), ("</think>", TOKENS["</think>"]), ("c", 0)]
    events = read(thought, None, "reasoning", tokens=True)
    assert events == [Reasoning("a </think> b"), Content("c")]


@pytest.mark.parametrize(
    "late",
    [["a<tool_call>", ""], ["a<tool_", "call>"], ["a", "<tool_call>"], ["a", ""]],
    ids=["at once", "in part", "all of it", "never"],
)
def test_the_text_of_a_marker_may_be_late(late: list[str]) -> None:
    first, rest = late
    pieces = [(first, TOKENS["<tool_call>"]), (rest + '{"name": ', 0), ('"f"}', 0)]
    assert said(read(pieces, HERMES, tokens=True)) == [("content", "a"), ("call", "f", "{}")]


@pytest.mark.parametrize("after", [["<", "/t", "b"], ["</tb"], ["<", "/", "tb"]])
def test_text_that_only_began_like_a_late_marker_is_not_lost(after: list[str]) -> None:
    pieces = [("a", TOKENS["</think>"]), *((text, 0) for text in after)]
    heard = [("reasoning", "a"), ("content", "</tb")]
    assert said(read(pieces, None, "reasoning", tokens=True)) == heard
    assert said(read(pieces[:2], None, "reasoning", tokens=True)) == [
        heard[0],
        ("content", after[0]),
    ]


@pytest.mark.parametrize("late", [SECTION + EACH, "", SECTION], ids=["late", "never", "one"])
def test_several_markers_may_be_late(late: str) -> None:
    pieces = [("", TOKENS[SECTION]), ("", TOKENS[EACH]), (late + "f", 0), ("", TOKENS[SEP])]
    late = SEP if late == SECTION + EACH else ""
    pieces += [(late + '{"a": ', 0), ("1}", 0), ("", TOKENS[EACH_END])]
    assert said(read(pieces, DEEPSEEK_V31, tokens=True)) == [CALL]


# -- any text, cut anywhere ---------------------------------------------------------------------

WORDS = ["function", "name", "json", "null", "a", "é😀", " ", "\n", "\r\n", "`", "```", "```json\n"]
SIGNS = [
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    "\\",
    "\\u",
    "d83d",
    "1",
    "-",
    "e",
    ".",
    "true",
    "<",
    ">",
]
PIECES = ['"name": "f"', '"arguments": ', '{"a": 1}', '"{\\"a\\": 1}"', '{"name": "f", ']
soup = st.lists(
    st.sampled_from([*WORDS, *SIGNS, *PIECES, *MARKERS, EACH + "function" + SEP, TOOL, END]),
    max_size=24,
)
formats = st.sampled_from([None, *FORMATS.values()])
openings = st.sampled_from(["unknown", "reasoning", "content"])
objects = st.dictionaries(
    st.text(max_size=3),
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 99) | st.text(max_size=4) | st.floats(-1, 1),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=4,
    ),
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(soup, formats, openings, st.lists(st.integers(0, 200), max_size=8), st.booleans())
def test_it_does_not_matter_where_a_text_is_cut(
    parts: list[str], written: Format | None, opening: Opening, cuts: list[int], parallel: bool
) -> None:
    text = "".join(parts)
    whole = read(text_of(text), written, opening, parallel=parallel)
    assert read(cut(text, cuts), written, opening, parallel=parallel) == whole
    assert read(letters(text), written, opening, parallel=parallel) == whole
    for kind, *call in said(whole):
        if kind == "call":
            assert isinstance(json.loads(call[1]), dict)


@settings(max_examples=100, deadline=None)
@given(soup, formats, openings, st.data())
def test_it_does_not_matter_where_text_between_tokens_is_cut(
    parts: list[str], written: Format | None, opening: Opening, data: Any
) -> None:
    pieces = [(part, TOKENS.get(part, 0)) for part in parts]
    whole = read(pieces, written, opening, tokens=True)
    cuts = st.lists(st.integers(0, 12), max_size=2)
    finer = [
        piece
        for part, token in pieces
        for piece in ([(part, token)] if token else cut(part, data.draw(cuts)))
    ]
    assert read(finer, written, opening, tokens=True) == whole


@st.composite
def answers(draw: st.DrawFn) -> tuple[Format, list[str]]:
    """Text and calls in turn; some calls are odd, some are broken."""
    written = draw(st.sampled_from(list(FORMATS.values())))
    parts: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        parts.append(draw(st.sampled_from(["", " ", "\n", "Hi.\n", "a{b}", "`", "<tool", "x "])))
        value = json.dumps(draw(objects), ensure_ascii=draw(st.booleans()))
        if draw(st.booleans()):
            value = json.dumps(value)
        value = draw(
            st.sampled_from([value, value, value, "null", '""', "[1]", "{,}", '{"a"', "1e"])
        )
        name = draw(st.sampled_from(["f", "g_2", "no such.tool", ""]))
        call = written.written([(name, value)])
        for old, new in draw(
            st.lists(
                st.sampled_from(
                    [
                        ("\n", "\r\n"),
                        ("\n", ""),
                        ("```json", ""),
                        ("```", ""),
                        (": ", ":"),
                        ("}", ""),
                    ]
                    + [(closer, "") for closer in written.closes]
                    + [(written.begin, "")] * bool(written.begin)
                ),
                max_size=2,
            )
        ):
            call = call.replace(old, new)
        parts.append(call)
    parts.append(draw(st.sampled_from(["", "\n", "Bye.", " so", "</think>"])))
    return written, parts


@settings(max_examples=200, deadline=None)
@given(answers(), openings, st.booleans(), st.booleans())
def test_the_events_say_what_a_reading_of_the_whole_text_says(
    answer: tuple[Format, list[str]], opening: Opening, parallel: bool, tokens: bool
) -> None:
    written, parts = answer
    text = "".join(parts)
    if tokens:
        pieces: list[str] = [""]
        whole = text
        for marker, mark in MARKS.items():
            whole = whole.replace(marker, mark)
        back = {mark: marker for marker, mark in MARKS.items()}
        pieces = [back.get(letter, letter) for letter in whole]
        events = read(tokens_of(pieces), written, opening, tokens=True, parallel=parallel)
        reference = Whole(written, MARKS, parallel).read(whole, opening)
    else:
        events = read(text_of(text), written, opening, parallel=parallel)
        reference = Whole(written, {}, parallel).read(text, opening)
    assert said(events) == reference


def test_a_long_answer_takes_time_in_proportion() -> None:
    """Neither a long argument nor a long wait for an end is read again."""

    def seconds(length: int) -> float:
        best = 9.0
        for _ in range(3):
            parser = StreamParser({}, HERMES, "unknown", True)
            parser.feed(TOOL + '{"a": "', 0)
            start = time.process_time()
            for _ in range(length):
                parser.feed("word ", 0)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(8000) < 6 * seconds(2000) + 0.05
