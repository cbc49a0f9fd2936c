"""`/v1/responses` over HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from chatting import Breaking, chatting
from quintet.server.registry import Offer
from served import Answered, Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    offers = [
        Offer("chat", chatting, loaded=chatting()),
        Offer("breaking", chatting, loaded=chatting(Breaking)),
    ]
    with serving(*offers) as it:
        yield it


def ask(server: Running, **fields: Any) -> Answered:
    body = {"model": "chat", "input": "Hi", "temperature": 0, "max_output_tokens": 6, **fields}
    return server.ask("POST", "/v1/responses", body)


def events(answer: Answered) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for part in answer.body.decode().split("\n\n"):
        name, _, data = part.partition("\n")
        if data:
            found.append(json.loads(data.removeprefix("data: ")))
            # The name of an event is its type; nothing comes behind the last.
            assert name == f"event: {found[-1]['type']}"
    return found


def test_a_stream_ends_with_what_the_answer_at_once_is(server: Running) -> None:
    whole = ask(server).json()
    told = events(ask(server, stream=True))
    assert told[0]["type"] == "response.created"
    assert set(told[0]["response"]) == set(whole)
    assert told[-1]["type"] == "response.incomplete"
    last = told[-1]["response"]
    assert [item["content"] for item in last["output"]] == [
        item["content"] for item in whole["output"]
    ]
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"] == 6
    assert last["usage"]["input_tokens_details"]["cached_tokens"] >= 0
    text = "".join(one["delta"] for one in told if one["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]


def test_a_failure_on_the_way_is_the_last_event(server: Running) -> None:
    told = events(ask(server, model="breaking", stream=True))
    assert told[-1]["type"] == "response.failed"
    error = told[-1]["response"]["error"]
    assert error["code"] == "server_error"
    assert "fell over" not in error["message"]
    assert [one["sequence_number"] for one in told] == list(range(len(told)))


def test_a_failure_of_an_answer_at_once_is_one_of_http(server: Running) -> None:
    answer = ask(server, model="breaking")
    assert answer.status == 503
    assert answer.error["code"] == "server_shutdown"


def test_errors_of_a_question_are_no_streams(server: Running) -> None:
    for fields, param in [
        ({"model": "nobody"}, "model"),
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ]:
        answer = ask(server, stream=True, **fields)
        assert answer.status in (400, 404)
        assert answer.error["param"] == param


def test_what_has_no_effect_is_in_a_header(server: Running) -> None:
    answer = ask(server, user="u", tools=[{"type": "web_search"}], stream=True)
    assert "user" in answer.headers["warnings"]
    assert "tools[0]" in answer.headers["warnings"]


def test_numbers_that_json_does_not_have_are_no_fault(server: Running) -> None:
    tool = b'{"type": "function", "name": "f", "parameters": {"maximum": 1e999}}'
    body = b'{"model": "chat", "input": "Hi", "max_output_tokens": 1, "tools": [%s]}' % tool
    answer = server.ask("POST", "/v1/responses", body, {"Content-Type": "application/json"})
    assert answer.status == 200
    assert answer.json()["tools"][0]["parameters"] == {"maximum": None}


def test_a_turn_of_an_agent_is_taken_as_agents_send_it(server: Running) -> None:
    shell = {
        "type": "function",
        "name": "shell",
        "description": "Runs a command.",
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "array", "items": {"type": "string"}}},
            "required": ["command"],
            "additionalProperties": False,
        },
    }
    said = [{"type": "input_text", "text": "ls"}]
    history = [
        {"type": "message", "role": "developer", "content": said},
        {"type": "message", "role": "user", "content": said},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        {"type": "function_call", "name": "shell", "arguments": "{}", "call_id": "call_1"},
        {"type": "function_call_output", "call_id": "call_1", "output": "a.txt"},
    ]
    told = events(
        ask(
            server,
            instructions="You are an agent.",
            input=history,
            tools=[shell, {"type": "custom", "name": "apply_patch", "format": {"type": "text"}}],
            tool_choice="auto",
            parallel_tool_calls=False,
            reasoning={"effort": "medium", "summary": "auto"},
            store=False,
            stream=True,
            include=["reasoning.encrypted_content"],
            prompt_cache_key="0199",
            text={"verbosity": "medium"},
        )
    )
    assert told[0]["response"]["tools"] == [shell]
    assert told[0]["response"]["parallel_tool_calls"] is False
    assert told[-1]["type"] in ("response.completed", "response.incomplete")
