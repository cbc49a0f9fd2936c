"""Clients that go: whatever they were at, their rows are free and the others are answered."""

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from quintet.server.registry import Offer
from quintet.serving import Engine, Limits
from served import Running, loaded, serving

ROWS = 2
LONG = "def f(x):\n    return x\n" * 60


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    it = loaded(Limits(rows=ROWS, capacity=1024, piece=64, queue=64))
    slowed(it.engine)
    with serving(Offer("demo", loaded, loaded=it)) as server:
        yield server


def slowed(engine: Engine) -> None:
    """Have forwards take as long as those of a model of some size."""
    step = engine._engine.step

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.01)
        return step(*arguments, **named)

    engine._engine.step = slow  # type: ignore[method-assign]


def begun(server: Running, path: str = "/v1/completions", **body: Any) -> socket.socket:
    """Send a request for a long answer."""
    asked = {"model": "demo", "prompt": "def ", "max_tokens": 400, "temperature": 0, **body}
    data = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock = socket.create_connection((server.host, server.port), timeout=10)
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


def until(what: Callable[[], bool], seconds: float = 5) -> float:
    """Wait for something, and return how long it took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds
        time.sleep(0.002)
    return time.monotonic() - began


def free(server: Running) -> bool:
    state = server.service.registry.engines["demo"].state
    return not state.running and not state.waiting and not server.service.under_way


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("at", "body"),
    [
        ("read", {"prompt": LONG}),
        ("written", {}),
        ("written", {"n": 2}),
        ("written", {"prompt": ["a", "b", "c", "d"]}),
    ],
    ids=["its prompt is read", "it is written", "two are", "some of several wait"],
)
def test_who_goes_frees_the_rows(
    server: Running, at: str, body: dict[str, Any], stream: bool
) -> None:
    engine = server.service.registry.engines["demo"]
    before = engine.state.generated
    sock = begun(server, stream=stream, **body)
    until(lambda: engine.state.running > 0)
    if at == "written":
        until(lambda: engine.state.generated > before + 3)
    sock.close()
    assert until(lambda: free(server)) < 1
    assert engine.state.generated < before + 300


@pytest.mark.parametrize("stream", [True, False])
def test_who_waits_and_goes_is_forgotten(server: Running, stream: bool) -> None:
    engine = server.service.registry.engines["demo"]
    with begun(server, stream=True) as one, begun(server, stream=True) as two:
        until(lambda: engine.state.running == ROWS)
        waiting = [begun(server, stream=stream) for _ in range(3)]
        until(lambda: engine.state.waiting == 3)
        for sock in waiting:
            sock.close()
        assert until(lambda: engine.state.waiting == 0) < 1
        assert engine.state.running == ROWS
        assert one.recv(100)
        assert two.recv(100)
    until(lambda: free(server))


def test_many_who_go_at_any_time_leave_nothing(server: Running) -> None:
    engine = server.service.registry.engines["demo"]

    def visit(number: int) -> None:
        sock = begun(server, stream=number % 2 == 0, max_tokens=1 + number % 20)
        time.sleep(number % 7 * 0.003)
        if number % 3 == 0:
            # Not a goodbye, but a reset.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(1000)))
    until(lambda: free(server), 20)
    assert engine.healthy
    assert not engine._engine.sequences
    answer = server.ask("POST", "/v1/completions", {"model": "demo", "prompt": "a"})
    assert answer.status == 200


def test_who_comes_too_many_is_told_so_at_once(server: Running) -> None:
    engine = server.service.registry.engines["demo"]
    socks = [begun(server, stream=True) for _ in range(ROWS + engine.limits.queue)]
    until(lambda: engine.state.waiting == engine.limits.queue)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        answer = server.ask("POST", "/v1/completions", {"model": "demo", "prompt": LONG})
        times.append(time.perf_counter() - began)
        assert (answer.status, answer.error["code"]) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) > 0
    assert sorted(times)[10] < 0.1
    for sock in socks:
        sock.close()
    until(lambda: free(server), 20)
