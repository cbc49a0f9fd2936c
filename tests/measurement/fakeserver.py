"""A server that speaks as much of OpenAI's protocol as a load generator asks for, and no model."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FakeServer"]


@dataclass
class FakeServer:
    """Answers in a thread of its own.

    Attributes:
        ids: whether prompts may be ids, and text is tokenized: a token a letter.
        usage: whether it counts tokens.
        chunked: whether the stream comes in chunks; else until it hangs up.
        pause: seconds before each token.
        fails: the status of every n-th completion, by n.
        cuts: whether streams end before their end.
        asked: the bodies of completions, in order.
        begun, left: how many were begun, and how many left before their end.
    """

    ids: bool = True
    usage: bool = True
    chunked: bool = True
    pause: float = 0.0
    fails: dict[int, int] = field(default_factory=dict)
    cuts: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)
    begun: int = 0
    left: int = 0
    most_at_once: int = 0
    url: str = ""

    @contextmanager
    def running(self) -> Iterator["FakeServer"]:
        loop, ready = asyncio.new_event_loop(), threading.Event()
        stop = asyncio.Event()
        self._now = 0

        async def serve() -> None:
            server = await asyncio.start_server(self._client, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ready.set()
            async with server:
                await stop.wait()

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
        thread.start()
        ready.wait()
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.run_until_complete(_end())
            loop.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
            await writer.drain()
            writer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            if not writer.is_closing():
                writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            (int(x.split(":")[1]) for x in head.split("\r\n") if x.lower().startswith("content-l")),
            0,
        )
        body = json.loads(await reader.readexactly(length)) if length else None
        path = head.split()[1]
        if path == "/v1/models":
            self._json(writer, 200, {"data": [{"id": "fake"}]})
        elif path == "/tokenize" and self.ids and "prompt" in body:
            tokens = [0, *(ord(letter) for letter in body["prompt"])]
            self._json(writer, 200, {"tokens": tokens})
        elif path in ("/v1/completions", "/v1/chat/completions"):
            await self._complete(writer, path.endswith("chat/completions"), body)
        else:
            self._json(writer, 404, {"error": {"code": "not_found", "message": "SECRET"}})

    def _json(self, writer: asyncio.StreamWriter, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)

    async def _complete(self, writer: asyncio.StreamWriter, chat: bool, body: Any) -> None:
        self.asked.append(body)
        for every, status in self.fails.items():
            if len(self.asked) % every == 0:
                self._json(writer, status, {"error": {"code": "queue_full", "message": "SECRET"}})
                return
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        kind = "Transfer-Encoding: chunked\r\n" if self.chunked else ""
        writer.write(f"HTTP/1.1 200 OK\r\n{kind}\r\n".encode())
        self.begun += 1
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            for number in range(body["max_tokens"]):
                if self.pause:
                    await asyncio.sleep(self.pause)
                last = number + 1 == body["max_tokens"]
                choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None}
                choice |= {"delta": {"content": "x"}} if chat else {"text": "x"}
                if last and self.cuts:
                    return
                self._event(writer, {"choices": [choice]})
                await writer.drain()
            if self.usage:
                usage = {
                    "prompt_tokens": len(prompt),
                    "completion_tokens": body["max_tokens"],
                    "prompt_tokens_details": {"cached_tokens": len(prompt) // 2},
                }
                self._event(writer, {"choices": [], "usage": usage})
            self._event(writer, None)
            if self.chunked:
                writer.write(b"0\r\n\r\n")
        except ConnectionError:
            self.left += 1
        finally:
            self._now -= 1

    def _event(self, writer: asyncio.StreamWriter, value: Any) -> None:
        if writer.is_closing():
            raise ConnectionResetError
        content = b"data: " + (b"[DONE]" if value is None else json.dumps(value).encode()) + b"\n\n"
        if not self.chunked:
            writer.write(b": ping\n\n" + content)
            return
        # Cut in the midst: where an event ends is not where a piece ends.
        for part in (content[:9], content[9:]):
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")


async def _end() -> None:
    """End what still goes on in this loop, and let what was closed go."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await asyncio.sleep(0)
