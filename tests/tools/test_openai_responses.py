"""openai's client on `/v1/responses` and `/v1/embeddings`: its types, its helpers, its errors."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from outside import tool
from served import Running
from server.talking import talking

openai = tool("openai")
types = tool("openai.types.responses")
pydantic = tool("pydantic")
pytestmark = pytest.mark.filterwarnings("ignore")

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather somewhere",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Bonn"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with talking() as (running, _, _):
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_response_is_one_by_the_clients_own_types(client: Any) -> None:
    raw = client.responses.with_raw_response.create(
        model="tiny", input="What is the capital of France?", max_output_tokens=16, temperature=0
    )
    response = types.Response.model_validate(json.loads(raw.text), strict=True)
    assert response.output_text
    assert response.usage is not None
    assert response.usage.output_tokens <= 16


def test_a_stream_tells_the_same_as_the_answer_at_once(client: Any) -> None:
    ask: dict[str, Any] = {
        "model": "tiny",
        "input": [{"role": "user", "content": "Name a colour."}],
        "max_output_tokens": 12,
        "temperature": 0,
    }
    whole = client.responses.create(**ask)
    with client.responses.stream(**ask) as stream:
        events = list(stream)
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == whole.output_text
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage


def test_every_event_is_one_by_the_clients_own_types(server: Running) -> None:
    theirs = pydantic.TypeAdapter(types.ResponseStreamEvent)
    body = {"model": "tiny", "input": "Hi", "max_output_tokens": 4, "stream": True}
    body |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = server.ask("POST", "/v1/responses", body)
    lines = answer.body.decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line[:5] == "data:"]
    for event in events:
        theirs.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    known = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    assert all(len(one["top_logprobs"]) == 2 for some in known for one in some)
    assert known[0]


def test_a_tool_is_called_and_its_result_is_read(client: Any) -> None:
    history: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
    first = client.responses.create(
        model="tiny", input=history, tools=[WEATHER], tool_choice="required", temperature=0
    )
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.name == "weather"
    assert set(json.loads(call.arguments)) == {"city"}
    history += [item.model_dump() for item in first.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    second = client.responses.create(
        model="tiny", input=history, tools=[WEATHER], max_output_tokens=8
    )
    assert second.output[-1].type in ("message", "function_call")


def test_streamed_arguments_are_those_of_the_whole(client: Any) -> None:
    with client.responses.stream(
        model="tiny",
        input="What is the weather in Rome?",
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "weather"},
        temperature=0,
    ) as stream:
        pieces = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        response = stream.get_final_response()
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert "".join(pieces) == call.arguments
    assert len(pieces) > 1


class Capital(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    city: Literal["Rome", "Bonn"]
    known: bool


def test_an_answer_is_parsed_into_a_class(client: Any) -> None:
    response = client.responses.parse(
        model="tiny",
        input="The capital of France, as JSON",
        text_format=Capital,
        max_output_tokens=64,
        temperature=0,
    )
    assert isinstance(response.output_parsed, Capital)


def test_a_history_as_agents_send_it_is_read(client: Any) -> None:
    response = client.responses.create(
        model="tiny",
        instructions="You are an agent.",
        input=[
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "x"}],
            },
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "ls"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
            {
                "type": "function_call",
                "id": "fc_1",
                "call_id": "call_1",
                "name": "weather",
                "arguments": "{}",
                "status": "completed",
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        ],
        tools=[WEATHER, {"type": "web_search"}],
        tool_choice="auto",
        parallel_tool_calls=False,
        reasoning={"effort": "medium", "summary": "auto"},
        store=False,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="key",
        max_output_tokens=8,
    )
    assert response.status in ("completed", "incomplete")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("prompt", {"id": "p"}),
        ("store", True),
    ],
)
def test_what_needs_a_memory_is_refused_by_name(client: Any, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(model="tiny", input="Hi", **{field: value})
    assert refusal.value.param == field
    assert refusal.value.code == "unsupported_parameter"


def test_vectors_are_the_same_packed_and_as_numbers(client: Any) -> None:
    texts = ["Hello", "there you are"]
    packed = client.embeddings.create(model="tiny", input=texts)
    numbers = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [one.embedding for one in packed.data] == [one.embedding for one in numbers.data]
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0
    with pytest.raises(openai.BadRequestError) as refusal:
        client.embeddings.create(model="tiny", input=texts, dimensions=8)
    assert refusal.value.param == "dimensions"
