"""The server process: listens, drains on a signal, exits with a code."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import cast

import torch
import uvicorn
from fastapi import FastAPI

from quintet.errors import InputError, shown
from quintet.server.app import create_app
from quintet.server.logs import logged
from quintet.server.network import connections
from quintet.server.service import Service
from quintet.server.settings import Settings

# So long a process that was told twice to end may take.
AT_ONCE = 0.8
# So long a server whose model has failed says so before it ends.
LAST_WORDS = 2.0


def listen(settings: Settings) -> socket.socket:
    """Return a listening socket for the settings.

    Raises:
        InputError: it is in use, or none of this machine's.
    """
    host, port = settings.host.strip("[]"), settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise InputError(
            f"--host {shown(host)} is no address of this machine; 127.0.0.1 is, for it alone"
        ) from None
    # Of a name both kinds may be told; most clients of this machine ask by the older one.
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Who takes the same port meanwhile is told of it now, and not when the model is there.
        sock.listen(1)
        return sock
    except OSError as error:
        sock.close()
        raise InputError(
            f"cannot listen at {host}, port {port}: {error.strerror}; end what listens there, or "
            "take another --port (0 for any that is free)"
        ) from None


def serve(service: Service, sock: socket.socket) -> int:
    """Serve until told to stop; return the exit code.

    0 after SIGTERM, 130 after Ctrl-C, 128 and the signal's number where a second one came; 1 where
    a model failed for good, or did not come back from a step.
    """
    # What is drawn without a seed is not what was drawn after the last start.
    torch.seed()
    server = HttpServer(service)
    server.run([sock])
    if server.force_exit:
        # Threads that still compute are not waited for.
        sys.stderr.flush()
        os._exit(server.code)
    service.registry.close()
    return server.code


class HttpServer(uvicorn.Server):
    """A uvicorn server that drains on the first signal and stops on the second.

    The first signal: it takes no new requests and ends when those under way have finished, or
    their time is over. The second: it ends.

    Args:
        service: what it answers for.
        app: what answers; the application of the service if not given.
    """

    def __init__(self, service: Service, app: FastAPI | None = None) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                app or create_app(service),
                http=connections(settings),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # It is what a timer is told, which takes parts of a second, too.
                timeout_keep_alive=cast("int", settings.keep_alive),
                h11_max_incomplete_event_size=settings.header,
                timeout_graceful_shutdown=1,
            )
        )
        self.service = service
        self.code = 0
        self._until: float | None = None
        self._parted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, stop on the second."""
        if self._parted:
            # It ends, and what started all processes tells it to, too, as one of them failed.
            return
        if self.service.draining:
            self.code = 128 + sig
            self.force_exit = self.should_exit = True
            self._end_within(AT_ONCE)
            return
        self.code = 130 if sig == signal.SIGINT else 0
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Return, ten times a second, whether to stop."""
        over = await super().on_tick(counter)
        lost = self.service.registry.parted
        if lost is not None and not self._parted:
            self._parted, self.code, self.service.draining = True, 1, True
            self._until = None
            logged("failed", {"error": str(lost)}, logging.ERROR)
        if not self.service.healthy and not self.service.draining:
            self.code, self.service.draining = 1, True
            if self.service.stuck:
                logged("stuck", {"seconds": self.service.settings.step}, logging.ERROR)
                self._end_within(LAST_WORDS + AT_ONCE)
        if self.service.draining and self._until is None:
            self._begin_to_end()
        if self._until is not None:
            late = time.monotonic() >= self._until
            # Who was told that it failed may ask how it is until then.
            idle = self.service.under_way == 0 and self.code != 1
            if late and not idle and not self.service.stuck:
                # Whoever still waits is told why the answer ends here.
                await asyncio.to_thread(self.service.registry.close)
            over = over or late or idle
        return over

    def _end_within(self, seconds: float) -> None:
        """Exit after a timeout, whatever still runs."""
        timer = threading.Timer(seconds, lambda: os._exit(self.code))
        timer.daemon = True
        timer.start()

    def _begin_to_end(self) -> None:
        seconds = LAST_WORDS if self.code == 1 else self.service.settings.drain
        self._until = time.monotonic() + seconds
        for engine in self.service.registry.engines.values():
            engine.turn_away()
        logged("ending", {"under_way": self.service.under_way, "seconds": seconds})
