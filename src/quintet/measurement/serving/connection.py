"""HTTP as a load generator needs it: a connection a request, and each piece when it comes."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from quintet.errors import InputError, ServingError, shown

# The longest line and the longest body that are read; a server's answers are far below.
LINE = 1 << 22
BODY = 1 << 26


class Reply:
    """An answer, of which the head has been read.

    Attributes:
        status: the number of its first line.
        headers: by their names in lower case; of several alike, the last.
    """

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> None:
        self._reader, self.status, self.headers = reader, status, headers

    @classmethod
    async def begin(cls, reader: asyncio.StreamReader) -> "Reply":
        """Read the head of an answer."""
        first = (await reader.readline()).decode("latin-1").split(maxsplit=2)
        if len(first) < 2 or not first[0].startswith("HTTP/1.") or not first[1].isdigit():
            raise ServingError(f"the answer is not HTTP/1.1: it begins with {shown(first)}")
        headers: dict[str, str] = {}
        while (line := (await reader.readline()).decode("latin-1").strip()) != "":
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return cls(reader, int(first[1]), headers)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes; ServingError where it ends before its end."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self._line()).split(b";")[0], 16):
                yield await self._exactly(size)
                await self._line()
            return
        length = self.headers.get("content-length")
        if length is not None:
            yield await self._exactly(int(length))
            return
        while piece := await self._reader.read(1 << 16):
            yield piece

    async def read(self) -> bytes:
        """Return the whole body."""
        body = b""
        async for piece in self.pieces():
            body += piece
            if len(body) > BODY:
                raise ServingError(f"an answer is longer than {BODY:,} bytes")
        return body

    async def events(self) -> AsyncIterator[str]:
        """Yield the data of each server-sent event when its last line is there."""
        left, data = b"", list[str]()
        async for piece in self.pieces():
            *lines, left = (left + piece).split(b"\n")
            if len(left) > LINE:
                raise ServingError(f"a line of an answer is longer than {LINE:,} bytes")
            for line in lines:
                text = line.rstrip(b"\r").decode("utf-8", "replace")
                if text.startswith("data:"):
                    data.append(text.removeprefix("data:").removeprefix(" "))
                elif not text and data:
                    yield "\n".join(data)
                    data = []

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise ServingError("the answer was cut off")
        return line.strip()

    async def _exactly(self, size: int) -> bytes:
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError:
            raise ServingError("the answer was cut off") from None


@dataclass(frozen=True, slots=True)
class Address:
    """A server's address and credentials.

    Attributes:
        host: its name or number.
        port: its port.
        base: what paths begin with, without a slash at its end.
        secure: whether it is spoken to by TLS.
        key: sent as a bearer token; None for none.
    """

    host: str
    port: int
    base: str = ""
    secure: bool = False
    key: str | None = None

    @classmethod
    def of(cls, url: str, key: str | None = None) -> "Address":
        """Read a URL, with or without `/v1` at its end; InputError where it is none."""
        given = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(given)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise InputError(
                f"{shown(url)} is no address of a server; they look like http://127.0.0.1:8000"
            )
        secure = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if secure else 80), base, secure, key)

    @asynccontextmanager
    async def ask(self, path: str, body: Any = None) -> AsyncIterator[Reply]:
        """Send a request, a GET or what a body is posted to, and give what is answered.

        A body that is no bytes is sent as JSON.

        To leave the context is to hang up, whatever of the answer has been read.
        """
        context = ssl.create_default_context() if self.secure else None
        reader, writer = await asyncio.open_connection(
            self.host, self.port, ssl=context, limit=LINE
        )
        try:
            writer.write(self._request(path, body))
            await writer.drain()
            yield await Reply.begin(reader)
        finally:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    async def fetch(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Return an answer's status and what its JSON says; None where it is no JSON."""
        async with self.ask(path, body) as reply:
            content = await reply.read()
        try:
            return reply.status, json.loads(content)
        except ValueError:
            return reply.status, None

    def _request(self, path: str, body: Any) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{'GET' if body is None else 'POST'} {self.base}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "Connection: close",
            "Accept: */*",
        ]
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        content = b""
        if body is not None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + content
