"""`POST /v1/messages` in Anthropic's shape, and the counting of its tokens."""

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from quintet.server.asking import ask
from quintet.server.bodies import documented, received
from quintet.server.connection import until_gone
from quintet.server.conversation import render
from quintet.server.events import EventStream
from quintet.server.protocol.common import warnings_header
from quintet.server.protocol.message_events import PING, MessageWriter
from quintet.server.protocol.messages import CountTokensRequest, MessagesRequest, error_body
from quintet.server.protocol.prompts import placed
from quintet.server.replies import begun, json_reply
from quintet.server.service import caller_of, service_of
from quintet.server.writing import finished, named, written

router = APIRouter(tags=["anthropic"])
MESSAGES, COUNTING = "/v1/messages", "/v1/messages/count_tokens"


@router.post(MESSAGES, openapi_extra=documented(MessagesRequest))
async def create(request: Request) -> Response:
    """Answer in a conversation, at once or as events."""
    service = service_of(request)
    body, warnings = await received(request, MessagesRequest)
    served = await service.registry.get(body.model)
    question = body.ask(service.settings, served.engine.model.config.vocab_size, caller_of(request))
    events = ask(served, question)
    start = await begun(request, events)
    headers = warnings_header([*warnings, *start.warnings])
    writer = MessageWriter(body.model, start.prompt, silent=body.silent)
    if body.stream:
        stream = EventStream(
            written(events, writer),
            service.settings,
            write=error_body,
            failed="error",
            ping=named(PING).encode(),
        )
        stream.headers.update(headers)
        return stream
    await until_gone(request, finished(events, writer))
    return json_reply(writer.message, headers)


@router.post(COUNTING, openapi_extra=documented(CountTokensRequest))
async def count_tokens(request: Request) -> Response:
    """Return the number of tokens of a prompt."""
    service = service_of(request)
    body, warnings = await received(request, CountTokensRequest)
    served = await service.registry.get(body.model)
    _, conversation = body.conversation(service.settings)
    with placed("messages"):
        prompt = await asyncio.to_thread(render, served.tokenizer, conversation, served.context)
    headers = warnings_header([*warnings, *prompt.warnings])
    return json_reply({"input_tokens": len(prompt.ids)}, headers)
