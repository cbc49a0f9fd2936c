"""Bodies of `/v1/messages`: what they come to, what is refused, and what is told to be idle."""

from typing import Any

import pytest

from quintet.server.failures import ApiError
from quintet.server.protocol.common import parse
from quintet.server.protocol.messages import CountTokensRequest, MessagesRequest, error_body
from quintet.server.questions import Ask, Conversation
from quintet.server.settings import Settings

HI = {"role": "user", "content": "Hi"}
TOOL = {"name": "f", "description": "F", "input_schema": {"type": "object"}}
OTHER = {"name": "g", "input_schema": {"type": "object"}, "type": "custom"}


def read(**fields: Any) -> tuple[Ask, list[str]]:
    given = {"model": "m", "max_tokens": 5, "messages": [HI], **fields}
    body, warnings = parse(MessagesRequest, given, strict=False)
    return body.ask(Settings(), 100, "scope"), warnings


def said(*turns: Any, **fields: Any) -> list[Any]:
    prompt = read(messages=list(turns), **fields)[0].prompt
    assert isinstance(prompt, Conversation)
    return [dict(message) for message in prompt.messages]


def block(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


def test_the_system_prompt_is_the_first_message() -> None:
    assert said(HI, system="Be short.") == [{"role": "system", "content": "Be short."}, HI]
    parts = [block("text", text="a", cache_control={"type": "ephemeral"}), block("text", text="b")]
    assert said(HI, system=parts)[0] == {"role": "system", "content": "a\nb"}


def test_what_an_assistant_thought_said_and_called_is_one_message() -> None:
    turn = {
        "role": "assistant",
        "content": [
            block("thinking", thinking="hm", signature="s"),
            block("text", text="Let me"),
            block("text", text=" look."),
            block("tool_use", id="t1", name="f", input={"a": 1}),
            block("redacted_thinking", data="x"),
        ],
    }
    assert said(HI, turn)[1] == {
        "role": "assistant",
        "reasoning_content": "hm",
        "content": "Let me look.",
        "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        ],
    }


def test_results_of_tools_are_messages_of_their_own_in_their_order() -> None:
    turn = {
        "role": "user",
        "content": [
            block("tool_result", tool_use_id="t1", content="sunny"),
            block("tool_result", tool_use_id="t2", content=[block("text", text="rain")]),
            block("tool_result", tool_use_id="t3"),
            block("text", text="so?"),
        ],
    }
    assert said(turn) == [
        {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "t2", "content": "rain"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "so?"},
    ]


def test_an_answer_that_was_begun_is_gone_on_with() -> None:
    def continued(*turns: Any) -> bool:
        prompt = read(messages=list(turns))[0].prompt
        assert isinstance(prompt, Conversation)
        return prompt.continued

    assert continued(HI, {"role": "assistant", "content": "Par"})
    assert not continued(HI)
    call = block("tool_use", id="t1", name="f", input={})
    assert not continued(HI, {"role": "assistant", "content": [call]})


@pytest.mark.parametrize(
    ("choice", "named", "parallel", "offered"),
    [
        (None, "auto", True, 2),
        ({"type": "auto"}, "auto", True, 2),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False, 2),
        ({"type": "tool", "name": "g"}, "g", True, 2),
        ({"type": "none"}, "none", True, 0),
    ],
)
def test_the_choice_of_tools_is_carried_over(
    choice: Any, named: str, parallel: bool, offered: int
) -> None:
    ask, _ = read(tools=[TOOL, OTHER], tool_choice=choice)
    assert isinstance(ask.prompt, Conversation)
    assert (ask.tool_choice, ask.parallel_tool_calls) == (named, parallel)
    assert len(ask.prompt.tools) == offered
    if offered:
        assert ask.prompt.tools[0] == {
            "type": "function",
            "function": {"name": "f", "description": "F", "parameters": {"type": "object"}},
        }


@pytest.mark.parametrize(
    ("thinking", "wanted"),
    [
        (None, None),
        ({"type": "enabled", "budget_tokens": 2000}, True),
        ({"type": "disabled"}, False),
        ({"type": "adaptive"}, None),
    ],
)
def test_thinking_is_switched(thinking: Any, wanted: bool | None) -> None:
    ask, warnings = read(thinking=thinking)
    assert isinstance(ask.prompt, Conversation)
    assert ask.prompt.thinking is wanted
    assert ("thinking.budget_tokens" in "".join(warnings)) == bool(wanted)


def test_fields_are_carried_over() -> None:
    schema = {"type": "object"}
    ask, warnings = read(
        stop_sequences=["a", "b"],
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert warnings == []
    assert (ask.max_tokens, ask.stop, ask.scope) == (5, ("a", "b"), "scope")
    assert (ask.sampling.temperature, ask.sampling.top_k, ask.sampling.top_p) == (0.5, 3, 0.9)
    assert ask.response_format == {"type": "json_schema", "schema": schema}


def test_what_has_no_effect_is_told() -> None:
    _, warnings = read(
        metadata={"user_id": "u"},
        service_tier="auto",
        nonsense=1,
        system=[block("text", text="x", cache_control={"type": "ephemeral"})],
        messages=[
            {
                "role": "user",
                "content": [block("tool_result", tool_use_id="t", content="x", is_error=True)],
            }
        ],
        output_config={"effort": "high"},
    )
    told = "\n".join(warnings)
    for name in (
        "metadata",
        "service_tier",
        "nonsense",
        "system[0].cache_control",
        "messages[0].content[0].is_error",
        "output_config.effort",
    ):
        assert name in told


def user(*blocks: Any) -> list[Any]:
    return [{"role": "user", "content": list(blocks)}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": user("x")}, "messages[0].content[0]"),
        ({"messages": user(block("image", source={}))}, "messages[0].content[0]"),
        ({"messages": user(block("document", source={}))}, "messages[0].content[0]"),
        ({"messages": user(block("text"))}, "messages[0].content[0].text"),
        ({"messages": user({"text": "x"})}, "messages[0].content[0]"),
        ({"messages": user(block("tool_result"))}, "messages[0].content[0].tool_use_id"),
        (
            {"messages": user(block("tool_result", tool_use_id="t", content=[block("image")]))},
            "messages[0].content[0].content[0]",
        ),
        ({"messages": user(block("thinking", thinking="x"))}, "messages[0]"),
        (
            {"messages": [{"role": "assistant", "content": [block("tool_use", id="t", name="f")]}]},
            "messages[0].content[0].input",
        ),
        ({"system": 3}, "system"),
        ({"system": [block("image")]}, "system[0]"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"stop_sequences": ["x" * 257]}, "stop_sequences[0]"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "h"}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        read(**fields)
    error = refusal.value
    assert error.status == 400
    assert error.param == param
    told = error_body(error)
    assert told["type"] == "error"
    assert told["error"]["type"] == "invalid_request_error"
    assert param in told["error"]["message"]


def test_to_count_there_is_no_need_to_say_how_long_the_answer_may_be() -> None:
    body, warnings = parse(CountTokensRequest, {"model": "m", "messages": [HI]}, strict=True)
    assert warnings == []
    assert body.conversation(Settings())[1].messages == (HI,)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_errors_are_named_as_the_protocol_names_them(status: int, kind: str) -> None:
    told = error_body(ApiError(status, "no"))
    assert told == {"type": "error", "error": {"type": kind, "message": "no"}}
