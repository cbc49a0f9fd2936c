"""`/v1/messages` over HTTP: at once, as events, and every error in Anthropic's shape."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from chatting import Breaking, chatting
from quintet.server.registry import Offer
from served import Answered, Running, serving

HI = {"role": "user", "content": "Hi"}
HEADERS = {"x-api-key": "secret", "anthropic-version": "2023-06-01"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    offers = [
        Offer("chat", chatting, loaded=chatting()),
        Offer("breaking", chatting, loaded=chatting(Breaking)),
    ]
    with serving(*offers, keys=("secret",)) as it:
        yield it


def ask(server: Running, **fields: Any) -> Answered:
    body = {"model": "chat", "max_tokens": 6, "messages": [HI], "temperature": 0, **fields}
    return server.ask("POST", "/v1/messages", body, HEADERS)


def events(answer: Answered) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for part in answer.body.decode().split("\n\n"):
        name, _, data = part.partition("\n")
        if data:
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def test_a_stream_says_what_the_answer_at_once_says(server: Running) -> None:
    whole = ask(server).json()
    told = events(ask(server, stream=True))
    start = told[0]["message"]
    assert set(start) == set(whole)
    assert start["usage"]["input_tokens"] > 0
    text = "".join(one["delta"]["text"] for one in told if one["type"] == "content_block_delta")
    assert [{"type": "text", "text": text}] == whole["content"]
    ending = told[-2]
    assert ending["delta"]["stop_reason"] == whole["stop_reason"] == "max_tokens"
    assert ending["usage"]["output_tokens"] == whole["usage"]["output_tokens"] == 6
    assert told[-1] == {"type": "message_stop"}


def test_tokens_are_counted_as_they_are_charged(server: Running) -> None:
    body = {"model": "chat", "messages": [HI], "system": "Be short."}
    counted = server.ask("POST", "/v1/messages/count_tokens", body, HEADERS).json()
    usage = ask(server, system="Be short.").json()["usage"]
    read = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted == {"input_tokens": read}


def test_a_failure_on_the_way_is_the_last_event(server: Running) -> None:
    told = events(ask(server, model="breaking", stream=True))
    assert told[0]["type"] == "message_start"
    assert told[-1]["type"] == "error"
    assert told[-1]["error"]["type"] == "overloaded_error"
    assert not any(one["type"] in ("message_delta", "message_stop") for one in told)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("method", "body", "headers", "status", "kind"),
    [
        ("POST", b"{bad", {}, 400, "invalid_request_error"),
        ("POST", b"", {}, 400, "invalid_request_error"),
        ("POST", b"[]", {}, 400, "invalid_request_error"),
        ("POST", {"model": "chat"}, {}, 400, "invalid_request_error"),
        ("POST", {}, {"Content-Type": "text/plain"}, 415, "invalid_request_error"),
        ("POST", {}, {"x-api-key": "wrong"}, 401, "authentication_error"),
        ("POST", {"model": "x", "messages": [HI], "max_tokens": 1}, {}, 404, "not_found_error"),
        ("GET", None, {}, 405, "invalid_request_error"),
        ("POST", b" " * (9 << 20), {}, 413, "request_too_large"),
    ],
)
def test_every_error_is_in_the_shape_of_the_protocol(
    server: Running,
    path: str,
    method: str,
    body: Any,
    headers: dict[str, str],
    status: int,
    kind: str,
) -> None:
    sent = {"Content-Type": "application/json", **HEADERS, **headers}
    answer = server.ask(method, path, body, sent)
    assert answer.status == status
    told = answer.json()
    assert told["type"] == "error"
    assert told["error"]["type"] == kind
    assert told["error"]["message"]


def test_a_key_may_come_in_either_header(server: Running) -> None:
    body = {"model": "chat", "messages": [HI], "max_tokens": 1}
    bearer = {"Authorization": "Bearer secret"}
    assert server.ask("POST", "/v1/messages", body, bearer).status == 200


def test_a_base_model_says_that_it_cannot_chat(server: Running) -> None:
    with serving() as other:
        answer = other.ask(
            "POST", "/v1/messages", {"model": "demo", "messages": [HI], "max_tokens": 1}
        )
    assert answer.status == 400
    assert "chat template" in answer.json()["error"]["message"]


def test_a_turn_of_an_agent_is_taken_as_agents_send_it(server: Running) -> None:
    kept = {"cache_control": {"type": "ephemeral"}}
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"}
    body = {
        "model": "chat",
        "max_tokens": 32000,
        "system": [{"type": "text", "text": "You are an agent.", **kept}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "ls", **kept}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "So?", "signature": ""},
                    {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"c": "ls"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "content": [{"type": "text", "text": "a.txt"}],
                        "is_error": False,
                        **kept,
                    }
                ],
            },
        ],
        "tools": [{"name": "Bash", "description": "Runs.", "input_schema": schema}],
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
        "metadata": {"user_id": "user"},
        "temperature": 1,
        "stop_sequences": ["\n"],
        "stream": True,
    }
    headers = {**HEADERS, "anthropic-beta": "context-management-2025-06-27"}
    answer = server.ask("POST", "/v1/messages?beta=true", body, headers)
    assert answer.status == 200, answer.body
    assert events(answer)[-1] == {"type": "message_stop"}
    for name in ("context_management", "metadata", "system[0].cache_control", "budget_tokens"):
        assert name in answer.headers["warnings"]
