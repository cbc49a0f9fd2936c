"""The parser that fits a tokenizer and a prompt, fed with the tokenizer's own ids and text."""

from typing import Any

import pytest

from parsing.templates import TEMPLATES, tokenizer
from parsing.wholetext import Said, said
from quintet.parsing import CODER, format_of, opening_of, parser_for
from quintet.tokenization import IncrementalDecoder

ASKED = [{"role": "user", "content": "What is <think>?"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
CALLED = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ANSWERED = [
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "content": "4 <think>", "tool_call_id": "a"},
]


def prompt(name: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    text: str = tokenizer(name).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **kwargs
    )
    return text


def outcome(name: str, prompt: str, text: str, *, skip: bool = False, **options: Any) -> Said:
    """What is heard of a text that the model writes in the tokenizer's ids."""
    made = tokenizer(name)
    parser = parser_for(made, prompt, **{"tools": True, **options})
    decoder = IncrementalDecoder(made, skip_special_tokens=skip)
    events = []
    for token in made.encode(text, add_special_tokens=False):
        events += parser.feed(decoder.push(token), token)
    events += parser.feed(decoder.flush(), -1)
    return said(events + parser.flush())


THOUGHT: Said = [("reasoning", "hm"), ("content", "Yes </think>")]


@pytest.mark.parametrize(
    ("name", "kwargs", "text", "expected"),
    [
        ("qwq", {}, "hm\n</think>\n\nYes </think>", THOUGHT),
        ("r1", {}, "hm</think>Yes </think>", THOUGHT),
        ("v3.1", {"thinking": True}, "hm</think>Yes </think>", THOUGHT),
        ("v3.1", {}, "hm</think>", [("content", "hm</think>")]),
        ("v3", {}, "<think>hm</think>Yes </think>", THOUGHT),
        ("plain", {}, "<think>hm</think>Yes </think>", THOUGHT),
        ("v3", {}, "hm</think>", [("content", "hm</think>")]),
    ],
)
def test_the_end_of_the_prompt_says_whether_the_model_thinks(
    name: str, kwargs: dict[str, Any], text: str, expected: Said
) -> None:
    assert outcome(name, prompt(name, ASKED, **kwargs), text) == expected
    everything = "".join(
        part[-1] for part in outcome(name, prompt(name, ASKED, **kwargs), text, reasoning=False)
    )
    assert everything == text


def test_behind_the_result_of_a_tool_no_thought_is_open() -> None:
    asked = prompt("r1", ASKED + ANSWERED)
    assert not asked.endswith("<think>\n")
    assert outcome("r1", asked, "It is 4.") == [("content", "It is 4.")]
    assert outcome("r1", asked, "<think>\nhm\n</think>\n\nYes </think>") == THOUGHT


@pytest.mark.parametrize("name", ["qwq", "r1", "v3.1"])
def test_a_thought_that_a_turn_has_begun_goes_on(name: str) -> None:
    def opening(content: str, **options: Any) -> str:
        said = [*ASKED, {"role": "assistant", "content": content}]
        text = tokenizer(name).apply_chat_template(said, tokenize=False, **options)
        return opening_of(tokenizer(name), text)

    assert opening("<think>\nFirst, ", continue_final_message=True) == "reasoning"
    assert opening("<think>\nFirst\n</think>\n\nSo ", continue_final_message=True) == "unknown"
    assert opening("So ", continue_final_message=True) == "unknown"
    assert opening("<think> is a tag.") == "unknown"
    assert opening_of(tokenizer("plain"), "<think> and on") == "unknown"
    assert opening_of(tokenizer(name), "\n</think>\n\n") == "content"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if format_of(tokenizer(name))])
def test_calls_are_heard_in_a_models_own_tokens(name: str) -> None:
    written = format_of(tokenizer(name))
    assert written is not None
    text = written.written([("f", '{"a": "naïve </tool_call> 🙂"}'), ("g", "{}")])
    calls = [("call", "f", '{"a": "naïve </tool_call> 🙂"}'), ("call", "g", "{}")]
    asked = prompt(name, ASKED).replace("<think>\n", "")
    assert outcome(name, asked, "So:\n" + text) == [("content", "So:"), *calls]
    assert outcome(name, asked, text, skip=True, parallel=False) == calls[:1]
    assert outcome(name, asked, text, tools=False) == [("content", text)]


def test_a_template_without_calls_has_none() -> None:
    text = '<tool_call>{"name": "f"}</tool_call>'
    assert outcome("plain", "", text) == [("content", text)]
    assert outcome("plain", "", text, written=CODER) == [("call", "f", "{}")]


def test_special_markers_that_no_text_comes_with_are_still_heard() -> None:
    made = tokenizer("qwq")
    parser = parser_for(made, "<think>", tools=True)
    ids = made.get_added_vocab()
    events = parser.feed("hm", 5) + parser.feed("", ids["</think>"])
    events += parser.feed("", ids["<tool_call>"]) + parser.feed('{"name": "f"}', 5)
    events += parser.feed("", ids["</tool_call>"]) + parser.flush()
    assert said(events) == [("reasoning", "hm"), ("call", "f", "{}")]
