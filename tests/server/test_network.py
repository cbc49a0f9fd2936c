"""Connections that are slow, malformed or greedy: closed in time, and the server answers others."""

import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
from fastapi import FastAPI

from quintet.errors import InputError
from quintet.server.process import HttpServer, listen
from quintet.server.settings import Settings
from served import Running, serving
from waiting import PATIENCE, in_some_try, until


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(keep_alive=1, header=8192) as it:
        yield it


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    """One that waits for nobody; the others have time on a busy machine too."""
    with serving(head_time=0.4, body_time=0.5, keep_alive=1) as it:
        yield it


@contextmanager
def talking(server: Running) -> Iterator[socket.socket]:
    with socket.create_connection((server.host, server.port), timeout=PATIENCE) as sock:
        yield sock


def answers(sock: socket.socket) -> bytes:
    """Return all that comes until the connection is closed."""
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def sent(server: Running, data: bytes) -> bytes:
    with talking(server) as sock:
        sock.sendall(data)
        return answers(sock)


def head(path: str = "/health", *lines: str, method: str = "GET") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", "")).encode()


CLOSING = "Connection: close"


@pytest.fixture(autouse=True)
def others_are_answered(server: Running) -> Iterator[None]:
    yield
    assert server.ask("GET", "/health").status == 200


@pytest.mark.parametrize(
    "first", [b"", b"GET /health HTTP/1.1\r\nHost: loc"], ids=["nothing", "half"]
)
def test_a_head_that_does_not_come_is_not_waited_for(hasty: Running, first: bytes) -> None:
    began = time.monotonic()
    with talking(hasty) as sock:
        sock.sendall(first)
        assert answers(sock) == b""
    assert time.monotonic() - began > 0.3


def test_a_byte_at_a_time_is_not_in_time(hasty: Running) -> None:
    def a_byte_at_a_time(sock: socket.socket) -> None:
        for byte in head(f"/{'a' * 400}"):
            sock.sendall(bytes([byte]))
            time.sleep(0.05)

    with talking(hasty) as sock, pytest.raises(ConnectionError):
        a_byte_at_a_time(sock)


def test_a_body_that_does_not_come_is_not_waited_for(hasty: Running) -> None:
    lines = ("Content-Type: application/json", "Content-Length: 100")
    data = head("/tokenize", *lines, method="POST") + b'{"prompt"'
    # On a busy machine the head may not come in time either.
    answer = in_some_try(lambda: sent(hasty, data), bool)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"request_timeout"' in answer


def test_an_idle_connection_is_closed(hasty: Running) -> None:
    def idle() -> tuple[bytes, float]:
        began = time.monotonic()
        return sent(hasty, head()), time.monotonic() - began

    answer, seconds = in_some_try(idle, lambda found: bool(found[0]))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert seconds > 0.5


def test_a_head_that_is_too_large_is_refused(server: Running) -> None:
    answer = sent(server, head("/health", f"X-Big: {'a' * 1_000_000}", CLOSING))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
    answer = sent(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 8200)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"request_header_too_large"' in answer


CHUNKED = ("Content-Type: application/json", "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
        head("/tokenize", "Content-Length: abc", method="POST"),
        head("/tokenize", "Content-Length: -5", method="POST"),
        head("/tokenize", "Content-Length: 5", "Content-Length: 6", method="POST") + b"{}",
        head("/tokenize", *CHUNKED, method="POST") + b"zz\r\n{}\r\n0\r\n\r\n",
        head("/tokenize", *CHUNKED, method="POST") + b"fffffffffffffffffffff\r\n{}",
        head("/tokenize", *CHUNKED, method="POST") + b"2\r\n{}x0\r\n\r\n",
        head("/tokenize", "Transfer-Encoding: gzip", method="POST"),
    ],
    ids=range(13),
)
def test_what_is_no_http_is_refused(server: Running, data: bytes) -> None:
    answer = sent(server, data)
    assert answer.split(b" ")[1] in (b"400", b"501"), answer
    if answer.startswith(b"HTTP/1.1 400"):
        assert b'"error"' in answer or b"\r\n\r\n" in answer


def test_what_is_wrong_with_a_head_is_told(server: Running) -> None:
    answer = sent(server, b"GET /health HTTP/1.1\r\n\r\n")
    assert b"this is no HTTP/1.1 request: Missing mandatory Host: header" in answer
    answer = sent(server, head("/tokenize", "Content-Length: -5", method="POST"))
    assert b"this is no HTTP/1.1 request: bad Content-Length" in answer


def test_parts_of_a_second_are_parts(server: Running) -> None:
    """An idle connection is kept as long as is said, and not for whole seconds."""
    short = replace(server.service, settings=Settings(port=0, keep_alive=0.25))
    assert HttpServer(short, FastAPI()).config.timeout_keep_alive == 0.25


@pytest.mark.parametrize(
    "given",
    [
        *({name: value} for name in ("keep_alive", "drain", "ping") for value in (inf, nan, 1e300)),
        {"buffer": 1 << 40},
    ],
)
def test_numbers_that_no_timer_and_no_socket_takes_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(given))}="):
        Settings(**given)


def test_requests_may_come_before_their_answers(server: Running) -> None:
    answer = sent(server, head() + head("/version") + head("/ready", CLOSING))
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.index(b"ok") < answer.index(b"version") < answer.index(b"ready")


def test_a_second_request_that_is_malformed_does_not_hurt_the_first(server: Running) -> None:
    answer = sent(server, head() + b"\x00\x01\x02\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"HTTP/1.1 400 " in answer


def test_a_length_that_lies_is_noticed(server: Running, hasty: Running) -> None:
    lines = ("Content-Type: application/json", "Content-Length: 99999999999999999999")
    assert sent(hasty, head("/tokenize", *lines, method="POST") + b"{}")[9:12] in (b"408", b"413")
    lines = ("Content-Type: application/json", "Content-Length: 2", CLOSING)
    answer = sent(server, head("/tokenize", *lines, method="POST") + b'{}{"more": 1}')
    assert answer[9:12] == b"400"


def test_many_connect_and_go(server: Running) -> None:
    for number in range(300):
        with talking(server) as sock:
            if number % 3:
                sock.sendall(head()[: number % 40])
    until(lambda: not server.service.under_way)


def test_bodies_are_bounded_together_too(server: Running) -> None:
    with serving(body=10_000) as small, ExitStack() as stack:
        lines = ("Content-Type: application/json", "Content-Length: 10000")
        socks = [stack.enter_context(talking(small)) for _ in range(40)]
        for sock in socks:
            sock.sendall(head("/tokenize", *lines, method="POST") + b"x" * 9000)

        def refused() -> list[socket.socket]:
            return select.select(socks, [], [], 0)[0]

        # Some, and not all.
        until(lambda: refused() and small.service.receiving >= 32 * 9000)
        for sock in refused():
            answer = b""
            while b'"too_much_sent"' not in answer:
                # Head and body may come apart; nothing comes once it is closed.
                answer += (part := sock.recv(4096))
                assert part, answer
        assert small.ask("GET", "/health").status == 200
        assert small.service.receiving <= 32 * 10_000
        stack.close()
        until(lambda: small.service.receiving == 0)
        assert small.ask("POST", "/tokenize", {"prompt": "a"}).status == 200


def test_this_machine_is_called_by_the_address_that_clients_try() -> None:
    with listen(Settings(host="localhost", port=0)) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"
        with pytest.raises(InputError, match="another --port"):
            listen(Settings(host="localhost", port=sock.getsockname()[1]))
    with pytest.raises(InputError, match="no address of this machine"):
        listen(Settings(host="\ud800"))
