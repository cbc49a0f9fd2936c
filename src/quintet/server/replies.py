"""How a reply begins, whatever its protocol."""

from collections.abc import AsyncGenerator

from starlette.requests import Request

from quintet.server.asking import Heard, Start
from quintet.server.connection import until_gone

__all__ = ["begun"]


async def begun(request: Request, heard: AsyncGenerator[Heard, None]) -> Start:
    """Return what is heard first, once a question is taken; errors until then are the reply.

    Raises:
        ClientGoneError: the client went before.
        Exception: whatever keeps the question from being answered.
    """
    first = await until_gone(request, _first(heard))
    assert isinstance(first.event, Start)
    return first.event


async def _first(heard: AsyncGenerator[Heard, None]) -> Heard:
    return await anext(heard)
