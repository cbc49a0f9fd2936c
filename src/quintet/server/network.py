"""HTTP/1.1 connections with time limits."""

import asyncio
import json
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from quintet.server.failures import ApiError
from quintet.server.settings import Settings


def connections(settings: Settings) -> type[asyncio.Protocol]:
    """Return uvicorn's `http` protocol class for these settings."""
    return cast("type[asyncio.Protocol]", partial(_Connection, settings))


class _Connection(H11Protocol):
    """A uvicorn connection with time limits.

    The head of a request has to be there in time, or the connection is closed. A reader that takes
    nothing for long is cut off, as is one that does not take the last of an answer. Routes can cut
    it at once by `abort` in the state of a request.
    """

    def __init__(
        self,
        settings: Settings,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, {**app_state, "abort": self._abort}, _loop)
        self._settings = settings
        self._head = _Alarm(self.loop, settings.head_time, self._close)
        self._unsent = _Alarm(self.loop, settings.stall, self._check_reader)
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))
        # Otherwise the system takes megabytes before it is seen that nobody reads.
        self._set(socket.SO_SNDBUF, self._settings.buffer // 4)
        self._head.start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.stop()
        self._unsent.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._awaits_head:
            self._head.start()
        else:
            self._head.stop()
            if not self.flow.write_paused:
                # Whoever asks again has read the answer before.
                self._unsent.stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP in the uniform error format, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            # Whoever answers the request before finds that its client has gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        error = sys.exception()
        large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        refusal = (
            ApiError(431, "the head of the request is too large", code="request_header_too_large")
            if large
            # What is wrong is told in few words, most of which are the parser's own.
            else ApiError(400, f"this is no HTTP/1.1 request: {error}"[:200], code="invalid_http")
        )
        body = json.dumps(refusal.body()).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=refusal.status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self._watch_reader()
        self.transport.close()

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _close(self) -> None:
        self._watch_reader()
        self.transport.close()

    def _watch_reader(self) -> None:
        self._left = self.transport.get_write_buffer_size()
        if self._left:
            self._unsent.start()

    def _check_reader(self) -> None:
        """Abort if the reader took nothing since; else keep watching."""
        if self.transport.get_write_buffer_size() < self._left:
            self._watch_reader()
        else:
            self._abort()

    def _abort(self) -> None:
        # What was not sent is dropped by the system, too: on, for no second.
        self._set(socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _set(self, option: int, value: int | bytes) -> None:
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, option, value)


class _Alarm:
    """A restartable timer."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, then: Callable[[], None]
    ) -> None:
        self._loop, self._seconds, self._then = loop, seconds, then
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start the timer unless it runs."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._ring)

    def stop(self) -> None:
        """Stop the timer."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ring(self) -> None:
        self._handle = None
        self._then()
