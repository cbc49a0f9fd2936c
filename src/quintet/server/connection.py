"""Detects disconnected and slow clients."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client disconnected."""


class SlowReaderError(ClientGoneError):
    """The client does not read the answer."""


async def gone(receive: Receive) -> None:
    """Return when the client has disconnected; call it after reading the body."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Await a task; cancel it if the client disconnects.

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
    """Cancel tasks and wait for them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
