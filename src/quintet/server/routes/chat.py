"""`POST /v1/chat/completions`."""

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from quintet.parsing.events import CallArguments, CallEnd, CallStart, Content, Reasoning
from quintet.server.asking import ask
from quintet.server.bodies import documented, received
from quintet.server.connection import until_gone
from quintet.server.events import DONE, EventStream, ServerEvent
from quintet.server.protocol.answers import Frame, event, scored, usage_of
from quintet.server.protocol.chat import ChatRequest
from quintet.server.protocol.common import warnings_header
from quintet.server.questions import AnswerEvent, Finish, Tokens
from quintet.server.replies import begun
from quintet.server.service import caller_of, service_of

router = APIRouter(tags=["openai"])
CHUNK, WHOLE = "chat.completion.chunk", "chat.completion"


@router.post("/v1/chat/completions", openapi_extra=documented(ChatRequest))
async def create(request: Request) -> Response:
    """Answer in a conversation, at once or as a stream."""
    service = service_of(request)
    body, warnings = await received(request, ChatRequest)
    served = await service.registry.get(body.model)
    size = served.engine.model.config.vocab_size
    question = body.question(service.settings, size, caller_of(request))
    events = ask(served, question)
    frame = Frame("chatcmpl", served.name, served.fingerprint)
    if body.stream:
        start = await begun(request, events)
        counted = body.stream_options is not None and bool(body.stream_options.include_usage)
        stream = EventStream(_chunks(events, frame, question.n, counted=counted), service.settings)
        stream.headers.update(warnings_header([*warnings, *start.warnings]))
        return stream
    with service.scores.taken(question.scores(served.context), "top_logprobs"):
        start = await begun(request, events)
        reply = await until_gone(request, _whole(events, frame, question.n))
    return JSONResponse(reply, headers=warnings_header([*warnings, *start.warnings]))


async def _chunks(
    events: AsyncGenerator[AnswerEvent, None], frame: Frame, count: int, *, counted: bool
) -> AsyncGenerator[ServerEvent, None]:
    """Yield answers as a stream, each begun by its role, in order of their indices."""
    usage = {"usage": None} if counted else {}

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> ServerEvent:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event(frame(CHUNK, [choice], **usage))

    usages: dict[int, Tokens] = {}
    async with aclosing(events):
        for index in range(count):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for one in events:
            if isinstance(one.event, Finish):
                usages[one.index] = one.event.usage
                yield chunk(one.index, {}, finish_reason=one.event.reason)
            elif delta := _delta(one):
                logprobs = _logprobs(one)
                yield chunk(one.index, delta, **({"logprobs": logprobs} if logprobs else {}))
    if counted:
        yield event(frame(CHUNK, [], usage=usage_of([[usages[index] for index in sorted(usages)]])))
    yield DONE


def _delta(answer_event: AnswerEvent) -> dict[str, Any]:
    """Return only the fields that an event adds to a message."""
    match answer_event.event:
        case Reasoning(text):
            # Both names are read by clients.
            return {"reasoning_content": text, "reasoning": text}
        case Content(text):
            return {"content": text}
        case CallStart(index, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": _call_id(), "type": "function", "function": function}
            return {"tool_calls": [call]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return {}


async def _whole(
    events: AsyncGenerator[AnswerEvent, None], frame: Frame, count: int
) -> dict[str, Any]:
    """Return all answers when they are complete."""
    messages = [AnswerMessage() for _ in range(count)]
    async with aclosing(events):
        async for one in events:
            messages[one.index].feed(one)
    usage = usage_of([[one.usage for one in messages if one.usage is not None]])
    choices = [message.choice(index) for index, message in enumerate(messages)]
    return frame(WHOLE, choices, usage=usage)


class AnswerMessage:
    """A message that is put together."""

    def __init__(self) -> None:
        self.usage: Tokens | None = None
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._ended: set[int] = set()
        self._scores: list[dict[str, Any]] = []
        self._reason = "stop"

    def feed(self, answer_event: AnswerEvent) -> None:
        """Add an event of the answer."""
        match answer_event.event:
            case Reasoning(text):
                self._reasoning.append(text)
            case Content(text):
                self._content.append(text)
                self._scores += scored(answer_event.scores)
            case CallStart(_, name):
                function = {"name": name, "arguments": ""}
                self._calls.append({"id": _call_id(), "type": "function", "function": function})
            case CallArguments(index, text):
                self._calls[index]["function"]["arguments"] += text
            case CallEnd(index):
                self._ended.add(index)
            case Finish(reason, usage):
                self._reason, self.usage = reason, usage
            case _:
                pass

    def choice(self, index: int) -> dict[str, Any]:
        """Return it as one of the choices."""
        content: str | None = "".join(self._content)
        calls = self._calls
        if self._reason != "length":
            # One that turned out to be none is content.
            calls = [call for place, call in enumerate(calls) if place in self._ended]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not content else content,
            "refusal": None,
        }
        if self._reasoning:
            thought = "".join(self._reasoning)
            message |= {"reasoning_content": thought, "reasoning": thought}
        if calls:
            message["tool_calls"] = calls
        logprobs = {"content": self._scores, "refusal": None} if self._scores else None
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._reason,
        }


def _logprobs(answer_event: AnswerEvent) -> dict[str, Any] | None:
    if not answer_event.scores or not isinstance(answer_event.event, Content):
        return None
    return {"content": scored(answer_event.scores), "refusal": None}


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
