"""anthropic's client on `/v1/messages`: its types, its accumulator, its parsing."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from outside import tool
from served import Running
from server.talking import talking

anthropic = tool("anthropic")
types = tool("anthropic.types")
pydantic = tool("pydantic")
pytestmark = pytest.mark.filterwarnings("ignore")

WEATHER: Any = {
    "name": "weather",
    "description": "The weather somewhere",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Bonn"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
RAIN: Any = {"role": "user", "content": "What is the weather in Rome?"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with talking() as (running, _, _):
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


def test_a_message_is_one_by_the_clients_own_types(client: Any) -> None:
    raw = client.messages.with_raw_response.create(
        model="tiny",
        max_tokens=16,
        system="You answer shortly.",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        extra_body={"temperature": 0},
    )
    message = types.Message.model_validate(json.loads(raw.text()), strict=True)
    assert message.content[0].type == "text"
    assert message.content[0].text
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert 0 < message.usage.output_tokens <= 16


def test_a_stream_tells_the_same_as_the_answer_at_once(client: Any) -> None:
    ask: Any = {
        "model": "tiny",
        "max_tokens": 12,
        "messages": [{"role": "user", "content": "Name a colour."}],
        "extra_body": {"temperature": 0},
    }
    whole = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert [block.to_dict() for block in final.content] == [b.to_dict() for b in whole.content]
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_every_event_is_one_by_the_clients_own_types(server: Running) -> None:
    theirs = pydantic.TypeAdapter(types.RawMessageStreamEvent)
    user = {"role": "user", "content": "Hi"}
    body = {"model": "tiny", "max_tokens": 4, "messages": [user], "stream": True}
    lines = server.ask("POST", "/v1/messages", body).body.decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line[:5] == "data:"]
    for event in events:
        if event["type"] != "ping":
            theirs.validate_python(event)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_tool_is_called_and_its_result_is_read(client: Any) -> None:
    with client.messages.stream(
        model="tiny",
        max_tokens=64,
        messages=[RAIN],
        tools=[WEATHER],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    ) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert call.name == "weather"
    assert set(call.input) == {"city"}
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    second = client.messages.create(
        model="tiny",
        max_tokens=8,
        messages=[RAIN, first.to_param(), {"role": "user", "content": [result]}],
        tools=[WEATHER],
    )
    assert second.content


class Capital(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    city: Literal["Rome", "Bonn"]
    known: bool


def test_an_answer_is_parsed_into_a_class(client: Any) -> None:
    message = client.messages.parse(
        model="tiny",
        max_tokens=64,
        messages=[{"role": "user", "content": "The capital of France, as JSON"}],
        output_format=Capital,
    )
    assert isinstance(message.parsed_output, Capital)


def test_a_stop_sequence_is_told(client: Any) -> None:
    ask: Any = {
        "model": "tiny",
        "max_tokens": 12,
        "messages": [{"role": "user", "content": "Hi"}],
        "extra_body": {"temperature": 0},
    }
    text = client.messages.create(**ask).content[0].text
    stop = text[-2:]
    message = client.messages.create(**ask, stop_sequences=["never said", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]


def test_an_answer_begun_is_gone_on_with(client: Any) -> None:
    ask: Any = {"model": "tiny", "extra_body": {"temperature": 0}}
    user = {"role": "user", "content": "Hi"}
    whole = client.messages.create(messages=[user], max_tokens=12, **ask).content[0].text
    begun = {"role": "assistant", "content": whole[:4]}
    rest = client.messages.create(messages=[user, begun], max_tokens=12, **ask)
    assert rest.content[0].text


def test_tokens_are_counted_as_they_are_charged(client: Any) -> None:
    ask: Any = {"model": "tiny", "messages": [RAIN], "tools": [WEATHER], "system": "Be short."}
    counted = client.messages.count_tokens(**ask)
    usage = client.messages.create(max_tokens=1, **ask).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as refusal:
        client.messages.create(
            model="tiny",
            max_tokens=4,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x"}}
                    ],
                }
            ],
        )
    body: Any = refusal.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert "messages[0].content[0]" in body["error"]["message"]
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(
            model="nobody", max_tokens=4, messages=[{"role": "user", "content": "Hi"}]
        )
