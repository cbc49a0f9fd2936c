"""Server-sent events with keep-alives and bounded buffers."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quintet.server.connection import ClientGoneError, SlowReaderError, cancelled, gone
from quintet.server.failures import ApiError, ErrorBody
from quintet.server.logs import error_of_request
from quintet.server.settings import Settings

# So long the first event may take until the head is sent: an error before is one of HTTP.
FIRST = 0.1
PING = b": ping\n\n"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """An event of a stream.

    Attributes:
        data: its text, JSON as a rule.
        event: its name; None for none.
    """

    data: str
    event: str | None = None

    def encode(self) -> bytes:
        """Return the wire format."""
        name = "" if self.event is None else f"event: {self.event}\n"
        lines = "".join(f"data: {line}\n" for line in self.data.split("\n"))
        return f"{name}{lines}\n".encode()


DONE = ServerEvent("[DONE]")


class EventStream(Response):
    """Streams events; closes their source when the client goes or is too slow.

    An error before the first event is answered as one; a later one is the last event.

    Args:
        events: where they come from. What is asked of an engine should be asked before the first
            is yielded.
        settings: how often to ping, and how much may wait for a slow reader.
        write: writes an error as the protocol has it.
        failed: the name of the event that tells of an error.
        ping: what shows that the stream is alive.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[ServerEvent, None],
        settings: Settings,
        *,
        write: ErrorBody = ApiError.body,
        failed: str | None = None,
        ping: bytes = PING,
    ) -> None:
        # Proxies that buffer would hold the answer back.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._settings = events, settings
        self._write, self._failed, self._ping = write, failed, ping
        self._waiting: deque[bytes] = deque()
        self._size = self._largest = 0
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream.

        Raises:
            ClientGoneError: the client went.
            SlowReaderError: it took too little.
        """
        state = scope["state"]
        pump = asyncio.ensure_future(self._pump())
        watch = asyncio.ensure_future(gone(receive))
        sender = asyncio.ensure_future(self._send(send, state))
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait((pump, watch, sender), return_when=first)
            if pump.done():
                pump.result()
                await asyncio.wait((watch, sender), return_when=first)
            if not sender.done():
                raise ClientGoneError
            sender.result()
        finally:
            await cancelled(sender, pump, watch)

    async def _pump(self) -> None:
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    # One that is large by itself is nobody's slowness.
                    if self._size > self._settings.buffer + self._largest:
                        raise SlowReaderError
                    self._put(event)
        except SlowReaderError:
            raise
        except Exception as error:
            self._error = error
        finally:
            self._over = True
            self._news.set()

    def _put(self, event: ServerEvent) -> None:
        data = event.encode()
        self._waiting.append(data)
        self._size += len(data)
        self._largest = max(self._largest, len(data))
        self._news.set()

    async def _send(self, send: Send, state: dict[str, Any]) -> None:
        await self._something(FIRST)
        if not self._waiting and self._error is not None:
            raise self._error
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        while True:
            while self._waiting:
                data = b"".join(self._waiting)
                self._waiting.clear()
                # Counted until it is sent: meanwhile it waits as well.
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._size -= len(data)
            if self._over:
                break
            if not await self._something(self._settings.ping):
                await send({"type": "http.response.body", "body": self._ping, "more_body": True})
        last = b""
        if self._error is not None:
            api_error = error_of_request(self._error, str(state.get("request_id")))
            state["error_code"] = api_error.code
            body = json.dumps(self._write(api_error), ensure_ascii=False)
            last = ServerEvent(body, self._failed).encode()
        await send({"type": "http.response.body", "body": last})

    async def _something(self, seconds: float) -> bool:
        """Wait for an event or the end; return whether there is one."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True
