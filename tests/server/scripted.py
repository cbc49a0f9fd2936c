"""A server that says what it is told to: OpenAI's events, whatever a test wants in them."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from quintet.server.page import join

__all__ = ["Scripted", "running"]

MODEL = {"id": "script", "context": 2048, "chat": True, "thinking": None}
DEFAULTS = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_tokens": 512}


class Scripted:
    """What is answered, and what was asked.

    `answers` are taken from the front, and the last one stays: pieces of an answer, each a text or
    a delta, or an error as a status, a body and headers. None waits until `go` is set.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Be as at the beginning."""
        self.answers: list[Any] = [["Hello"]]
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.gone = 0
        self.ending = "stop"
        self.go = threading.Event()
        self.models = [{**MODEL, "defaults": DEFAULTS}]
        self.key: str | None = None
        self.lists = True
        self.warnings = ""

    def app(self) -> Starlette:
        page = join()
        return Starlette(
            routes=[
                Route("/", lambda _: Response(page.body, headers=page.headers)),
                Route("/page/config", self.config),
                Route("/v1/models", self.listed),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.chat, methods=["POST"]),
            ]
        )

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "no key"}}, 401)

    async def config(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"models": self.models})

    async def listed(self, request: Request) -> Response:
        if not self.lists:
            return JSONResponse({"detail": "Not Found"}, 404)
        data = [
            {"id": model["id"], "object": "model", "max_model_len": model["context"]}
            for model in self.models
        ]
        return self._refused(request) or JSONResponse({"object": "list", "data": data})

    async def chat(self, request: Request) -> Response:
        self.keys.append(request.headers.get("authorization"))
        if (refused := self._refused(request)) is not None:
            return refused
        self.asked.append(await request.json())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, tuple):
            status, body, headers = answer
            return JSONResponse(body, status, headers)
        headers = {"warnings": self.warnings} if self.warnings else {}
        events = self.events(answer)
        return StreamingResponse(events, headers=headers, media_type="text/event-stream")

    async def events(self, answer: list[Any]) -> AsyncIterator[str]:
        def event(**value: Any) -> str:
            return f"data: {json.dumps(value)}\n\n"

        def choice(delta: Any, ending: str | None = None) -> str:
            text = {"text": delta.get("content", "")}
            return event(choices=[{"index": 0, "delta": delta, **text, "finish_reason": ending}])

        try:
            yield ": ping\n\n"
            yield choice({"role": "assistant", "content": ""})
            for piece in answer:
                if piece is None:
                    while not self.go.is_set():
                        yield ": ping\n\n"
                        await asyncio.sleep(0.02)
                elif isinstance(piece, dict) and "error" in piece:
                    yield event(**piece)
                    return
                else:
                    yield choice({"content": piece} if isinstance(piece, str) else piece)
            yield choice({}, self.ending)
            usage = {
                "prompt_tokens": 10,
                "completion_tokens": len(answer),
                "total_tokens": 10 + len(answer),
            }
            yield event(choices=[], usage=usage)
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.gone += 1
            raise


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve an app on a thread, and give its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()
