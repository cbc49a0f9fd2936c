"""Bodies of `/v1/responses`: what they come to, what is refused, and what is told to be idle."""

from typing import Any

import pytest

from quintet.server.failures import ApiError
from quintet.server.protocol.common import parse
from quintet.server.protocol.responses import ResponsesRequest
from quintet.server.questions import Conversation
from quintet.server.settings import Settings


def read(**fields: Any) -> tuple[ResponsesRequest, list[str]]:
    body, warnings = parse(ResponsesRequest, {"model": "m", "input": "Hi", **fields}, strict=False)
    return body, warnings + body.warnings()


def messages(*items: Any, **fields: Any) -> list[Any]:
    prompt = read(input=list(items), **fields)[0].ask(Settings(), 100, "").prompt
    assert isinstance(prompt, Conversation)
    return [dict(message) for message in prompt.messages]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_a_text_is_what_the_user_says() -> None:
    assert read()[0].ask(Settings(), 100, "").prompt.messages == (user("Hi"),)  # type: ignore[union-attr]


def test_instructions_come_first() -> None:
    assert messages(user("Hi"), instructions="Be short.") == [
        {"role": "system", "content": "Be short."},
        user("Hi"),
    ]


def test_what_an_assistant_did_in_a_row_is_one_message() -> None:
    thought = {"type": "reasoning", "id": "r", "summary": [], "content": [_part("reasoning_text")]}
    said = {"type": "message", "role": "assistant", "content": [_part("output_text")]}
    result = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
    assert messages(user("Hi"), thought, said, CALL, result, user("so?")) == [
        user("Hi"),
        {
            "role": "assistant",
            "content": "output_text",
            "reasoning_content": "reasoning_text",
            "tool_calls": [CALLED],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        user("so?"),
    ]


def test_calls_without_words_have_no_content() -> None:
    assert messages(user("Hi"), CALL)[1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALLED],
    }


def test_a_thought_without_its_text_is_no_message() -> None:
    assert messages(user("Hi"), {"type": "reasoning", "id": "r", "summary": []}) == [user("Hi")]


def test_a_second_answer_is_a_second_message() -> None:
    one, two = ({"role": "assistant", "content": text} for text in "ab")
    assert messages(one, two) == [one, two]


def _part(kind: str) -> dict[str, str]:
    return {"type": kind, "text": kind}


F = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
G = {"type": "function", "name": "g"}


@pytest.mark.parametrize(
    ("choice", "named", "offered"),
    [
        (None, "auto", ["f", "g"]),
        ("required", "required", ["f", "g"]),
        ({"type": "function", "name": "g"}, "g", ["f", "g"]),
        ({"type": "function", "name": "none"}, "required", ["none"]),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "g"}],
            },
            "required",
            ["g"],
        ),
    ],
)
def test_the_choice_of_tools_is_carried_over(choice: Any, named: str, offered: list[str]) -> None:
    others = [{**G, "name": one} for one in offered if one == "none"]
    ask = read(tools=[F, G, *others, {"type": "web_search"}], tool_choice=choice)[0].ask(
        Settings(), 100, ""
    )
    assert isinstance(ask.prompt, Conversation)
    assert ask.tool_choice == named
    assert [tool["function"]["name"] for tool in ask.prompt.tools] == offered


def test_fields_are_carried_over() -> None:
    schema = {"type": "object"}
    ask = read(
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        seed=1,
        top_logprobs=2,
        parallel_tool_calls=False,
        reasoning={"effort": "minimal"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        cache_salt="s",
    )[0].ask(Settings(deadline=5.0), 100, "scope")
    assert isinstance(ask.prompt, Conversation)
    assert (ask.max_tokens, ask.logprobs, ask.parallel_tool_calls) == (7, 2, False)
    assert (ask.sampling.temperature, ask.sampling.top_p, ask.sampling.top_k) == (0.5, 0.9, 3)
    assert ask.response_format == {"type": "json_schema", "schema": schema}
    assert ask.prompt.thinking is False
    assert (ask.scope, ask.salt, ask.timeout) == ("scope", "s", 5.0)


def test_what_has_no_effect_is_told() -> None:
    _, warnings = read(
        user="u",
        prompt_cache_key="k",
        tools=[{"type": "web_search"}],
        include=["reasoning.encrypted_content", "message.output_text.logprobs"],
        input=[{"type": "reasoning", "encrypted_content": "x"}, user("Hi")],
        nonsense=1,
    )
    told = "\n".join(warnings)
    for name in (
        "user",
        "prompt_cache_key",
        "tools[0]",
        "include[0]",
        "input[0].encrypted_content",
        "nonsense",
    ):
        assert name in told
    assert "include[1]" not in told


def test_what_asks_for_nothing_may_stand() -> None:
    assert read(store=False, background=False, previous_response_id=None, prompt=None)[1] == []


def parts(*given: Any) -> list[Any]:
    return [{"role": "user", "content": list(given)}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 3}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "input[0]"),
        ({"input": [{"type": "web_search_call", "id": "i"}]}, "input[0]"),
        ({"input": [{"type": 3}]}, "input[0]"),
        ({"input": [{"type": ["message"]}]}, "input[0]"),
        ({"input": parts({"type": "input_image", "image_url": "x"})}, "input[0].content[0]"),
        ({"input": parts({"type": "input_file", "file_id": "x"})}, "input[0].content[0]"),
        ({"input": parts({"text": "x"})}, "input[0].content[0]"),
        ({"input": parts("x")}, "input[0].content[0]"),
        ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments"),
        ({"input": [{"type": "reasoning", "id": "r"}]}, "input"),
        ({"instructions": 3}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "3"}, "max_output_tokens"),
        ({"max_output_tokens": 10**30}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"n": 2}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"tools": {}}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**G, "parameters": 3}]}, "tools[0].parameters"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"truncation": "auto"}, "truncation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        read(**fields)[0].ask(Settings(), 100, "")
    assert refusal.value.status == 400
    assert (refusal.value.param or "").startswith(param)
    assert len(refusal.value.message) < 1000


def test_what_has_no_effect_is_no_endless_list() -> None:
    with pytest.raises(ApiError, match="400") as refused:
        read(include=["x"] * 65)
    assert refused.value.param == "include"


@pytest.mark.parametrize("arguments", ["{bad", "5", "[" * 20_000])
def test_arguments_that_are_none_are_told_where_they_stand(arguments: str) -> None:
    with pytest.raises(ApiError, match="400") as refused:
        messages(user("Hi"), {**CALL, "arguments": arguments})
    assert refused.value.param == "input[1].arguments"
    assert refused.value.message.startswith(
        "input[1].arguments: arguments have to be a JSON object"
    )
