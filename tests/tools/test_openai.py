"""OpenAI's own client talks to our server as it does to theirs."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from outside import tool
from quintet.serving import Limits
from served import Running
from server.talking import CONTEXT, talking
from server.test_chat_tools import PLACES, TOOLS

openai = tool("openai")
pydantic = tool("pydantic")
pytestmark = pytest.mark.filterwarnings("ignore")

USER = [{"role": "user", "content": "How warm is it?"}]
PLAIN: dict[str, Any] = {"model": "tiny", "messages": USER, "temperature": 0, "max_tokens": 12}


class Weather(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    place: Literal["Bonn", "Rome"]
    sunny: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with talking() as (running, _, _):
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as it:
        yield it


def test_an_answer_is_the_same_in_every_way_of_asking(server: Running, client: Any) -> None:
    whole = client.chat.completions.create(**PLAIN)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        **PLAIN, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == text
    assert parts[-1].usage == whole.usage or parts[-1].usage.completion_tokens == 12
    # Its helper takes an answer that was cut for a failure.
    ends = {**PLAIN, "stop": text[-1], "max_tokens": 40}
    with client.chat.completions.stream(**ends) as events:
        kinds = [event.type for event in events]
        made = events.get_final_completion().choices[0]
    assert made.finish_reason == "stop"
    assert made.message.content == text[: text.index(text[-1])]
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)

    async def asked() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as it:
            answers = await asyncio.gather(*(it.chat.completions.create(**PLAIN) for _ in range(3)))
            stream = await it.chat.completions.create(**PLAIN, stream=True)
            made = [part.choices[0].delta.content or "" async for part in stream]
            assert all(one.choices[0].message.content == text for one in answers)
            return "".join(made)

    assert asyncio.run(asked()) == text


def test_several_answers_are_put_together_by_its_helper(client: Any) -> None:
    body = {**PLAIN, "n": 3, "temperature": 1.2, "seed": 7, "logprobs": True, "top_logprobs": 2}
    body |= {"stop": [*" aeiou\n.,()nrst"], "max_tokens": 300}
    whole = client.chat.completions.create(**body)
    with client.chat.completions.stream(**body) as events:
        for _ in events:
            pass
        final = events.get_final_completion()
    assert [one.message.content for one in final.choices] == [
        one.message.content for one in whole.choices
    ]
    assert [one.finish_reason for one in final.choices] == ["stop"] * 3
    assert final.choices[1].logprobs.content == whole.choices[1].logprobs.content
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2


def test_tools_are_called_and_answered(client: Any) -> None:
    body = {**PLAIN, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
    body["parallel_tool_calls"] = False
    message = client.chat.completions.create(**body).choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments)["place"] in PLACES["enum"]
    with client.chat.completions.stream(**body) as events:
        kinds = [event.type for event in events]
        final = events.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert final.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    for said in (message, message.model_dump()):
        answer = client.chat.completions.with_raw_response.create(
            **{**PLAIN, "messages": [*USER, said, result], "tools": TOOLS}
        )
        assert "warnings" not in answer.headers
        assert answer.parse().choices[0].message.role == "assistant"


def test_answers_are_read_into_classes(client: Any) -> None:
    body = {**PLAIN, "max_tokens": 100}
    parsed = client.chat.completions.parse(**body, response_format=Weather)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(**body, response_format=Weather) as events:
        for _ in events:
            pass
        assert isinstance(events.get_final_completion().choices[0].message.parsed, Weather)
    offered = openai.pydantic_function_tool(Weather)
    called = client.chat.completions.parse(**body, tools=[offered], tool_choice="required")
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**{**body, "max_tokens": 3}, response_format=Weather)


def test_texts_go_on(client: Any) -> None:
    body = {"model": "tiny", "prompt": ["Hello", "def f("], "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(**body, echo=True, logprobs=2)
    assert [one.index for one in whole.choices] == [0, 1]
    assert whole.choices[1].text.startswith("def f(")
    assert len(whole.choices[0].logprobs.tokens) == len(whole.choices[0].logprobs.text_offset)
    made = ["", ""]
    for part in client.completions.create(**body, stream=True):
        made[part.choices[0].index] += part.choices[0].text
    assert [p + t for p, t in zip(body["prompt"], made, strict=True)] == [
        one.text for one in whole.choices
    ]


def test_errors_are_those_it_knows(server: Running, client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**PLAIN, "model": "other"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(**{**PLAIN, "temperature": 9})
    assert (wrong.value.param, wrong.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="Hello there. " * 2000)
    assert long.value.code == "context_length_exceeded"
    server.service.draining = True
    try:
        with pytest.raises(openai.InternalServerError) as ending:
            client.with_options(max_retries=0).chat.completions.create(**PLAIN)
        assert ending.value.status_code == 503
        assert int(ending.value.response.headers["retry-after"]) >= 1
    finally:
        server.service.draining = False


def test_it_comes_again_when_it_is_told_to() -> None:
    limits = Limits(rows=1, queue=0, capacity=CONTEXT)
    with (
        talking(limits=limits) as (busy, _, _),
        openai.OpenAI(base_url=f"{busy.url}/v1", api_key="none") as client,
    ):
        stream = client.chat.completions.create(**{**PLAIN, "max_tokens": 900}, stream=True)
        next(iter(stream))
        with pytest.raises(openai.InternalServerError) as full:
            client.with_options(max_retries=0).chat.completions.create(**PLAIN)
        assert (full.value.status_code, full.value.code) == (503, "queue_full")
        assert full.value.response.headers["retry-after"] == "1"
        # The next time the row is free.
        leaves = threading.Timer(0.3, stream.close)
        leaves.start()
        answer = client.chat.completions.with_raw_response.create(**PLAIN)
        assert answer.retries_taken >= 1
        assert answer.parse().choices[0].finish_reason == "length"
        leaves.join()


def test_further_fields_reach_the_model(client: Any) -> None:
    more = {"top_k": 1, "chat_template_kwargs": {"enable_thinking": True}}
    answer = client.chat.completions.create(
        **{**PLAIN, "temperature": 1.0}, extra_body=more
    ).choices[0]
    greedy = client.chat.completions.create(**PLAIN, reasoning_effort="high").choices[0]
    assert answer.message.reasoning_content == greedy.message.reasoning_content != ""
