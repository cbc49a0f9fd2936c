"""Requests that are malformed: each gets an error of OpenAI's shape, small and soon."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from quintet.server.bodies import parsed
from quintet.server.failures import ApiError
from served import Running, serving

LIMIT = 500_000


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(body=LIMIT) as it:
        yield it


def checked(answer: Any, status: int) -> dict[str, Any]:
    """Check that an answer is an error as clients read it, and return it."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert len(answer.body) < 10_000
    error: dict[str, Any] = answer.error
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"{bad",
        b"",
        b"   ",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 20_000 + b"]" * 20_000,
        b'{"prompt":' * 20_000 + b"1" + b"}" * 20_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"prompt": ' + b"9" * 5_000 + b"}",
        b'{"prompt": NaN}',
        b'{"prompt": Infinity}',
        b'{"prompt": "a"} {"prompt": "b"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        b"{'prompt': 'a'}",
        b'{"prompt": "a\x00"}',
    ],
    ids=range(19),
)
def test_a_body_that_is_no_json_object_is_refused_soon(server: Running, body: bytes) -> None:
    sent = {"Content-Type": "application/json"}
    began = time.process_time()
    error = checked(server.ask("POST", "/tokenize", body, sent), 400)
    assert error["type"] == "invalid_request_error"
    assert time.process_time() - began < 0.5


def test_the_last_of_keys_that_are_alike_counts(server: Running) -> None:
    answer = server.ask(
        "POST", "/tokenize", b'{"prompt": "a", "prompt": "b"}', {"Content-Type": "application/json"}
    )
    assert answer.json() == server.ask("POST", "/tokenize", {"prompt": "b"}).json()
    assert answer.headers["warnings"] == "prompt is given more than once, and the last counts"
    for once in (
        b'{"prompt": "prompt", "x": [{"a": 1}, {"a": 2}]}',
        b'{"prompt": ":\\"prompt\\":"}',
    ):
        answer = server.ask("POST", "/tokenize", once, {"Content-Type": "application/json"})
        assert "more than once" not in answer.headers.get("warnings", "")
    nested = b'{"prompt": "a", "x": {"y": [{"z;": 1, "z;": 2}]}}'
    answer = server.ask("POST", "/tokenize", nested, {"Content-Type": "application/json"})
    assert answer.headers["warnings"].startswith("z? is given more than once")


@pytest.mark.parametrize("name", ["", " ", "é\n", "a;b", "x" * 5000])
def test_a_field_of_any_name_is_told_of(server: Running, name: str) -> None:
    answer = server.ask("POST", "/tokenize", {"prompt": "a", name: 1})
    assert answer.status == 200
    assert "no effect" in answer.headers["warnings"]


def test_control_characters_are_text(server: Running) -> None:
    text = "\0\x01\x1b[31m\x7f\u2028"
    ids = server.ask("POST", "/tokenize", {"prompt": text}).json()["tokens"]
    assert server.ask("POST", "/detokenize", {"tokens": ids}).json()["prompt"] == text


def test_many_mistakes_make_a_small_error(server: Running) -> None:
    checked(server.ask("POST", "/detokenize", {"tokens": ["x"] * 12_000}), 400)
    checked(server.ask("POST", "/tokenize", {"messages": [{"role": 3}] * 12_000}), 400)
    checked(server.ask("POST", "/tokenize", {f"field{n}": n for n in range(9_000)}), 400)


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""],
)
def test_only_json_is_read(server: Running, kind: str) -> None:
    error = checked(server.ask("POST", "/tokenize", b"{}", {"Content-Type": kind}), 415)
    assert "application/json" in error["message"]


@pytest.mark.parametrize("charset", ["utf-8", '"UTF-8"', "us-ascii"])
def test_json_may_say_its_characters(server: Running, charset: str) -> None:
    sent = {"Content-Type": f"Application/JSON; charset={charset}"}
    assert server.ask("POST", "/tokenize", b'{"prompt": "a"}', sent).status == 200


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Content-Type": "application/json; charset=utf-16"}, "'utf-16'"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "'gzip'"),
    ],
)
def test_what_a_body_is_said_to_be_is_not_ignored(
    server: Running, headers: dict[str, str], said: str
) -> None:
    error = checked(server.ask("POST", "/tokenize", b'{"prompt": "a"}', headers), 415)
    assert said in error["message"]


def test_values_of_a_query_are_shown(server: Running) -> None:
    error = checked(server.ask("GET", "/v1/models?limit=many"), 400)
    assert "limit" in error["message"]
    assert "'many'" in error["message"]


def test_a_body_that_is_too_large_is_refused_and_the_connection_closed(server: Running) -> None:
    answer = server.ask("POST", "/tokenize", {"prompt": "a" * LIMIT})
    error = checked(answer, 413)
    assert "500,000" in error["message"]
    assert answer.headers["connection"] == "close"


def test_chunks_are_counted_too(server: Running) -> None:
    connection = server.connect()
    chunks = (b"a" * 10_000 for _ in range(90))
    connection.request(
        "POST", "/tokenize", chunks, {"Content-Type": "application/json"}, encode_chunked=True
    )
    answer = connection.getresponse()
    assert answer.status == 413
    connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/tokenize", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("PATCH", "/tokenize", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/models/demo/other", 405),
        ("GET", "/v1/models/a/b/c", 404),
        ("GET", "/%00", 400),
        ("GET", "/docs", 404),
        ("OPTIONS", "/v1/models", 405),
        ("GET", "/tokenizer_info?model=" + "x" * 5000, 404),
    ],
)
def test_what_is_not_there_has_the_same_shape(
    server: Running, method: str, path: str, status: int
) -> None:
    answer = server.ask(method, path)
    checked(answer, status)
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("a b", False),
        ("é", False),
        ("", False),
    ],
)
def test_a_request_is_named_by_who_asks_if_the_name_is_one(
    server: Running, given: str, kept: bool
) -> None:
    for path in ("/health", "/nothing"):
        answer = server.ask("GET", path, headers={"X-Request-Id": given.encode().decode("latin-1")})
        assert (answer.headers["x-request-id"] == given) == kept
        assert answer.headers["x-request-id"]


def test_probes_may_ask_for_the_head_alone(server: Running) -> None:
    for path in ("/health", "/ready"):
        answer = server.ask("HEAD", path)
        assert (answer.status, answer.body) == (200, b"")


def test_the_server_describes_itself(server: Running) -> None:
    told = server.ask("GET", "/openapi.json").json()
    body = told["paths"]["/tokenize"]["post"]["requestBody"]["content"]["application/json"]
    assert "prompt" in body["schema"]["properties"]
    text = json.dumps(told)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "')[1:]}:
        at: Any = told
        for step in reference.removeprefix("#/").split("/"):
            at = at[step]


@pytest.mark.parametrize(
    "body",
    [
        {f"k{i}": 1 for i in range(60_000)},
        {"messages": [{"role": "user", "content": "a"}] * 30_000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 30_000}]},
    ],
    ids=["fields", "objects", "parts"],
)
def test_more_values_than_are_looked_at_one_by_one_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refusal:
        parsed(json.dumps(body).encode(), 64)
    assert refusal.value.status == 400
    assert "50,000" in refusal.value.message


def test_ids_and_long_texts_are_no_such_values() -> None:
    body = {"prompt": [1] * 200_000, "text": "{[:" * 200_000, "logit_bias": {"1": 2}}
    assert parsed(json.dumps(body).encode(), 64) == body
