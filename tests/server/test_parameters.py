"""What requests may not say is refused by name, before anything is done for them."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quintet.server.protocol.chat import ChatRequest
from quintet.server.protocol.common import Body
from quintet.server.protocol.completions import CompletionRequest
from quintet.serving import Limits
from served import Answered, Running
from server.talking import CONTEXT, talking

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
NAN = b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "%s": NaN}'
USER = {"role": "user", "content": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
WRONG = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(("}}}
STRICT = {"type": "function", "function": {"name": "f", "strict": True, "parameters": WRONG}}


def _called(arguments: str) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with talking() as (running, _, _):
        yield running


def refused(answer: Answered, param: str | None, status: int = 400) -> dict[str, Any]:
    assert answer.status == status, answer.body
    assert len(answer.body) < 10_000
    error = answer.error
    assert error["param"] == param, error
    assert error["message"]
    return error


BOTH: list[tuple[dict[str, Any], str]] = [
    *(({"n": n}, "n") for n in (0, -1, 17, 10**9, "3", True, 1.0)),
    *(({"temperature": t}, "temperature") for t in (-1, 2.1, 3, "hot", True, [], 10**400)),
    *(({"top_p": p}, "top_p") for p in (0, 2, -0.5, "x")),
    *(({"presence_penalty": p}, "presence_penalty") for p in (9, -2.1, "x")),
    *(({"frequency_penalty": p}, "frequency_penalty") for p in (9, -2.1, False)),
    *(({"repetition_penalty": p}, "repetition_penalty") for p in (0, 5e-324, -1, "x")),
    *(({"top_k": k}, "top_k") for k in (-2, 1.5, "x", True)),
    *(({"min_p": p}, "min_p") for p in (-0.1, 1.1)),
    *(({"seed": s}, "seed") for s in (10**30, "x", 1.5, -(2**63) - 1)),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"stop": ["b", "a" * 10_000]}, "stop[1]"),
    ({"stop": 5}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1.5": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop_token_ids": [5, 99_999], "min_tokens": 3}, "stop_token_ids[1]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    *(({"max_tokens": m}, "max_tokens") for m in (-5, "x", 10**12, 1.5, True)),
    ({"min_tokens": -1}, "min_tokens"),
    ({"priority": "high"}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"speculate": "always"}, "speculate"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"model": 5}, "model"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"regex": "a", "grammar": "b"}, "response_format"),
    ({"regex": "(("}, "regex"),
    ({"grammar": "start: nothing"}, "grammar"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": WRONG}}},
        "response_format.json_schema.schema",
    ),
]


@pytest.mark.parametrize(("changes", "param"), BOTH, ids=lambda one: str(one)[:40])
def test_both_refuse_what_breaks_a_rule(
    server: Running, changes: dict[str, Any], param: str
) -> None:
    chat = {"model": "tiny", "messages": [USER], **changes}
    refused(server.ask("POST", CHAT, chat), param)
    refused(server.ask("POST", TEXT, {"model": "tiny", "prompt": "a", **changes}), param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [USER] * 2049}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "god", "content": "a"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]},
            "messages[0].tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        *(
            (
                {"messages": [_called(text), {"role": "tool", "content": "5"}]},
                "messages[0].tool_calls[0].function.arguments",
            )
            for text in ("{bad", "5", "[" * 20_000, '{"a": %s}' % ("9" * 5000))
        ),
        ({"messages": [{**USER, "audio": {"id": "x"}}]}, "messages[0].audio"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"store": True}, "store"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"regex": "a" * 70_000}, "regex"),
        ({"tools": [STRICT]}, "tools"),
    ],
    ids=lambda one: str(one)[:50],
)
def test_a_chat_refuses_what_breaks_a_rule(
    server: Running, changes: dict[str, Any], param: str
) -> None:
    body = {"model": "tiny", "messages": [USER], **changes}
    refused(server.ask("POST", CHAT, body), param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", [5]]}, "prompt[1]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [5, 99_999]}, "prompt[1]"),
        ({"prompt": [5, -1]}, "prompt[1]"),
        ({"prompt": [5, 2**70]}, "prompt[1]"),
        ({"prompt": [5.0, 6]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [[5, [6]]]}, "prompt[0][1]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"echo": "yes"}, "echo"),
        ({"messages": [USER]}, "messages"),
        ({"suffix": "b", "echo": True}, "suffix"),
        ({"suffix": "b"}, "suffix"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_a_completion_refuses_what_breaks_a_rule(
    server: Running, changes: dict[str, Any], param: str
) -> None:
    refused(server.ask("POST", TEXT, {"model": "tiny", "prompt": "a", **changes}), param)


@pytest.mark.parametrize("name", ["temperature", "top_p", "logit_bias"])
def test_numbers_that_are_none_are_no_json(server: Running, name: str) -> None:
    refused(server.ask("POST", CHAT, NAN % name.encode()), None)


def test_what_is_missing_is_named(server: Running) -> None:
    refused(server.ask("POST", CHAT, {"model": "tiny"}), "messages")
    refused(server.ask("POST", CHAT, {"messages": [USER]}), "model")
    refused(server.ask("POST", TEXT, {"model": "tiny"}), "prompt")
    error = refused(server.ask("POST", CHAT, {"model": "x", "messages": [USER]}), "model", 404)
    assert error["code"] == "model_not_found"


def test_thousands_of_mistakes_are_told_shortly(server: Running) -> None:
    # Of 24,000 there would be more parts than a body may have.
    for count, param in ((9_000, "messages[0].role"), (24_000, None)):
        wrong = [{"role": 5, "content": {"a": n}} for n in range(count)]
        refused(server.ask("POST", CHAT, {"model": "tiny", "messages": wrong}), param)
    error = refused(
        server.ask("POST", TEXT, {"model": "tiny", "prompt": ["x" * 9, 5] * 60}), "prompt[1]"
    )
    assert len(error["message"]) < 500


def test_a_prompt_that_is_too_long_is_told_both_numbers(server: Running) -> None:
    for many in (CONTEXT + 1, 10 * CONTEXT):
        body = {"model": "tiny", "prompt": [50] * many}
        error = refused(server.ask("POST", TEXT, body), "prompt")
        assert error["code"] == "context_length_exceeded"
        assert str(CONTEXT) in error["message"]
        assert str(many) in error["message"]
    text = "Hello there, how are you today? " * CONTEXT
    said = {"messages": [{"role": "user", "content": text}]}
    for path, body, param in (
        (TEXT, {"prompt": text}, "prompt"),
        (TEXT, {"prompt": ["a", text]}, "prompt[1]"),
        (TEXT, {"prompt": [[5], [5] * 2 * CONTEXT]}, "prompt[1]"),
        # One that is as long as the context leaves no room for an answer.
        (TEXT, {"prompt": [[5], [5] * CONTEXT]}, "prompt[1]"),
        (CHAT, said, "messages"),
        ("/v1/responses", {"input": text}, "input"),
        ("/v1/embeddings", {"input": ["a", text]}, "input[1]"),
        ("/tokenize", said, "messages"),
    ):
        error = refused(server.ask("POST", path, {"model": "tiny", **body}), param)
        assert error["code"] == "context_length_exceeded"
        assert str(CONTEXT) in error["message"]
        assert param in error["message"]
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = server.ask("POST", path, {"model": "tiny", "max_tokens": 1, **said})
        assert answer.status == 400
        assert answer.error["message"].startswith("messages: the model's context is")


def test_a_prompt_for_which_there_is_never_memory_is_no_passing_trouble() -> None:
    """A client would ask again for ever."""
    with talking(limits=Limits(rows=2, capacity=CONTEXT, memory=20_000, ahead=1)) as (server, _, _):
        for path, body, param in (
            (TEXT, {"prompt": [[5], [5] * 500]}, "prompt[1]"),
            (CHAT, {"messages": [{**USER, "content": "a b c " * 200}]}, "messages"),
            ("/v1/embeddings", {"input": [[5], [5] * 500]}, "input[1]"),
        ):
            error = refused(server.ask("POST", path, {"model": "tiny", **body}), param)
            assert error["code"] == "context_length_exceeded"
            assert "memory=20,000" in error["message"]


@pytest.mark.parametrize("value", [False, "", [], {}, 0])
def test_a_field_that_is_not_known_may_ask_by_false(server: Running, value: Any) -> None:
    """As `enable_thinking` does, which has another place."""
    body = {"model": "tiny", "messages": [USER], "max_tokens": 1, "enable_thinking": value}
    answer = server.ask("POST", CHAT, body)
    assert answer.headers["warnings"] == "enable_thinking is not known and has no effect"
    error = refused(
        server.ask("POST", "/tokenize", {"messages": [USER], "add_generation_prompt": False}),
        "add_generation_prompt",
    )
    assert "leave it out" in error["message"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_true_is_no_number_of_answers(server: Running, path: str) -> None:
    said = {"input": "a"} if path == "/v1/responses" else {"messages": [USER], "max_tokens": 1}
    answer = server.ask("POST", path, {"model": "tiny", "n": True, **said})
    assert answer.status == 400
    assert "not True" in answer.error["message"]
    assert server.ask("POST", path, {"model": "tiny", "n": 1, **said}).status == 200


def test_rules_are_told_in_the_words_of_the_protocol(server: Running) -> None:
    wrong = {"stream_options": 5, "response_format": 5, "logit_bias": 5}
    for name, value in wrong.items():
        body = {"model": "tiny", "messages": [USER], name: value}
        message = refused(server.ask("POST", CHAT, body), name)["message"]
        assert message == f"{name}: input should be a valid object, not 5"
    body = {"model": "tiny", "input": [{"type": "x"}]}
    message = refused(server.ask("POST", "/v1/responses", body), "input[0]")["message"]
    assert message.startswith("input[0]: the type 'x' cannot be had here")


def test_options_that_a_model_cannot_have_are_named(server: Running) -> None:
    body = {"model": "tiny", "messages": [USER], "speculate": "mtp"}
    assert "say lookup or off" in refused(server.ask("POST", CHAT, body), "speculate")["message"]
    body = {"model": "tiny", "messages": [USER], "min_tokens": 9, "max_tokens": 8}
    assert "at most 8" in refused(server.ask("POST", CHAT, body), "min_tokens")["message"]


def kinds(kind: type[Body]) -> Iterator[type[Body]]:
    for one in kind.__subclasses__():
        yield one
        yield from kinds(one)


def test_null_asks_for_nothing_wherever_a_field_may_be_left_out() -> None:
    found = [
        (kind.__name__, name, field.annotation)
        for kind in kinds(Body)
        for name, field in kind.model_fields.items()
        if not field.is_required()
    ]
    assert len(found) > 100
    refusing = [one for one in found if type(None) not in get_args(one[2])]
    assert refusing == []


def test_lists_of_requests_are_refused_at_their_first_mistake() -> None:
    """Millions of mistakes would take as many errors, and everybody's time."""

    def lists(schema: Any) -> Iterator[Any]:
        if isinstance(schema, dict):
            if schema.get("type") == "list":
                yield schema
            for value in schema.values():
                yield from lists(value)
        elif isinstance(schema, list):
            for value in schema:
                yield from lists(value)

    found = [
        (kind.__name__, one)
        for kind in kinds(Body)
        for one in lists(kind.__pydantic_core_schema__)
        if one.get("items_schema", {}).get("type", "any") != "any"
    ]
    assert len(found) > 20
    assert [name for name, one in found if not one.get("fail_fast")] == []


