"""The client at the other end: when it goes, what was done for it ends."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class SlowReaderError(ClientGoneError):
    """Whoever waits for the answer does not take it."""


async def gone(receive: Receive) -> None:
    """Return when the client has gone; the body of its request has to have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what a piece of work comes to; cancel it when the client goes.

    Raises:
        ClientGoneError: the client went first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await cancelled(task, watch)


async def cancelled(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks, and return when they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
