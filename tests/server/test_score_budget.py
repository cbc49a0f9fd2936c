"""Scores of tokens that are kept until answers are whole have a bound over all requests."""

from collections.abc import Iterator
from typing import Any

import pytest

from quintet.server.failures import ApiError
from quintet.server.questions import Ask, Conversation
from quintet.server.score_budget import ScoreBudget
from served import Running
from server.talking import events, talking

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = {"role": "user", "content": "a"}
MOST = 200


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with talking(scores=MOST) as (running, _, _):
        yield running


def chat(tokens: int, **more: Any) -> dict[str, Any]:
    given = {"model": "tiny", "messages": [USER], "max_tokens": tokens, "temperature": 0}
    return {**given, "logprobs": True, "top_logprobs": 9, **more}


def test_those_of_several_requests_count_together() -> None:
    budget = ScoreBudget(10)
    with budget.taken(6, "logprobs"):
        with pytest.raises(ApiError) as caught, budget.taken(5, "logprobs"):
            pass
        assert (caught.value.status, caught.value.code) == (503, "scores_full")
        with budget.taken(4, "logprobs"), budget.taken(0, "logprobs"):
            pass
    with budget.taken(10, "logprobs"):
        pass
    with pytest.raises(ApiError) as caught:
        budget.check(11, "logprobs")
    assert (caught.value.status, caught.value.param) == (400, "logprobs")


def test_how_many_a_question_comes_to() -> None:
    talk = Conversation(messages=(USER,))
    assert Ask(prompt=talk).scores(50) == 0
    assert Ask(prompt=talk, logprobs=0, max_tokens=7).scores(50) == 7
    assert Ask(prompt=talk, logprobs=2, n=4).scores(50) == 4 * 50 * 3
    assert Ask(prompt=(1, 2, 3), logprobs=1, prompt_logprobs=1, max_tokens=5).scores(50) == 16


def test_more_than_are_kept_are_refused_by_their_field(server: Running) -> None:
    assert server.ask("POST", CHAT, chat(10, n=2)).status == 200
    response = {"model": "tiny", "input": "a", "max_output_tokens": 30, "top_logprobs": 9}
    for path, body, param in (
        (CHAT, chat(11, n=2), "top_logprobs"),
        (
            TEXT,
            {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 26, "logprobs": 3},
            "logprobs",
        ),
        (RESPONSES, response, "top_logprobs"),
        (RESPONSES, {**response, "stream": True}, "top_logprobs"),
    ):
        answer = server.ask("POST", path, body)
        assert (answer.status, answer.error["param"]) == (400, param), answer.body
        assert f"at most {MOST} are kept" in answer.error["message"]


def test_a_stream_that_passes_them_on_has_no_bound(server: Running) -> None:
    assert events(server, CHAT, chat(30))[-1] == "[DONE]"
    body = {"model": "tiny", "prompt": "a", "max_tokens": 60, "logprobs": 9}
    assert events(server, TEXT, body)[-1] == "[DONE]"


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_what_is_answered_makes_room(server: Running, path: str) -> None:
    bodies = {
        CHAT: chat(15),
        TEXT: {"model": "tiny", "prompt": "a", "max_tokens": 15, "logprobs": 9},
        RESPONSES: {"model": "tiny", "input": "a", "max_output_tokens": 15, "top_logprobs": 9},
    }
    for stream in (False, True, False):
        answer = server.ask("POST", path, {**bodies[path], "stream": stream})
        assert answer.status == 200, answer.body
        assert b"scores of tokens" not in answer.body
