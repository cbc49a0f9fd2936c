"""`POST /v1/responses`: stateless, at once or as events."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quintet.server.asking import Finish, Heard, Prompted, Start, ask
from quintet.server.bodies import documented, read_json
from quintet.server.connection import until_gone
from quintet.server.events import EventStream, ServerEvent
from quintet.server.logs import told_of
from quintet.server.protocol.common import parse, warnings_header
from quintet.server.protocol.response_events import ResponseWriter
from quintet.server.protocol.responses import ResponsesRequest
from quintet.server.replies import begun, json_reply
from quintet.server.service import caller_of, request_id_of, service_of

__all__ = ["router"]

router = APIRouter(tags=["openai"])


@router.post("/v1/responses", openapi_extra=documented(ResponsesRequest))
async def create(request: Request) -> Response:
    """Respond to what was said, with thoughts, text and calls of tools."""
    service = service_of(request)
    settings = service.settings
    body, warnings = parse(
        ResponsesRequest, await read_json(request, settings), strict=settings.strict
    )
    served = await service.registry.get(body.model)
    question = body.ask(settings, served.engine.model.config.vocab_size, caller_of(request))
    heard = ask(served, question)
    start = await begun(request, heard)
    headers = warnings_header([*warnings, *body.warnings(), *start.warnings])
    writer = ResponseWriter(body.response())
    if body.stream:
        stream = EventStream(_told(heard, writer, request_id_of(request)), settings)
        stream.headers.update(headers)
        return stream
    return json_reply(await until_gone(request, _whole(heard, writer)), headers)


async def _events(
    heard: AsyncGenerator[Heard, None], writer: ResponseWriter
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(heard):
        async for one in heard:
            match one.event:
                case Finish():
                    events = writer.finish(one.event)
                case Start() | Prompted():
                    continue
                case event:
                    events = writer.write(event, one.scores)
            for written in events:
                yield written


async def _told(
    heard: AsyncGenerator[Heard, None], writer: ResponseWriter, request_id: str
) -> AsyncGenerator[ServerEvent, None]:
    """Yield a response as it is written; a failure is its last event, too."""
    try:
        for event in writer.begin():
            yield _sent(event)
        async with aclosing(_events(heard, writer)) as events:
            async for event in events:
                yield _sent(event)
    except Exception as error:
        told = told_of(error, request_id)
        failure = {"code": "server_error", "message": told.message}
        for event in writer.fail(failure):
            yield _sent(event)
    finally:
        await heard.aclose()


async def _whole(heard: AsyncGenerator[Heard, None], writer: ResponseWriter) -> dict[str, Any]:
    async with aclosing(_events(heard, writer)) as events:
        async for _ in events:
            pass
    return writer.response


def _sent(event: dict[str, Any]) -> ServerEvent:
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return ServerEvent(data, event["type"])
