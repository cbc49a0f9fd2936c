"""A server within the process of the tests: on a thread, at a port that was free."""

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from quintet import AutoModelForCausalLM, AutoTokenizer, demo_model
from quintet.server.app import create_app
from quintet.server.process import HttpServer, listen
from quintet.server.registry import Loaded, ModelRegistry, Offer
from quintet.server.service import Service
from quintet.server.settings import Settings
from quintet.serving import Engine, Limits
from waiting import PATIENCE

__all__ = ["Answered", "Running", "loaded", "running", "serving"]


@dataclass(frozen=True)
class Answered:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json()["error"]
        return error


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    service: Service
    server: HttpServer
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def connect(self, timeout: float = PATIENCE) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = PATIENCE,
    ) -> Answered:
        """Send a request, a body that is no bytes as JSON, and return what comes back."""
        sent = {} if body is None else {"Content-Type": "application/json"}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = self.connect(timeout)
        try:
            connection.request(method, path, body, {**sent, **(headers or {})})
            answer = connection.getresponse()
            return Answered(answer.status, answer.headers, answer.read())
        finally:
            connection.close()


def loaded(limits: Limits | None = None, source: Path | None = None) -> Loaded:
    """Return a model, the packaged one if none is named, with an engine; who asks closes it."""
    model = AutoModelForCausalLM.from_pretrained(source or demo_model())
    tokenizer = AutoTokenizer.from_pretrained(source or demo_model())
    limits = limits or Limits(rows=4, capacity=256)
    return Loaded(Engine(model, tokenizer, limits), tokenizer, limits.capacity, "fp_test")


@contextmanager
def serving(*offers: Offer, router: APIRouter | None = None, **settings: Any) -> Iterator[Running]:
    """Serve offers, by default the packaged model as `demo`, and stop in the end.

    With the routes of a router beside the server's own.
    """
    registry = ModelRegistry(offers or (Offer("demo", loaded, loaded=loaded()),))

    def made(service: Service) -> HttpServer:
        app = create_app(service)
        if router is not None:
            app.include_router(router)
        return HttpServer(service, app)

    try:
        with running(Service(Settings(**{"port": 0, **settings}), registry), made) as it:
            yield it
    finally:
        registry.close()


@contextmanager
def running(
    service: Service, made: Callable[[Service], HttpServer] = HttpServer
) -> Iterator[Running]:
    """Run a service at a free port."""
    sock = listen(service.settings)
    server = made(service)
    started = threading.Event()

    async def run() -> None:
        task = asyncio.ensure_future(server.serve([sock]))
        while not server.started and not task.done():
            await asyncio.sleep(0.001)
        started.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert started.wait(PATIENCE)
        yield Running(service, server, "127.0.0.1", sock.getsockname()[1])
    finally:
        server.force_exit = server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
