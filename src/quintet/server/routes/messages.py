"""`POST /v1/messages` in Anthropic's shape, and the counting of its tokens."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quintet.server.asking import Finish, Heard, Prompted, Start, ask
from quintet.server.bodies import documented, read_json
from quintet.server.connection import until_gone
from quintet.server.conversation import render
from quintet.server.events import EventStream, ServerEvent
from quintet.server.protocol.common import parse, warnings_header
from quintet.server.protocol.message_events import PING, MessageWriter
from quintet.server.protocol.messages import CountTokensRequest, MessagesRequest, error_body
from quintet.server.replies import begun, json_reply
from quintet.server.service import caller_of, service_of

__all__ = ["COUNTING", "MESSAGES", "router"]

router = APIRouter(tags=["anthropic"])
MESSAGES, COUNTING = "/v1/messages", "/v1/messages/count_tokens"


@router.post(MESSAGES, openapi_extra=documented(MessagesRequest))
async def create(request: Request) -> Response:
    """Answer in a conversation, at once or as events."""
    service = service_of(request)
    settings = service.settings
    body, warnings = parse(
        MessagesRequest, await read_json(request, settings), strict=settings.strict
    )
    served = await service.registry.get(body.model)
    question = body.ask(settings, served.engine.model.config.vocab_size, caller_of(request))
    heard = ask(served, question)
    start = await begun(request, heard)
    headers = warnings_header([*warnings, *start.warnings])
    writer = MessageWriter(body.model, start.prompt, silent=body.silent)
    if body.stream:
        stream = EventStream(
            _told(heard, writer),
            settings,
            write=error_body,
            failed="error",
            ping=_sent(PING).encode(),
        )
        stream.headers.update(headers)
        return stream
    return json_reply(await until_gone(request, _whole(heard, writer)), headers)


@router.post(COUNTING, openapi_extra=documented(CountTokensRequest))
async def count_tokens(request: Request) -> Response:
    """Return how many tokens a prompt has."""
    service = service_of(request)
    settings = service.settings
    body, warnings = parse(
        CountTokensRequest, await read_json(request, settings), strict=settings.strict
    )
    served = await service.registry.get(body.model)
    _, conversation = body.conversation(settings)
    prompt = await asyncio.to_thread(render, served.tokenizer, conversation, served.context)
    headers = warnings_header([*warnings, *prompt.warnings])
    return json_reply({"input_tokens": len(prompt.ids)}, headers)


async def _events(
    heard: AsyncGenerator[Heard, None], writer: MessageWriter
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(heard):
        async for one in heard:
            match one.event:
                case Finish():
                    events = writer.finish(one.event)
                case Start() | Prompted():
                    continue
                case event:
                    events = writer.write(event)
            for written in events:
                yield written


async def _told(
    heard: AsyncGenerator[Heard, None], writer: MessageWriter
) -> AsyncGenerator[ServerEvent, None]:
    async with aclosing(_events(heard, writer)) as events:
        for event in writer.begin():
            yield _sent(event)
        async for event in events:
            yield _sent(event)


async def _whole(heard: AsyncGenerator[Heard, None], writer: MessageWriter) -> dict[str, Any]:
    async with aclosing(_events(heard, writer)) as events:
        async for _ in events:
            pass
    return writer.message


def _sent(event: dict[str, Any]) -> ServerEvent:
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return ServerEvent(data, event["type"])
