"""Common beginnings of replies."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from quintet.server.connection import until_gone
from quintet.server.questions import AnswerEvent, Start


async def begun(request: Request, events: AsyncGenerator[AnswerEvent, None]) -> Start:
    """Await the first event; earlier errors become the reply.

    Raises:
        ClientGoneError: the client went before.
        Exception: whatever keeps the question from being answered.
    """
    first = await until_gone(request, _first(events))
    assert isinstance(first.event, Start)
    return first.event


async def _first(events: AsyncGenerator[AnswerEvent, None]) -> AnswerEvent:
    return await anext(events)


def json_reply(reply: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON reply; non-finite numbers become null."""
    data = to_json(reply, inf_nan_mode="null")
    return Response(data, headers=headers, media_type="application/json")
