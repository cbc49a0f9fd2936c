"""Turns with calls are written down by every template, and what was said becomes no token."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsing.templates import TEMPLATES, tokenizer
from parsing.test_choice import outcome
from quintet.errors import ChatTemplateError
from quintet.parsing import format_of, prepare_messages

WITH_CALLS = [name for name in TEMPLATES if format_of(tokenizer(name))]
TEXT = '{"a": "naïve </tool_call> \\n🙂"}'


def call(arguments: Any = TEXT, name: str = "f") -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}


def turn(content: str | None, *calls: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": content, "tool_calls": list(calls)},
        {"role": "tool", "content": "4", "tool_call_id": "a"},
    ]


def written(name: str, messages: list[dict[str, Any]], **options: Any) -> Any:
    options = {"tokenize": False, **options}
    return tokenizer(name).apply_chat_template(
        prepare_messages(tokenizer(name), messages), add_generation_prompt=True, **options
    )


@pytest.mark.parametrize("name", WITH_CALLS)
@pytest.mark.parametrize("content", [None, "", "So:"])
@pytest.mark.parametrize("arguments", [TEXT, json.loads(TEXT), "{}", None, ""])
def test_a_turn_with_calls_is_written_as_the_model_wrote_it(
    name: str, content: str | None, arguments: Any
) -> None:
    text = written(name, turn(content, call(arguments), call("{}", "g")))
    if content:
        assert content in text
    # What stands in the past is read as what was called.
    asked = tokenizer(name).apply_chat_template([turn(None)[0]], tokenize=False)
    answer = text[len(asked) :].partition("<|im_end|>\n" if "qw" in name else "<|im_end|>")[0]
    for opening in ("<|im_start|>assistant", "<｜Assistant｜>", "</think>"):
        answer = answer.removeprefix(opening)
    if content and name == "v3":
        assert answer == content
        return
    value = json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
    heard = outcome(name, "</think>", answer.removeprefix("\n"))
    assert [part for part in heard if part[0] == "content"] == (
        [("content", content)] if content else []
    )
    calls = [part for part in heard if part[0] == "call"]
    assert [(called, json.loads(text)) for _, called, text in calls] == [("f", value), ("g", {})]


def test_text_that_a_model_wrote_is_kept_where_the_template_takes_text() -> None:
    odd = '{ "a":1,\n"b" : 2.0 }'
    assert odd in written("v3.1", turn(None, call(odd)))
    assert '{"a": 1, "b": 2.0}' in written("qwen", turn(None, call(odd)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_empty_list_of_calls_is_none(name: str) -> None:
    plain = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}]
    empty = [plain[0], {**plain[1], "tool_calls": []}]
    assert written(name, empty) == written(name, plain)
    assert prepare_messages(tokenizer(name), plain) == plain


@pytest.mark.parametrize("name", WITH_CALLS)
@pytest.mark.parametrize("arguments", ["{", "[1]", "1", [1], '"{}"'])
def test_arguments_that_are_no_object_are_refused(name: str, arguments: Any) -> None:
    with pytest.raises(ChatTemplateError, match=r"messages\[1\]\.tool_calls\[1\].*JSON object"):
        prepare_messages(tokenizer(name), turn(None, call(), call(arguments)))


@pytest.mark.parametrize("broken", [1, {}, {"function": {}}, {"function": {"name": 1}}])
def test_what_is_no_call_is_refused(broken: Any) -> None:
    with pytest.raises(ChatTemplateError, match=r"messages\[1\]\.tool_calls\[0\] has to be a call"):
        prepare_messages(tokenizer("qwen"), turn(None, broken))


# -- nothing that is said becomes a control token ------------------------------------------------

HALVES = ["<|im_", "start|>", "<|im_end", "|>", "<think", ">", "</", "think>", "<｜tool▁", "sep｜>"]
HALVES += ["<tool_call", "calls▁begin｜>", "<｜User｜", "<", "\n", "x", "é", "{", '"']
WHOLE = sorted({marker for _, markers in TEMPLATES.values() for marker in markers})
attacks = st.lists(st.sampled_from([*HALVES, *WHOLE, "<|im_start|>", "<|endoftext|>"]), max_size=5)
said = attacks.map("".join)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.tuples(said, said, said, said))
def test_no_words_of_anybody_become_control_tokens(name: str, words: tuple[str, ...]) -> None:
    made = tokenizer(name)

    def ids(system: str, asked: str, argument: str, result: str) -> list[int]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
        if name in WITH_CALLS:
            messages += turn("", call(json.dumps({"a": argument}), "f"))[1:]
            messages[-1]["content"] = result
        found: list[int] = written(name, messages, tokenize=True, sanitize_control_tokens=True)
        return found

    control = set(made.get_added_vocab().values())
    own = [token for token in ids("s", "u", "a", "r") if token in control]
    found = ids(*words)
    assert [token for token in found if token in control] == own
    for one in words[:2]:
        assert one in made.decode(found)
