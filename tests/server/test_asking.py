"""What is heard of answers that a model writes in its own tokens."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from parsing.templates import TEMPLATES, tokenizer
from parsing.wholetext import Said, said
from quintet.generation.config import GenerationConfig
from quintet.parsing import CODER, Format, format_of
from quintet.server.asking import ask
from quintet.server.form_figures import FormFigures
from quintet.server.questions import Ask, Conversation, Finish, Start
from quintet.server.registry import ServedModel
from quintet.serving import Answer, Limits
from quintet.tokenization import IncrementalDecoder

TOOLS = ({"type": "function", "function": {"name": "f", "description": "", "parameters": {}}},)
USER = {"role": "user", "content": "How warm is it?"}
WITH_CALLS = [name for name in TEMPLATES if format_of(tokenizer(name))]


class Writes:
    """An engine whose model writes a text, and keeps what it was asked."""

    full = False

    def __init__(self, name: str, text: str, reason: str = "stop") -> None:
        self.tokenizer = tokenizer(name)
        self.text, self.reason = text, reason
        self.taken = 0
        self.limits = Limits()
        self.model = SimpleNamespace(generation_config=GenerationConfig())

    async def generate(self, ids: tuple[int, ...], **_: Any) -> AsyncIterator[Answer]:
        decoder = IncrementalDecoder(self.tokenizer, skip_special_tokens=True)
        written = self.tokenizer.encode(self.text, add_special_tokens=False)
        for token in written:
            self.taken += 1
            text = decoder.push(token)
            yield Answer((token,), text, texts=(text,))
        rest = decoder.flush()
        eos = self.tokenizer.eos_token_id
        yield Answer((eos,), rest, finish_reason=self.reason, texts=(rest,))


def heard(
    name: str,
    text: str,
    *,
    reason: str = "stop",
    calls: Format | None = None,
    messages: tuple[dict[str, Any], ...] = (USER,),
    figures: FormFigures | None = None,
    **options: Any,
) -> tuple[Said, Finish, int]:
    """Return what is heard, the end, and how many tokens the engine gave for it."""
    engine: Any = Writes(name, text, reason)
    made = tokenizer(name)
    shapes: Any = SimpleNamespace(processor=lambda *_, **__: None, figures=figures or FormFigures())
    served = ServedModel("m", engine, made, None, 0, 4096, "fp", shapes, calls)
    talk = {"tools": TOOLS, **{k: options.pop(k) for k in ("tools", "thinking") if k in options}}
    question = Ask(prompt=Conversation(messages=messages, **talk), **options)

    async def listen() -> list[Any]:
        return [one.event async for one in ask(served, question)]

    first, *events, end = asyncio.run(listen())
    assert isinstance(first, Start)
    assert isinstance(end, Finish)
    return said(events), end, engine.taken


@pytest.mark.parametrize("name", WITH_CALLS)
def test_calls_are_heard_in_every_format(name: str) -> None:
    written = format_of(tokenizer(name))
    assert written is not None
    text = written.written([("f", '{"a": "} </tool_call>"}'), ("g", "{}")])
    thought = "hm</think>" if name in ("qwq", "r1") else ""
    calls = [("call", "f", '{"a": "} </tool_call>"}'), ("call", "g", "{}")]
    told, end, taken = heard(name, f"{thought}So:\n{text}")
    reasoning: Said = [("reasoning", "hm")] if thought else []
    assert told == [*reasoning, ("content", "So:"), *calls]
    assert end.reason == "tool_calls"
    assert (end.usage.reasoning > 0) == bool(thought)
    assert end.usage.completion == taken + 1

    told, end, fewer = heard(name, thought + text + "more", parallel_tool_calls=False)
    assert told == [*reasoning, calls[0]]
    assert (end.reason, fewer < taken) == ("tool_calls", True)

    told, end, _ = heard(name, thought + text, tools=())
    assert told == [*reasoning, ("content", text)]
    assert end.reason == "stop"


@pytest.mark.parametrize("name", WITH_CALLS)
def test_a_call_that_is_none_is_text(name: str) -> None:
    written = format_of(tokenizer(name))
    assert written is not None
    broken = written.written([("f", '{"a": 1,}')])
    thought = "hm</think>" if name in ("qwq", "r1") else ""
    told, end, _ = heard(name, thought + broken)
    assert told[-1] == ("content", broken)
    assert end.reason == "stop"
    cut = written.written([("f", '{"a": 1}')]).partition(": 1")[0]
    told, end, _ = heard(name, thought + cut, reason="length")
    assert told[-1] == ("content", cut)
    assert end.reason == "length"


def test_results_that_are_made_up_are_not_waited_for() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    made_up = call + "\n<tool_response>" + "made up " * 20
    told, end, taken = heard("qwq", "hm</think>" + made_up)
    assert told == [("reasoning", "hm"), ("call", "f", "{}")]
    assert end.reason == "tool_calls"
    assert taken < len(tokenizer("qwq").encode(made_up))


def test_objects_alone_are_calls_where_the_server_is_told_so() -> None:
    text = '{"name": "f", "arguments": {"a": 1}}'
    assert heard("qwen", text)[0] == [("content", text)]
    for one in (text, f"<tools>\n{text}\n</tools>"):
        told, end, _ = heard("qwen", one, calls=CODER)
        assert told == [("call", "f", '{"a": 1}')]
        assert end.reason == "tool_calls"


@pytest.mark.parametrize("name", WITH_CALLS)
def test_a_conversation_with_results_goes_on(name: str) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turn = (
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "content": "<think> 4 </tool_call>", "tool_call_id": "a"},
    )
    thought = "hm</think>" if name == "qwq" else ""
    told, end, _ = heard(name, thought + "It is 4.", messages=turn)
    assert told[-1] == ("content", "It is 4.")
    assert end.reason == "stop"


def test_what_is_a_call_and_what_only_began_as_one_are_counted() -> None:
    written = format_of(tokenizer("qwen"))
    assert written is not None
    figures = FormFigures()
    heard("qwen", written.written([("f", "{}"), ("g", "{}")]), figures=figures)
    heard("qwen", '<tool_call>\n{"name": "f", "arg', figures=figures)
    seen = figures.snapshot()
    assert (seen.calls, seen.broken) == (2, 1)
