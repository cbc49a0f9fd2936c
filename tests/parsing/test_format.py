"""How calls are written is read off the template."""

import json
from dataclasses import replace

import pytest

from parsing.templates import TEMPLATES, tokenizer
from quintet.parsing import DEEPSEEK_V3, DEEPSEEK_V31, HERMES, Format, format_of

EXPECTED = {
    "plain": None,
    "qwen": HERMES,
    "qwen, text": HERMES,
    "qwq": HERMES,
    "v3": DEEPSEEK_V3,
    "r1": replace(DEEPSEEK_V3, text_before=True),
    "v3.1": DEEPSEEK_V31,
}


def found(name: str) -> Format:
    written = format_of(tokenizer(name))
    assert written is not None
    return written


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_tells_its_format(name: str) -> None:
    written = format_of(tokenizer(name))
    expected = EXPECTED[name]
    assert (written and replace(written, tokens={})) == (expected and replace(expected, tokens={}))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if EXPECTED[name]])
def test_what_a_format_writes_stands_in_the_templates_text(name: str) -> None:
    written = found(name)
    calls = [("add", '{"a": 1}'), ("find", '{"b": "c"}')]
    messages = [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "function": {
                        "name": call,
                        "arguments": text if written.arguments == "text" else json.loads(text),
                    },
                }
                for call, text in calls
            ],
        },
    ]
    text = tokenizer(name).apply_chat_template(messages, tokenize=False)
    assert written.written(calls) in text


@pytest.mark.parametrize("name", [name for name in TEMPLATES if EXPECTED[name]])
def test_parts_are_cut_at_markers_that_are_tokens(name: str) -> None:
    written, vocabulary = found(name), tokenizer(name).get_added_vocab()
    for part in (written.begin + written.before_name, written.after_arguments + written.end):
        pieces = written.pieces(part)
        spelled = [
            tokenizer(name).convert_ids_to_tokens(p) if isinstance(p, int) else p for p in pieces
        ]
        assert "".join(map(str, spelled)) == part
        for piece in pieces:
            assert isinstance(piece, int) or not any(token in piece for token in vocabulary)
    assert written.pieces("") == []
    start = written.pieces(written.begin + written.before_name)[0]
    assert start == written.tokens.get(written.trigger, start)


def test_a_template_that_only_explains_calls_tells_its_format() -> None:
    made = tokenizer("plain")
    source = (
        "{{ tools }} write <tool_call> and JSON{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    explained = made.get_chat_template() + source
    one = tokenizer("qwen, text")
    try:
        one.chat_template = explained
        assert format_of(one) == HERMES
        one.chat_template = "{{ messages[99].content.nothing }}"
        assert format_of(one) is None
        one.chat_template = None
        assert format_of(one) is None
    finally:
        one.chat_template = TEMPLATES["qwen, text"][0]
