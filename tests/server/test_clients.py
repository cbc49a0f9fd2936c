"""Bodies of the shapes that editors, agents and pages send are answered."""

from collections.abc import Iterator
from typing import Any

import pytest

from served import Running
from server.talking import talking

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads a file.",
        "parameters": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"path": {"type": "string", "description": "of the file"}},
            "required": ["path"],
            "additionalProperties": False,
        },
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": "{}"}}
# By what they are like, and what of them has no effect.
BODIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "an agent with parts and marks for a cache": (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "<task>\nRead it.\n</task>"},
                        {"type": "text", "text": "<env>", "cache_control": {"type": "ephemeral"}},
                    ],
                },
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
        },
        {"messages[1].content[1].cache_control"},
    ),
    "an agent in the midst of its tools": (
        CHAT,
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "Read it."},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "I read.",
                    "refusal": None,
                    "annotations": [],
                    "audio": None,
                    "function_call": None,
                    "tool_calls": [{**CALL, "index": 0}],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "text"},
            ],
            "tools": [TOOL],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "prompt_cache_key": "session",
            "store": False,
            "reasoning_effort": "medium",
        },
        {"messages[2].tool_calls[0].index", "prompt_cache_key"},
    ),
    "a page": (
        CHAT,
        {
            "messages": [{"role": "user", "content": "Hi\0\u0007 \ud83d\ude42"}],
            "stream": True,
            "max_tokens": 4,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "top_p": 1,
            "top_k": 40,
            "seed": None,
            "stop": None,
            "user": "someone",
            "metadata": {"chat_id": "1"},
        },
        {"user", "metadata"},
    ),
    "an editor that completes": (
        TEXT,
        {
            "prompt": "<|fim_prefix|>def f(<|fim_suffix|>)<|fim_middle|>",
            "stop": [
                *("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
                *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|im_start|>", "<|im_end|>"),
            ],
            "temperature": 0.01,
            "max_tokens": 8,
            "stream": True,
        },
        set(),
    ),
    "a harness of benchmarks": (
        TEXT,
        {
            "prompt": [[50, 60, 70], [80, 90]],
            "max_tokens": 1,
            "logprobs": 1,
            "echo": True,
            "temperature": 0,
            "seed": 1234,
            "stop": ["\n\n", "Question:", "Q:", "</s>", "<|im_end|>", "A:"],
        },
        set(),
    ),
    "a load generator": (
        CHAT,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "max_completion_tokens": 6,
            "max_tokens": 6,
            "ignore_eos": True,
            "stop": None,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        {"stream_options.continuous_usage_stats"},
    ),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with talking() as (running, _, _):
        yield running


@pytest.mark.parametrize("name", BODIES)
def test_what_clients_send_is_answered(server: Running, name: str) -> None:
    path, body, idle = BODIES[name]
    answer = server.ask("POST", path, {"model": "tiny", "max_tokens": 4, **body})
    assert answer.status == 200, answer.body
    told = answer.headers.get("warnings", "")
    assert {one.split(" ")[0] for one in told.split("; ") if one} == idle
    if body.get("stream"):
        assert answer.body.endswith(b"data: [DONE]\n\n")
    else:
        assert answer.json()["choices"]


def test_half_of_a_character_is_no_text(server: Running) -> None:
    data = b'{"model": "tiny", "messages": [{"role": "user", "content": "a\\ud800b"}]}'
    answer = server.ask("POST", CHAT, data)
    assert answer.status == 400
    assert answer.error["code"] == "invalid_json"
