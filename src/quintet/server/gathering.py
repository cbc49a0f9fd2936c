"""Merges several streams; if one fails or the reader leaves, all end."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

from quintet.server.connection import cancelled

T = TypeVar("T")


class Gathering(Generic[T]):
    """Merges several streams; the creator must close it.

    Args:
        streams: where it comes from.
        width: of how many at once; the others begin when one of these ends.
    """

    def __init__(self, streams: Sequence[AsyncGenerator[T, None]], width: int) -> None:
        self._came: asyncio.Queue[T | Exception | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(width)
        self._open = len(streams)
        self._tasks = [asyncio.ensure_future(self._read(stream)) for stream in streams]

    async def next(self) -> T | None:
        """Return the next item, or None at the end.

        Raises:
            Exception: what one of them raised.
        """
        while self._open:
            one = await self._came.get()
            if isinstance(one, Exception):
                raise one
            if one is not None:
                return one
            self._open -= 1
        return None

    async def first_item(self, seconds: float) -> None:
        """Wait for an item or a timeout.

        Raises:
            Exception: that is what came.
        """
        try:
            async with asyncio.timeout(seconds):
                one = await self._came.get()
        except TimeoutError:
            return
        if isinstance(one, Exception):
            raise one
        # In front of what came meanwhile.
        rest = [self._came.get_nowait() for _ in range(self._came.qsize())]
        for item in (one, *rest):
            self._came.put_nowait(item)

    async def close(self) -> None:
        """End all streams."""
        await cancelled(*self._tasks)

    async def _read(self, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with self._room, aclosing(stream):
                async for one in stream:
                    self._came.put_nowait(one)
        except Exception as error:
            self._came.put_nowait(error)
        else:
            self._came.put_nowait(None)


async def merged(streams: Sequence[AsyncGenerator[T, None]], width: int) -> AsyncGenerator[T, None]:
    """Merge streams, a limited number at once; all end when one fails.

    Raises:
        Exception: what one of them raised.
    """
    gathering = Gathering(streams, width)
    try:
        while (one := await gathering.next()) is not None:
            yield one
    finally:
        await gathering.close()
