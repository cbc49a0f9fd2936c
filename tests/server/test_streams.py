"""Answers in pieces: alive while nothing comes, ended with their readers, bounded."""

import asyncio
import json
import select
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from fastapi import APIRouter, Request

from quintet.errors import EngineStoppedError, QueueFullError
from quintet.server.connection import until_gone
from quintet.server.events import DONE, EventStream, ServerEvent
from quintet.server.failures import ApiError
from quintet.server.service import service_of
from served import Running, serving
from waiting import PATIENCE, in_some_try, until

router = APIRouter()
MIB = 1 << 20
# What was closed, of the routes below.
ENDED: list[str] = []


def stream(request: Request, events: AsyncGenerator[ServerEvent, None]) -> EventStream:
    return EventStream(events, service_of(request).settings)


@router.get("/test/three")
async def three(request: Request) -> EventStream:
    async def events() -> AsyncGenerator[ServerEvent, None]:
        for number in range(3):
            yield ServerEvent(json.dumps({"number": number}), "count" if number == 1 else None)
        yield DONE

    return stream(request, events())


@router.get("/test/silent")
async def silent(request: Request) -> EventStream:
    async def events() -> AsyncGenerator[ServerEvent, None]:
        try:
            if request.query_params.get("first"):
                yield ServerEvent("{}")
            await asyncio.sleep(60)
            yield DONE
        finally:
            ENDED.append(f"silent {request.query_params}")

    return stream(request, events())


@router.get("/test/flood")
async def flood(request: Request) -> EventStream:
    async def events() -> AsyncGenerator[ServerEvent, None]:
        try:
            while True:
                yield ServerEvent("x" * 10_000)
                await asyncio.sleep(0)
        finally:
            ENDED.append("flood")

    return stream(request, events())


@router.get("/test/large")
async def large(request: Request) -> EventStream:
    async def events() -> AsyncGenerator[ServerEvent, None]:
        yield ServerEvent("x" * MIB)
        yield DONE

    return stream(request, events())


ERRORS: dict[str, Callable[[], Exception]] = {
    "full": lambda: QueueFullError("SECRET"),
    "stopped": lambda: EngineStoppedError("SECRET"),
    "own": lambda: ApiError(400, "said"),
    "bug": lambda: KeyError("SECRET"),
}


@router.get("/test/fails")
async def fails(request: Request) -> EventStream:
    asked = request.query_params

    async def events() -> AsyncGenerator[ServerEvent, None]:
        if "late" in asked:
            yield ServerEvent("{}")
        raise ERRORS[asked["error"]]()

    return stream(request, events())


@router.get("/test/raises")
async def raises(request: Request) -> None:
    raise ERRORS[request.query_params["error"]]()


