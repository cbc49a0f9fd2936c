"""Who goes is forgotten: nothing is generated for a client that does not wait."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from quintet import PreTrainedTokenizerFast, Qwen2ForCausalLM
from served import Running
from server.talking import talking
from waiting import until

Served = tuple[Running, Qwen2ForCausalLM, PreTrainedTokenizerFast]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]
LONG: dict[str, Any] = {"model": "tiny", "max_tokens": 900, "temperature": 0}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with talking() as it:
        yield it


def wait_for_the_end(server: Running) -> None:
    [engine] = server.service.registry.engines.values()
    until(lambda: not (engine.state.running or engine.state.waiting))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": USER}),
        (CHAT, {"messages": USER, "n": 6}),
        (CHAT, {"messages": USER, "stream": True}),
        (CHAT, {"messages": USER, "stream": True, "n": 6}),
        (TEXT, {"prompt": ["Hello there"] * 20}),
        (TEXT, {"prompt": ["Hello there"] * 20, "stream": True}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 900}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 900, "stream": True}),
        ("/v1/messages", {"messages": USER}),
        ("/v1/messages", {"messages": USER, "stream": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("reads", [False, True])
def test_all_of_a_request_ends_with_its_client(
    served: Served, path: str, body: dict[str, Any], reads: bool
) -> None:
    server = served[0]
    [engine] = server.service.registry.engines.values()
    before = engine.state.generated
    connection = server.connect()
    data = json.dumps({**LONG, **body}).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    if reads and body.get("stream"):
        connection.getresponse().read(200)
    elif reads:
        until(lambda: engine.state.generated >= before + 5)
    connection.sock.close()
    connection.close()
    wait_for_the_end(server)
    answers = len(body["prompt"]) if path == TEXT else body.get("n", 1)
    assert engine.state.generated - before < 900 * answers
    # And the others are answered.
    answer = server.ask("POST", CHAT, {**LONG, "messages": USER, "max_tokens": 2})
    assert answer.status == 200


def test_one_answer_that_fails_ends_the_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quintet.server import asking

    server, seen = served[0], []
    usual = asking.options_of

    def broken(sampling: Any, model: Any, index: int) -> dict[str, Any]:
        def fail(ids: Any, scores: Any) -> Any:
            seen.append(len(seen))
            if len(seen) > 4:
                raise LookupError("of a processor")
            return scores

        options = usual(sampling, model, index)
        return {**options, "logits_processor": [fail]} if index == 2 else options

    monkeypatch.setattr(asking, "options_of", broken)
    body = {**LONG, "messages": USER, "n": 4}
    whole = server.ask("POST", CHAT, body)
    assert whole.status == 500
    assert "processor" not in whole.body.decode()
    wait_for_the_end(server)
    seen.clear()
    stream = server.ask("POST", CHAT, {**body, "stream": True})
    *_, last, end = stream.body.decode().split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "[DONE]" not in stream.body.decode()
    wait_for_the_end(server)