def test_what_asks_for_nothing_is_taken(server: Running) -> None:
    nothing = {
        **dict.fromkeys(("stop", "seed", "n", "logit_bias", "tools", "temperature")),
        **{"store": False, "functions": [], "audio": None, "modalities": ["text"]},
        **{"tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {"5": 1}},
        **{"stream": False, "stream_options": None, "parallel_tool_calls": True},
        **{"top_k": -1, "max_tokens": 1, "stop": []},
    }
    answer = server.ask("POST", CHAT, {"model": "tiny", "messages": [USER], **nothing})
    assert answer.status == 200, answer.body
    assert "warnings" not in answer.headers


def test_a_strict_server_refuses_what_it_does_not_know() -> None:
    with talking(strict=True) as (server, _, _):
        body = {"model": "tiny", "messages": [USER], "max_tokens": 1}
        error = refused(server.ask("POST", CHAT, {**body, "foo": 1}), "foo")
        assert error["code"] == "unknown_parameter"
        refused(server.ask("POST", CHAT, {**body, "messages": [{**USER, "x": 1}]}), "messages[0].x")
        assert server.ask("POST", CHAT, {**body, "user": "me"}).status == 200


def test_next_to_no_temperature_is_none(server: Running) -> None:
    def said(temperature: float) -> Any:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 6, "temperature": temperature}
        return server.ask("POST", TEXT, body).json()["choices"][0]["text"]

    assert said(5e-324) == said(1e-9) == said(0)


