"""HTTP as a load generator needs it: a connection a request, and each piece when it comes."""

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from quintet.errors import InputError, ServingError, shown

# The longest line, the most headers and the longest body that are read; a server's answers are far
# below.
LINE = 1 << 22
HEADERS = 1000
BODY = 1 << 26
# So much of a body is read at once, however large a server says that it is.
PIECE = 1 << 16
_STATUS, _LENGTH = re.compile(r"[1-9][0-9]{2}"), re.compile(r"[0-9]{1,18}")
_CHUNK = re.compile(rb"[0-9a-fA-F]{1,15}")
_PATH = re.compile(r"[!-~]*")


class Reply:
    """A reply whose head has been read.

    Attributes:
        status: the number of its first line.
        headers: by their names in lower case; of several alike, the last.
    """

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> None:
        self._reader, self.status, self.headers = reader, status, headers

    @classmethod
    async def begin(cls, reader: asyncio.StreamReader) -> "Reply":
        """Read the head of an answer."""
        line = (await _line(reader)).decode("latin-1").strip()
        version, _, rest = line.partition(" ")
        status = rest.partition(" ")[0]
        if not version.startswith("HTTP/1.") or not _STATUS.fullmatch(status):
            raise ServingError(f"the answer is not HTTP/1.1: it begins with {shown(line)}")
        headers: dict[str, str] = {}
        for _ in range(HEADERS):
            line = (await _line(reader)).decode("latin-1").strip()
            if not line:
                return cls(reader, int(status), headers)
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        raise ServingError(f"the answer is not HTTP/1.1: it has more than {HEADERS:,} headers")

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes; ServingError where it ends before its end."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := await self._size():
                async for piece in self._exactly(size):
                    yield piece
                await self._whole_line()
            return
        length = self.headers.get("content-length")
        if length is not None:
            if not _LENGTH.fullmatch(length):
                raise ServingError(f"the answer is not HTTP/1.1: its length is {shown(length)}")
            async for piece in self._exactly(int(length)):
                yield piece
            return
        while piece := await self._reader.read(PIECE):
            yield piece

    async def read(self) -> bytes:
        """Return the whole body."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > BODY:
                raise ServingError(f"an answer is longer than {BODY:,} bytes")
        return bytes(body)

    async def events(self) -> AsyncIterator[str]:
        """Yield the data of each server-sent event when its last line is there."""
        left, data, size = b"", list[str](), 0
        async for piece in self.pieces():
            *lines, left = (left + piece).split(b"\n")
            if size + len(left) > LINE:
                raise ServingError(f"an event of an answer is longer than {LINE:,} bytes")
            for line in lines:
                text = line.rstrip(b"\r").decode("utf-8", "replace")
                if text.startswith("data:"):
                    data.append(text.removeprefix("data:").removeprefix(" "))
                    size += len(text)
                elif not text and data:
                    yield "\n".join(data)
                    data, size = [], 0

    async def _size(self) -> int:
        """Return the length of the next piece; 0 behind the last."""
        size = (await self._whole_line()).partition(b";")[0].strip()
        if not _CHUNK.fullmatch(size):
            raise ServingError(f"the answer is not HTTP/1.1: a piece of it has the size {size!r}")
        return int(size, 16)

    async def _whole_line(self) -> bytes:
        line = await _line(self._reader)
        if not line.endswith(b"\n"):
            raise ServingError("the answer was cut off")
        return line.strip()

    async def _exactly(self, size: int) -> AsyncIterator[bytes]:
        while size:
            piece = await self._reader.read(min(size, PIECE))
            if not piece:
                raise ServingError("the answer was cut off")
            size -= len(piece)
            yield piece


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ValueError:
        raise ServingError(f"a line of an answer is longer than {LINE:,} bytes") from None


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
        """Read a URL, with or without `/v1` at its end.

        Raises:
            InputError: it is none, or the key is none that a header can have.
        """
        given = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(given)
            host, port = (parts.hostname or "").encode("idna").decode(), parts.port
        except ValueError:
            parts, host, port = urlsplit(""), "", None
        if parts.username is not None:
            # Not shown: there may be a password in it.
            raise InputError(
                "the address of a server names no user and no password; a key is read from "
                "QUINTET_API_KEY or --api-key-file"
            )
        secure = parts.scheme == "https"
        port = (443 if secure else 80) if port is None else port
        more = parts.query or parts.fragment or not _PATH.fullmatch(parts.path)
        if parts.scheme not in ("http", "https") or not host or not port or more:
            raise InputError(
                f"{shown(url)} is no address of a server; they look like http://127.0.0.1:8000"
            )
        if key is not None and not (key.isascii() and key.isprintable()):
            raise InputError("the key has to be printable ASCII, as it travels in a header")
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(host, port, base, secure, key)

    @asynccontextmanager
    async def ask(self, path: str, body: Any = None) -> AsyncIterator[Reply]:
        """Send a request, a GET or a POST with a body, and return the reply.

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
        """Return a reply's status and JSON; None if it is no JSON."""
        async with self.ask(path, body) as reply:
            content = await reply.read()
        try:
            return reply.status, json.loads(content)
        except (ValueError, RecursionError):
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
