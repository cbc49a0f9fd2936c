"""Messages of Anthropic's as they are written."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.parsing.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from quintet.server.protocol.message_events import MessageWriter
from quintet.server.questions import Finish, Tokens

TEXT = st.text(min_size=1, max_size=5)


@st.composite
def courses(draw: st.DrawFn) -> list[Event]:
    events: list[Event] = []
    for call, kind in enumerate(draw(st.lists(st.sampled_from(["think", "say", "call"])))):
        if kind == "call":
            text = json.dumps({"a": draw(TEXT)})
            cut = draw(st.integers(1, len(text) - 1))
            events += [CallStart(call, "f"), CallArguments(call, text[:cut])]
            events += [CallArguments(call, text[cut:]), CallEnd(call)]
        else:
            make = Reasoning if kind == "think" else Content
            events += [make(text) for text in draw(st.lists(TEXT, min_size=1, max_size=3))]
    return events


def written(
    events: list[Event], reason: str = "stop", stop: str | None = None, silent: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    writer = MessageWriter("m", 9, silent=silent)
    sent = writer.begin()
    for event in events:
        sent += writer.write(event)
    sent += writer.finish(Finish(reason, Tokens(9, 4, 3, 1), stop))
    return sent, writer.message


@settings(max_examples=60, deadline=None)
@given(courses(), st.integers(0, 20))
def test_any_course_cut_anywhere_is_a_whole_message(events: list[Event], kept: int) -> None:
    sent, message = written(events[:kept])
    types = [event["type"] for event in sent]
    assert types[:2] == ["message_start", "ping"]
    assert types[-2:] == ["message_delta", "message_stop"]
    blocks: list[dict[str, Any]] = []
    open_at = None
    for event in sent[2:-2]:
        if event["type"] == "content_block_start":
            assert open_at is None
            assert event["index"] == len(blocks)
            open_at = event["index"]
            blocks.append({"block": event["content_block"], "text": ""})
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_at
            (text,) = (value for key, value in event["delta"].items() if key != "type")
            blocks[-1]["text"] += text
        else:
            assert event["type"] == "content_block_stop"
            assert event["index"] == open_at
            open_at = None
    assert open_at is None
    for piecewise, whole in zip(blocks, message["content"], strict=True):
        key = {"text": "text", "thinking": "thinking"}.get(whole["type"])
        if key:
            assert whole[key] == piecewise["text"]
            assert piecewise["block"][key] == ""
        else:
            assert piecewise["block"]["input"] == {}
            if piecewise is not blocks[-1] or kept >= len(events):
                assert json.loads(piecewise["text"]) == whole["input"]


def test_reasons_are_named_as_the_protocol_names_them() -> None:
    def ending(*args: Any) -> tuple[Any, Any]:
        _, message = written([Content("a")], *args)
        return message["stop_reason"], message["stop_sequence"]

    assert ending("stop") == ("end_turn", None)
    assert ending("stop", "\n\n") == ("stop_sequence", "\n\n")
    assert ending("length") == ("max_tokens", None)
    assert ending("tool_calls") == ("tool_use", None)


def test_what_was_read_before_is_counted_beside_the_rest() -> None:
    sent, message = written([Content("a")])
    assert sent[0]["message"]["usage"]["input_tokens"] == 9
    assert message["usage"] == sent[-2]["usage"]
    assert message["usage"]["input_tokens"] == 5
    assert message["usage"]["cache_read_input_tokens"] == 4
    assert message["usage"]["output_tokens"] == 3


def test_thoughts_that_are_not_to_be_shown_leave_an_empty_block() -> None:
    sent, message = written([Reasoning("secret"), Content("a")], silent=True)
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert "secret" not in json.dumps([sent, message])


def test_an_answer_without_a_word_is_an_empty_text() -> None:
    assert written([])[1]["content"] == [{"type": "text", "text": ""}]
