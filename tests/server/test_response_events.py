"""Responses as they are written: any course of events gives a whole, well-ordered stream."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.parsing.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from quintet.server.protocol.response_events import ResponseWriter
from quintet.server.questions import Finish, Tokens, TokenScore

USAGE = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 5},
    "output_tokens": 3,
    "output_tokens_details": {"reasoning_tokens": 1},
    "total_tokens": 12,
}


def bare() -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "status": "in_progress", "output": []}


TEXT = st.text(min_size=1, max_size=5)


@st.composite
def courses(draw: st.DrawFn) -> list[Event]:
    """What a parser may say: thoughts and content in pieces, calls one after another."""
    events: list[Event] = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from(["think", "say", "call"]), max_size=6)):
        if kind == "call":
            events.append(CallStart(calls, draw(TEXT)))
            events += [CallArguments(calls, text) for text in draw(st.lists(TEXT, max_size=3))]
            events.append(CallEnd(calls))
            calls += 1
        else:
            make = Reasoning if kind == "think" else Content
            events += [make(text) for text in draw(st.lists(TEXT, min_size=1, max_size=3))]
    return events


def written(events: list[Event], reason: str = "stop") -> list[dict[str, Any]]:
    writer = ResponseWriter(bare())
    sent = writer.begin()
    for event in events:
        sent += writer.write(event)
    return copy.deepcopy(sent + writer.finish(Finish(reason, Tokens(9, 4, 3, 1))))


def accumulated(sent: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the output together from the pieces alone, as a client does."""
    items: dict[int, dict[str, Any]] = {}
    for event in sent:
        match event["type"]:
            case "response.output_item.added":
                assert event["output_index"] == len(items)
                items[event["output_index"]] = {"text": "", **event["item"]}
            case (
                "response.output_text.delta"
                | "response.reasoning_text.delta"
                | "response.function_call_arguments.delta"
            ):
                item = items[event["output_index"]]
                assert item["id"] == event["item_id"]
                item["text"] += event["delta"]
    return [items[place] for place in sorted(items)]


@settings(max_examples=60, deadline=None)
@given(courses(), st.sampled_from(["stop", "length", "tool_calls"]), st.integers(0, 20))
def test_any_course_cut_anywhere_is_a_whole_stream(
    events: list[Event], reason: str, kept: int
) -> None:
    sent = written(events[:kept], reason)
    types = [event["type"] for event in sent]
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))
    assert types[:2] == ["response.created", "response.in_progress"]
    ends = {"response.completed", "response.incomplete", "response.failed"}
    assert types[-1] == ("response.incomplete" if reason == "length" else "response.completed")
    assert sum(type in ends for type in types) == 1
    assert types.count("response.output_item.added") == types.count("response.output_item.done")
    # One item is done before the next begins.
    depth = 0
    for type in types:
        depth += (type == "response.output_item.added") - (type == "response.output_item.done")
        assert depth in (0, 1)
    final = sent[-1]["response"]
    for piecewise, whole in zip(accumulated(sent), final["output"], strict=True):
        kind = whole["type"]
        text = whole["arguments"] if kind == "function_call" else whole["content"][0]["text"]
        assert (piecewise["text"], piecewise["id"]) == (text, whole["id"])
    texts = "".join(e.text for e in events[:kept] if isinstance(e, Content))
    assert texts == "".join(
        item["content"][0]["text"] for item in final["output"] if item["type"] == "message"
    )
    assert final["usage"] == USAGE
    # What was sent at first is not what it became.
    assert sent[0]["response"]["output"] == []
    assert sent[0]["response"]["status"] == "in_progress"


def test_the_events_of_a_text_a_thought_and_a_call_come_in_order() -> None:
    sent = written(
        [
            Reasoning("hm"),
            Content("Paris"),
            CallStart(0, "look"),
            CallArguments(0, "{}"),
            CallEnd(0),
        ],
        "tool_calls",
    )
    assert [event["type"].removeprefix("response.") for event in sent] == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    done = next(e for e in sent if e["type"] == "response.function_call_arguments.done")
    assert (done["name"], done["arguments"]) == ("look", "{}")


def test_what_a_limit_cut_is_incomplete() -> None:
    sent = written([Content("Par")], "length")
    final = sent[-1]["response"]
    assert final["status"] == "incomplete"
    assert final["incomplete_details"] == {"reason": "max_output_tokens"}
    assert final["output"][0]["status"] == "incomplete"


def test_a_call_that_never_ends_is_incomplete_and_the_rest_is_not() -> None:
    final = written([Content("a"), CallStart(0, "f"), CallArguments(0, '{"a')])[-1]["response"]
    assert final["status"] == "completed"
    assert [item["status"] for item in final["output"]] == ["completed", "incomplete"]


def test_an_answer_without_a_word_is_an_empty_message() -> None:
    (item,) = written([])[-1]["response"]["output"]
    assert item["type"] == "message"
    assert item["content"][0]["text"] == ""


@pytest.mark.parametrize("before", [[], [Content("a")], [CallStart(0, "f")]])
def test_a_failure_is_the_last_event_and_says_what_was_wrong(before: list[Event]) -> None:
    writer = ResponseWriter(bare())
    sent = writer.begin()
    for event in before:
        sent += writer.write(event)
    sent += writer.fail({"code": "server_error", "message": "it broke"})
    assert sent[-1]["type"] == "response.failed"
    assert sent[-1]["response"]["error"] == {"code": "server_error", "message": "it broke"}
    # A client that sees an error beside the event takes it for one of its own.
    assert not any("error" in event for event in sent)
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))


def test_what_is_known_of_tokens_is_in_the_deltas_and_in_the_whole() -> None:
    writer = ResponseWriter(bare())
    sent = writer.begin()
    for text in ("é", "!"):
        raw = text.encode()
        score = TokenScore(7, text, raw, -0.5, (TokenScore(8, "?", b"?", -1.5),))
        sent += writer.write(Content(text), (score,))
    sent += writer.finish(Finish("stop", Tokens(9, 4, 3, 1)))
    deltas = [e["logprobs"] for e in sent if e["type"] == "response.output_text.delta"]
    (item,) = sent[-1]["response"]["output"]
    assert item["content"][0]["logprobs"] == deltas[0] + deltas[1]
    assert deltas[0][0]["bytes"] == [195, 169]
    (top,) = deltas[0][0]["top_logprobs"]
    assert top == {"token": "?", "logprob": -1.5, "bytes": [63]}
