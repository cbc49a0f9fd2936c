"""Probes and the list of models."""

from collections.abc import Iterator

import pytest

import quintet
from served import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as it:
        yield it


def test_it_lives_and_is_ready(server: Running) -> None:
    assert server.ask("GET", "/health").json() == {"status": "ok"}
    assert server.ask("GET", "/ready").json() == {"status": "ready"}
    assert server.ask("GET", "/version").json() == {"version": quintet.__version__}


def test_models_are_listed_as_clients_read_them(server: Running) -> None:
    listed = server.ask("GET", "/v1/models").json()
    assert listed["object"] == "list"
    [one] = listed["data"]
    assert (one["id"], one["object"], one["max_model_len"]) == ("demo", "model", 256)
    assert server.ask("GET", "/v1/models/demo").json() == one
    missing = server.ask("GET", "/v1/models/other")
    assert missing.status == 404
    assert missing.error["code"] == "model_not_found"
    assert missing.error["param"] == "model"


def test_models_are_listed_as_the_clients_of_messages_read_them(server: Running) -> None:
    asked = {"anthropic-version": "2023-06-01"}
    listed = server.ask("GET", "/v1/models", headers=asked).json()
    [one] = listed["data"]
    assert (one["type"], one["id"], one["display_name"]) == ("model", "demo", "demo")
    assert one["created_at"].endswith("Z")
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "demo", "demo")
    assert server.ask("GET", "/v1/models/demo", headers=asked).json() == one
    behind = server.ask("GET", "/v1/models?after_id=demo", headers=asked).json()
    assert (behind["data"], behind["has_more"], behind["first_id"]) == ([], False, None)
    for query in ("after_id=other", "limit=0", "limit=x"):
        assert server.ask("GET", f"/v1/models?{query}", headers=asked).status == 400


def test_errors_are_told_to_the_clients_of_messages_in_their_shape(server: Running) -> None:
    asked = {"anthropic-version": "2023-06-01"}
    for path, kind in (
        ("/v1/models/other", "not_found_error"),
        ("/v1/models?limit=x", "invalid_request_error"),
    ):
        said = server.ask("GET", path, headers=asked).json()
        assert (said["type"], said["error"]["type"]) == ("error", kind)


def test_a_model_without_a_template_has_another_route(server: Running) -> None:
    """Whoever asks over HTTP can set no template."""
    said = [{"role": "user", "content": "a"}]
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = server.ask("POST", path, {"model": "demo", "messages": said})
        assert answer.status == 400
        assert answer.error["message"].endswith("ask /v1/completions")