def test_a_field_without_a_name_is_told_of(server: Running) -> None:
    answer = server.ask("POST", TEXT, {"model": "tiny", "prompt": "a", "max_tokens": 1, "": 1})
    assert answer.status == 200
    assert answer.headers["warnings"] == "'' is not known and has no effect"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["auto", "text", "function", "user", "tool", "<|im_end|>", "tiny"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "role", "content", "text", "name", "function", "parameters", "schema", "5"]
            )
            | st.text(max_size=5),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
FIELDS = {
    CHAT: sorted({*ChatRequest.model_fields, *ChatRequest.IDLE, *ChatRequest.REFUSED, "x"}),
    TEXT: sorted({*CompletionRequest.model_fields, *CompletionRequest.REFUSED, "x"}),
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_value_of_a_field_is_too_much_for_a_server(server: Running, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([CHAT, TEXT]))
    names = st.sampled_from([name for name in FIELDS[path] if name not in ("model", "max_tokens")])
    body = {"messages": [USER]} if path == CHAT else {"prompt": "a"}
    body |= {"model": "tiny", "max_tokens": 2}
    body |= data.draw(st.dictionaries(names, JSON, min_size=1, max_size=2))
    answer = server.ask("POST", path, body)
    assert answer.status in (200, 400), (answer.status, answer.body, body)
    if answer.status == 400:
        assert answer.error["message"]
        assert len(answer.body) < 10_000