@router.get("/test/works")
async def works(request: Request) -> dict[str, Any]:
    async def work() -> None:
        try:
            await asyncio.sleep(float(request.query_params["seconds"]))
        except asyncio.CancelledError:
            ENDED.append("works")
            raise

    await until_gone(request, work())
    return {"done": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(router=router, ping=0.2, stall=0.6) as it:
        yield it


def opened(server: Running, path: str, receive_buffer: int | None = None) -> socket.socket:
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(PATIENCE)
    sock.connect((server.host, server.port))
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return sock


def read_all(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


def test_events_are_written_as_the_standard_has_them(server: Running) -> None:
    answer = server.ask("GET", "/test/three")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.body == (
        b'data: {"number": 0}\n\nevent: count\ndata: {"number": 1}\n\n'
        b'data: {"number": 2}\n\ndata: [DONE]\n\n'
    )
    assert ServerEvent("a\nb").encode() == b"data: a\ndata: b\n\n"


@pytest.mark.parametrize("path", ["/test/silent", "/test/silent?first=1"])
def test_the_head_comes_at_once_and_then_signs_of_life(server: Running, path: str) -> None:
    def head_alone() -> bool:
        with opened(server, path) as sock:
            seen = first = sock.recv(4096)
            while seen.count(b": ping\n\n") < 2:
                seen += sock.recv(4096)
        return b" 200 OK" in first and b"ping" not in first

    # On a busy machine both may be there before one looks.
    in_some_try(head_alone, bool)


@pytest.mark.parametrize("path", ["/test/silent?a", "/test/silent?first=1"])
@pytest.mark.parametrize("wait", [0, 0.05, 0.3])
def test_a_stream_ends_with_its_reader(server: Running, path: str, wait: float) -> None:
    ENDED.clear()
    sock = opened(server, path)
    until(lambda: server.service.under_way == 1)
    time.sleep(wait)
    sock.close()
    until(lambda: bool(ENDED))
    until(lambda: server.service.under_way == 0)


def test_work_without_a_stream_ends_with_its_client(server: Running) -> None:
    ENDED.clear()
    sock = opened(server, "/test/works?seconds=60")
    until(lambda: server.service.under_way == 1)
    sock.close()
    until(lambda: ENDED == ["works"])
    until(lambda: server.service.under_way == 0)


def test_a_client_that_stops_sending_is_gone(server: Running) -> None:
    """As with most servers: half a connection is no client of HTTP."""
    ENDED.clear()
    with opened(server, "/test/works?seconds=60") as sock:
        until(lambda: server.service.under_way == 1)
        sock.shutdown(socket.SHUT_WR)
        until(lambda: ENDED == ["works"])
    until(lambda: server.service.under_way == 0)


def test_who_does_not_read_is_cut_off(server: Running) -> None:
    ENDED.clear()
    with opened(server, "/test/flood", receive_buffer=4096) as sock:
        until(lambda: ENDED == ["flood"])
        until(lambda: server.service.under_way == 0)
        with pytest.raises(ConnectionResetError):
            read_all(sock)


def test_a_slow_reader_of_much_at_once_is_waited_for() -> None:
    with (
        serving(router=router, stall=10) as server,
        opened(server, "/test/large", receive_buffer=1 << 16) as sock,
    ):
        seen = 0
        while chunk := sock.recv(1 << 14):
            seen += len(chunk)
            time.sleep(0.002)
            if b"[DONE]" in chunk:
                break
        assert seen > MIB


def test_who_takes_nothing_of_the_end_is_cut_off(server: Running) -> None:
    with opened(server, "/test/large", receive_buffer=4096) as sock:
        ends = select.poll()
        # Of that it was cut off poll always tells.
        ends.register(sock, 0)
        assert ends.poll(1000 * PATIENCE)
        with pytest.raises(ConnectionResetError):
            read_all(sock)
    until(lambda: server.service.under_way == 0)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        ("full", 503, "queue_full"),
        ("stopped", 503, "server_shutdown"),
        ("own", 400, None),
        ("bug", 500, "internal_error"),
    ],
)
def test_an_error_is_an_answer_before_the_first_event_and_an_event_after(
    server: Running, error: str, status: int, code: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (f"/test/raises?error={error}", f"/test/fails?error={error}"):
        answer = server.ask("GET", path)
        assert (answer.status, answer.error["code"]) == (status, code)
        assert ("retry-after" in answer.headers) == (status == 503)
        assert b"SECRET" not in answer.body
        if status == 500:
            assert answer.headers["x-request-id"] in answer.error["message"]
    late = server.ask("GET", f"/test/fails?late=1&error={error}")
    assert late.status == 200
    first, last, end = late.body.split(b"\n\n")
    assert (first, end) == (b"data: {}", b"")
    told = json.loads(last.removeprefix(b"data: "))
    assert told["error"]["code"] == code
    assert b"SECRET" not in late.body
    captured = capfd.readouterr()
    assert "SECRET" not in captured.out + captured.err


class Ends:
    """Takes note of how requests ended."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, str | None]] = []

    def answered(
        self, route: str, method: str, status: int, seconds: float, code: str | None
    ) -> None:
        self.seen.append((route, status, code))


def test_how_a_request_ended_is_told(server: Running) -> None:
    ends = Ends()
    # What was asked before ends first.
    until(lambda: server.service.under_way == 0)
    server.service.observers.append(ends)
    try:
        server.ask("GET", "/test/fails?late=1&error=full")
        server.ask("GET", "/test/fails?error=full")
        server.ask("GET", "/test/three")
        sock = opened(server, "/test/silent")
        # One that goes before its request was read has made none.
        until(lambda: server.service.under_way == 1)
        sock.close()
        until(lambda: len(ends.seen) >= 4)
    finally:
        server.service.observers.remove(ends)
    assert ends.seen == [
        ("/test/fails", 200, "queue_full"),
        ("/test/fails", 503, "queue_full"),
        ("/test/three", 200, None),
        ("/test/silent", 499, "client_gone"),
    ]


def test_a_thousand_readers_that_go(server: Running) -> None:
    for _ in range(250):
        opened(server, "/test/silent").close()
        opened(server, "/test/silent?first=1").close()
        opened(server, "/test/works?seconds=60").close()
        opened(server, "/test/flood").close()
    until(lambda: server.service.under_way == 0)


def test_there_are_not_endlessly_many_at_once() -> None:
    with serving(router=router, requests=3) as server:
        socks = [opened(server, "/test/silent") for _ in range(3)]
        until(lambda: server.service.under_way == 3)
        answer = server.ask("GET", "/version")
        assert (answer.status, answer.error["code"]) == (503, "too_many_requests")
        assert answer.headers["retry-after"]
        assert server.ask("GET", "/health").status == 200
        for sock in socks:
            sock.close()
        until(lambda: server.service.under_way == 0)
        assert server.ask("GET", "/version").status == 200
