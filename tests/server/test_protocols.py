"""One question in three protocols: the answer is the same, in each one's words."""

from collections.abc import Iterator
from typing import Any

import pytest

from served import Running
from server.talking import talking

SAID = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
COMMON: dict[str, Any] = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with talking() as (running, _, _):
        yield running


def asked(server: Running, thinking: bool | None = None) -> tuple[Any, Any, Any]:
    """Return what chat, responses and messages answer."""
    wanted = [{}, {}, {}]
    if thinking is not None:
        kind = {"type": "enabled" if thinking else "disabled"}
        effort = "high" if thinking else "none"
        wanted = [
            {"reasoning_effort": effort},
            {"reasoning": {"effort": effort}},
            {"thinking": kind},
        ]
    bodies = [
        ("chat/completions", {"messages": SAID, "max_tokens": 12}),
        ("responses", {"input": SAID, "max_output_tokens": 12}),
        ("messages", {"system": "Be short.", "messages": SAID[1:], "max_tokens": 12}),
    ]
    answers = []
    for (path, body), more in zip(bodies, wanted, strict=True):
        answer = server.ask("POST", f"/v1/{path}", {**COMMON, **body, **more})
        assert answer.status == 200, answer.body
        assert "warnings" not in answer.headers
        answers.append(answer.json())
    chat, response, message = answers
    return chat, response, message


@pytest.mark.parametrize("thinking", [None, False])
def test_the_text_is_the_same(server: Running, thinking: bool | None) -> None:
    chat, response, message = asked(server, thinking)
    text = chat["choices"][0]["message"]["content"]
    assert text
    assert response["output"][0]["content"][0]["text"] == text
    assert message["content"] == [{"type": "text", "text": text}]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (chat["choices"][0]["finish_reason"], message["stop_reason"]) == ("length", "max_tokens")
    prompt = chat["usage"]["prompt_tokens"]
    assert response["usage"]["input_tokens"] == prompt
    read = message["usage"]
    assert read["input_tokens"] + read["cache_read_input_tokens"] == prompt


def test_the_thought_is_the_same(server: Running) -> None:
    chat, response, message = asked(server, thinking=True)
    thought = chat["choices"][0]["message"]["reasoning_content"]
    assert thought
    [item] = response["output"]
    assert (item["type"], item["content"][0]["text"]) == ("reasoning", thought)
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 12
    assert message["content"] == [{"type": "thinking", "thinking": thought, "signature": ""}]
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] == 12


def test_a_form_holds_in_all(server: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema |= {"additionalProperties": False}
    form = {"type": "json_schema", "schema": schema}
    bodies = [
        ("responses", {"input": "Hello", "text": {"format": {**form, "name": "n"}}}),
        ("messages", {"messages": SAID[1:], "max_tokens": 40, "output_config": {"format": form}}),
    ]
    texts = []
    for path, body in bodies:
        answer = server.ask("POST", f"/v1/{path}", {**COMMON, **body}).json()
        parts = answer["output"][0]["content"] if path == "responses" else answer["content"]
        texts.append(parts[0]["text"])
    assert texts[0] == texts[1]
    assert texts[0].replace(" ", "") in ('{"a":1}', '{"a":2}')
