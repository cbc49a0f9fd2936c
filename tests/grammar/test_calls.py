"""Calls of tools are written as the model's template writes them, with arguments that fit."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from grammar.checking import at_random
from quintet import AutoTokenizer, demo_model, grammar
from quintet.errors import GrammarError
from quintet.grammar import GrammarProcessor, Grammars
from quintet.parsing import (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    HERMES,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Format,
)
from quintet.parsing.choice import parser_for

WEATHER = {
    "name": "get_weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 3}, "unit": {"enum": ["c", "f"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
NOW = {"name": "now"}
TOOLS = [{"type": "function", "function": one} for one in (WEATHER, NOW)]
BERN = ("get_weather", '{"city": "B"}')
FORMATS = {"hermes": HERMES, "v3": DEEPSEEK_V3, "v3.1": DEEPSEEK_V31}
PLAIN: Any = AutoTokenizer.from_pretrained(demo_model())
END = PLAIN.eos_token_id


def with_marks() -> tuple[Any, dict[str, int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo_model())
    marks = [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<｜tool▁calls▁begin｜>"),
        *("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    ]
    # As in released vocabularies they are no special tokens.
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return tokenizer, {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}


MARKED, MARKS = with_marks()
GRAMMARS = {True: Grammars(MARKED), False: Grammars(PLAIN)}


def compiled(form: Format, marked: bool, *arguments: Any, **options: Any) -> GrammarProcessor:
    used = replace(form, tokens=MARKS if marked else {})
    constraint = grammar.tool_calls(TOOLS, used, *arguments, **options)
    return GRAMMARS[marked].compile(constraint)


def accepts(processor: GrammarProcessor, marked: bool, text: str | list[int]) -> bool:
    tokenizer = MARKED if marked else PLAIN
    ids = tokenizer.encode(text) if isinstance(text, str) else text
    V = len(tokenizer)
    processor = processor.copy()
    processor(torch.tensor([[1]]), torch.zeros(1, V))
    return not bool(processor(torch.tensor([[1, *ids]]), torch.zeros(1, V))[0, END].isneginf())


each = pytest.mark.parametrize("name", FORMATS)
marked_or_not = pytest.mark.parametrize("marked", [True, False], ids=["marked", "plain"])


@each
@marked_or_not
def test_calls_are_required(name: str, marked: bool) -> None:
    form = FORMATS[name]
    processor = compiled(form, marked, "required")
    one, two = form.written([BERN]), form.written([BERN, ("now", "{}")])
    assert accepts(processor, marked, one)
    assert accepts(processor, marked, two)
    for other in ("", "hello", f"hello {one}", one[:-1], form.written([("then", "{}")])):
        assert not accepts(processor, marked, other)
    for arguments in ("{}", '{"city": 1}', '{"city": "B", "x": 1}'):
        assert not accepts(processor, marked, form.written([("get_weather", arguments)]))
    assert not accepts(processor, marked, form.written([("now", '{"x": 1}')]))


@each
@marked_or_not
def test_one_call_is_one(name: str, marked: bool) -> None:
    form = FORMATS[name]
    processor = compiled(form, marked, "required", parallel=False)
    assert accepts(processor, marked, form.written([BERN]))
    assert not accepts(processor, marked, form.written([BERN, BERN]))


@each
@marked_or_not
def test_a_named_tool_is_the_only_one(name: str, marked: bool) -> None:
    form = FORMATS[name]
    processor = compiled(form, marked, "now")
    assert accepts(processor, marked, form.written([("now", "{}"), ("now", "{}")]))
    assert not accepts(processor, marked, form.written([BERN]))


@each
@marked_or_not
def test_text_is_free_until_a_call_begins(name: str, marked: bool) -> None:
    form = FORMATS[name]
    processor = compiled(form, marked, "auto")
    one = form.written([BERN])
    for text in ("", "hello\n\nyou < me", one, f"hello {one}", form.written([BERN, BERN])):
        assert accepts(processor, marked, text)
    for text in (form.trigger, one[:-3], form.written([("then", "{}")])):
        assert not accepts(processor, marked, text)
    assert accepts(processor, marked, "<think>hm</think>" + one)


@each
@marked_or_not
def test_an_answer_may_have_a_form_of_its_own(name: str, marked: bool) -> None:
    form = FORMATS[name]
    processor = compiled(form, marked, "auto", answer=grammar.json_object())
    one = form.written([BERN])
    for text in (one, '{"a": 1}', "{}"):
        assert accepts(processor, marked, text)
    for text in ("", "hello", f"{{}}{one}", one[:-3], form.written([("then", "{}")])):
        assert not accepts(processor, marked, text)
    calls = compiled(form, marked, "required", answer=grammar.json_object())
    assert not accepts(calls, marked, "{}")


def test_what_spells_a_mark_is_text() -> None:
    spelt = [token for letter in "<tool_call>" for token in MARKED.encode(letter)]
    assert accepts(compiled(HERMES, True, "auto"), True, spelt)
    assert not accepts(compiled(HERMES, True, "required"), True, spelt)
    # Nor does a mark stand in a string of the arguments.
    inside = MARKED.encode('<tool_call>\n{"name": "get_weather", "arguments": {"city": "')
    assert not accepts(compiled(HERMES, True), True, [*inside, MARKS["<think>"]])


@each
@pytest.mark.parametrize("choice", ["auto", "required", "get_weather"])
def test_a_parser_understands_what_was_written(name: str, choice: str) -> None:
    form = replace(FORMATS[name], tokens=MARKS)
    for seed in range(4):
        processor = compiled(form, True, choice)
        V, ends = len(MARKED), MARKED.eos_token_id
        written = at_random(processor, V, ends, seed)
        parser = parser_for(MARKED, "", tools=True, reasoning=False, written=form)
        events = [
            event
            for token in written
            if token != ends
            for event in parser.feed(MARKED.decode([token]), token)
        ]
        events += parser.flush()
        calls = [event for event in events if isinstance(event, CallStart)]
        if choice == "auto":
            continue
        assert calls
        if written[-1] == ends:
            assert not [event for event in events if isinstance(event, Content)]
            assert len(calls) == sum(isinstance(event, CallEnd) for event in events)
        for index, call in enumerate(calls[:-1]):
            pieces = [x for x in events if isinstance(x, CallArguments) and x.index == index]
            arguments = json.loads("".join(piece.text for piece in pieces))
            assert {*arguments} <= ({"city", "unit"} if call.name == "get_weather" else set())


def test_a_tool_that_is_not_strict_has_what_arguments_can_be_bound() -> None:
    odd = {"name": "odd", "parameters": {"type": "object", "not": {}}}
    processor = GRAMMARS[False].compile(
        grammar.tool_calls([{"type": "function", "function": odd}], HERMES)
    )
    assert accepts(processor, False, HERMES.written([("odd", '{"any": [1]}')]))
    assert not accepts(processor, False, HERMES.written([("odd", "[1]")]))


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ([], "required", "0 tools"),
        ([*TOOLS, TOOLS[0]], "required", "3 tools, of which 2"),
        ([{"type": "function", "function": {"name": f"t{n}"}} for n in range(129)], "auto", "129"),
        (TOOLS, "then", "'then'"),
        ([{"name": f"t{n}", "description": "x" * 60_000} for n in range(5)], "auto", "262,144"),
        ([{"type": "function", "function": {}}], "required", "no function with a name"),
        ([{"type": "function"}], "required", "no function with a name"),
        (
            [{"name": "a", "strict": True, "parameters": {"not": {}}}],
            "auto",
            "'a' is strict.*'not'",
        ),
        (
            [{"name": "a", "strict": True, "parameters": {"type": "x"}}],
            "auto",
            "'a' is strict.*'#'",
        ),
    ],
)
def test_what_is_wrong_is_said(tools: Any, choice: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=f"(?s){reason}"):
        grammar.tool_calls(tools, HERMES, choice)
